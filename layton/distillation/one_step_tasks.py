"""Editing, inpainting and super-resolution in one step of a distilled model (HiPA, arXiv 2311.18158, applications).

The paper names the three and gives no formulas. Here all of them take one step from the encoded source, and keep of
the source what the task leaves alone: by a mask, by the difference between two predictions, or by its low frequencies.
A model that was trained to draw from noise gets the source noised to a chosen time; one that was trained on pairs of
pictures (`layton.distillation.task_pairs`) the source as it is. Functions over any denoiser and any autoencoder.

Legend: B batch, C latent channels, h w latent grid, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.few_step import Start
from distill.noise import Generators, gaussian_like

Encode = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) in [-1, 1] to scaled latents (B, C, h, w)."""

Decode = Callable[[Tensor], Tensor]
"""Scaled latents (B, C, h, w) to images (B, 3, H, W), nominally in [-1, 1]."""


@torch.no_grad()
def edit(
    denoiser: Denoiser,
    images: Tensor,
    condition: Condition,
    source_condition: Condition,
    *,
    encode: Encode,
    decode: Decode,
    generator: Generators,
    start: Start = "noise",
    t: float | None = None,
    strength: float = 1.0,
    threshold: float = 0.4,
    softness: int = 2,
) -> Tensor:
    """Change what a new prompt changes and leave the rest of the pixels as they are.

    One step under either prompt from the same state. What the two predictions differ by is added to the source, which
    so keeps what a single step cannot draw (the virtual inversion of InfEdit, arXiv 2312.04965, in one step); where
    they differ is what the edit is about (the mask of DiffEdit, arXiv 2210.11427), and only there it is made. A model
    that starts from images predicts once, and what its prediction differs from is the source itself.

    Args:
        denoiser: One-step model.
        images: (B, 3, H, W) in [-1, 1].
        condition: The new prompt, batch size B or 1.
        source_condition: What the image shows now; of no effect on a model that starts from images.
        encode: See `Encode`.
        decode: See `Decode`.
        generator: Of the noise.
        start: See `distill.few_step.FewStepSampling`; with ``image`` neither the generator nor ``t`` counts.
        t: Time to noise the source to; default the noisiest, the only one that a one-step model is trained for.
        strength: Of the difference, at least 0: guidance, with the source's prompt as what to go away from.
        threshold: Share of the largest difference, in [0, 1), above which a position belongs to the edit; at 0 the
            whole picture does.
        softness: Latent positions by which the mask is widened.

    Returns:
        (B, 3, H, W) in [-1, 1].

    Raises:
        ValueError: ``threshold`` is outside [0, 1), or ``strength`` or ``softness`` is negative.
    """
    if not 0 <= threshold < 1 or softness < 0 or not strength >= 0:
        raise ValueError(
            f"threshold {threshold} must lie in [0, 1), strength {strength} and softness {softness} must be >= 0"
        )
    source = encode(images)
    state, time = _state(denoiser, source, t, generator, start)
    wanted = denoiser.predict(state, time, condition.expand(len(images))).x_0
    present = source
    if start == "noise":
        present = denoiser.predict(state, time, source_condition.expand(len(images))).x_0
    change = strength * (wanted - present)
    if threshold == 0:
        return decode(source + change).clamp(-1, 1)
    mask = difference_mask(wanted, present, threshold=threshold, softness=softness)
    return blend(images, decode(source + mask * change), mask)


def difference_mask(latents: Tensor, others: Tensor, *, threshold: float, softness: int) -> Tensor:
    """Where two batches of latents (B, C, h, w) differ: (B, 1, h, w), 0 or 1, widened by ``softness`` positions."""
    distance = (latents - others).square().mean(dim=1, keepdim=True).sqrt()
    distance = F.avg_pool2d(F.pad(distance, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mask = (distance > threshold * distance.amax(dim=(2, 3), keepdim=True)).to(latents.dtype)
    return F.max_pool2d(mask, 2 * softness + 1, stride=1, padding=softness)


@torch.no_grad()
def inpaint(
    denoiser: Denoiser,
    images: Tensor,
    mask: Tensor,
    condition: Condition,
    *,
    encode: Encode,
    decode: Decode,
    generator: Generators,
    start: Start = "noise",
    t: float | None = None,
    fill: Literal["keep", "grey"] = "grey",
) -> Tensor:
    """Draw the masked region anew; pixels outside it stay exactly as they are but for a narrow border.

    Args:
        denoiser: One-step model.
        images: (B, 3, H, W) in [-1, 1].
        mask: (B, 1, H, W) or (1, 1, H, W), 1 where to draw, 0 where to keep.
        condition: What the whole picture shall show, batch size B or 1.
        encode: See `Encode`.
        decode: See `Decode`.
        generator: Of the noise.
        start: See `distill.few_step.FewStepSampling`; with ``image`` neither the generator nor ``t`` counts.
        t: Time to noise the source to, default the noisiest. At an earlier one the surroundings guide the step.
        fill: What the model sees of the masked region: nothing (``grey``) or what is there (``keep``).

    Returns:
        (B, 3, H, W) in [-1, 1].

    Raises:
        ValueError: The mask does not fit the images.
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[-2:] != images.shape[-2:]:
        raise ValueError(f"mask must be (B, 1, H, W) for images {tuple(images.shape)}, got {tuple(mask.shape)}")
    mask = mask.to(images).expand(len(images), -1, -1, -1)
    source = encode(images if fill == "keep" else images * (1 - mask))
    kept = encode(images)
    state, time = _state(denoiser, source, t, generator, start)
    drawn = denoiser.predict(state, time, condition.expand(len(images))).x_0
    grid = F.adaptive_max_pool2d(mask, drawn.shape[-2:])  # a latent position that is masked in part is drawn whole
    return blend(images, decode(grid * drawn + (1 - grid) * kept), mask)


@torch.no_grad()
def super_resolve(
    denoiser: Denoiser,
    images: Tensor,
    condition: Condition,
    *,
    encode: Encode,
    decode: Decode,
    generator: Generators,
    start: Start = "noise",
    scale: int = 4,
    t: float = 250.0,
    strength: float = 1.0,
    rounds: int = 3,
) -> Tensor:
    """Enlarge images: one step from the noised, bicubically enlarged source, then made to agree with the source.

    The last part is iterative back-projection (Irani and Peleg, 1991): what a bicubic reduction of the result lacks
    against the source is enlarged and added, so that the model decides only what the source does not say.

    Args:
        denoiser: One-step model.
        images: (B, 3, H, W) in [-1, 1], small.
        condition: What they show, batch size B or 1.
        encode: See `Encode`.
        decode: See `Decode`.
        generator: Of the noise.
        start: See `distill.few_step.FewStepSampling`; with ``image`` neither the generator nor ``t`` counts.
        scale: Enlargement along a side.
        t: Time to noise the enlarged source to.
        strength: Share in [0, 1] of the model's picture; the rest is bicubic.
        rounds: Back-projections; 0 leaves them out.

    Returns:
        (B, 3, scale H, scale W) in [-1, 1].

    Raises:
        ValueError: ``scale`` or ``rounds`` is out of range, or ``strength`` outside [0, 1].
    """
    if scale < 2 or rounds < 0 or not 0 <= strength <= 1:
        raise ValueError(f"scale {scale} must be >= 2, rounds {rounds} >= 0, strength {strength} in [0, 1]")
    enlarged = resize(images, scale).clamp(-1, 1)
    state, time = _state(denoiser, encode(enlarged), t, generator, start)
    result = decode(denoiser.predict(state, time, condition.expand(len(images))).x_0).to(images)
    result = enlarged + strength * (result - enlarged)
    for _ in range(rounds):
        result = result + resize(images - resize(result, 1 / scale), scale)
    return result.clamp(-1, 1)


def resize(images: Tensor, scale: float) -> Tensor:
    """Bicubic resize of images (B, C, H, W), with a wide enough filter when they shrink."""
    return F.interpolate(images, scale_factor=scale, mode="bicubic", antialias=scale < 1)


def blend(images: Tensor, drawn: Tensor, mask: Tensor) -> Tensor:
    """Drawn pixels inside a mask, original ones outside, (B, 3, H, W) in [-1, 1].

    Args:
        images: (B, 3, H, W) originals.
        drawn: (B, 3, H, W).
        mask: (B, 1, H, W) or (B, 1, h, w), which is enlarged smoothly and stays zero a grid cell away from the mask.
    """
    if mask.shape[-2:] != images.shape[-2:]:
        mask = F.interpolate(mask, size=images.shape[-2:], mode="bilinear")
    return (mask * drawn.to(images) + (1 - mask) * images).clamp(-1, 1)


def _state(
    denoiser: Denoiser, latents: Tensor, t: float | None, generator: Generators, start: Start
) -> tuple[Tensor, float]:
    """The state at ``t``; at the noisiest time pure noise or the latents themselves, as the model knows it."""
    schedule = denoiser.schedule
    if start == "image":
        return latents, schedule.terminal_t
    noise = gaussian_like(latents, generator)
    if t is None or t >= schedule.terminal_t:
        return noise, schedule.terminal_t
    return schedule.add_noise(latents, noise, t), t
