"""Tools on tokens: go on from an image's first tokens, draw chosen tokens again, walk from one image to another.

Codes come from ``pipeline.tokenizer.encode`` or from an earlier result's ``codes``; what is drawn anew, the pipeline
draws: ``pipeline("a red star", known_codes=keep_first(codes, 64))``. The transformer sees what stands
before a token only: a token that is drawn again knows its row so far and the rows above, not those below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from generation.pipeline import LaytonGenPipeline
from generation.sampling.decoding import FREE
from generation.text.encoders import TextFeatures


def keep_first(codes: Tensor, count: int) -> Tensor:
    """Codes of images of which the first ones, from the top left, stay: ``pipeline(prompt, known_codes=...)``.

    Args:
        codes: (B, N) int64.
        count: k in [0, N].

    Returns:
        (B, N) int64, -1 where a code is to be drawn.

    Raises:
        ValueError: ``count`` is out of range.
    """
    if not isinstance(count, int) or not 0 <= count <= codes.shape[1]:
        raise ValueError(f"count must be a number of tokens in [0, {codes.shape[1]}], got {count}")
    return draw_again(codes, torch.arange(codes.shape[1]) >= count)


def draw_again(codes: Tensor, chosen: Tensor) -> Tensor:
    """Codes of images of which chosen ones are to be drawn again: ``pipeline(prompt, known_codes=...)``.

    Args:
        codes: (B, N) int64.
        chosen: (N,) or (B, N) bool; `token_box` makes one from a rectangle.

    Returns:
        (B, N) int64, -1 where a code is to be drawn.

    Raises:
        ValueError: Shapes do not fit, or the mask is not of truth values.
    """
    if chosen.dtype != torch.bool or chosen.shape not in (codes.shape[1:], codes.shape):
        wanted = f"({codes.shape[1]},) or {tuple(codes.shape)} of bool"
        raise ValueError(f"the mask must be {wanted}, got {tuple(chosen.shape)} of {chosen.dtype}")
    return torch.where(chosen.to(codes.device), FREE, codes.long())


def token_box(grid: tuple[int, int], *, top: int, left: int, bottom: int, right: int) -> Tensor:
    """Mask (N,) bool of the tokens in rows [top, bottom) and columns [left, right) of a grid (h, w).

    Raises:
        ValueError: If the rectangle is empty or leaves the grid.
    """
    if not (0 <= top < bottom <= grid[0] and 0 <= left < right <= grid[1]):
        raise ValueError(f"rows {top} to {bottom}, columns {left} to {right} are no rectangle of a grid {grid}")
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask.flatten()


@torch.no_grad()
def interpolate_images(
    pipeline: LaytonGenPipeline,
    first: Tensor,
    last: Tensor,
    *,
    steps: int,
    decoder: str | None = None,
    num_inference_steps: int | None = None,
) -> Tensor:
    """Pictures between two images: their code embeddings are mixed on the sphere and decoded, not quantized again.

    Args:
        pipeline: Its tokenizer decodes.
        first: Codes (N,) int64 of the first picture.
        last: Codes (N,) int64 of the last picture.
        steps: Number of pictures, both ends included.
        decoder: Name of the decoder.
        num_inference_steps: Its steps.

    Returns:
        (steps, 3, S, S) in [-1, 1]; the noise of the decoder is the same for all.

    Raises:
        ValueError: If there are fewer than 2 steps, or codes are not those of an image.
    """
    shares = _shares(steps).to(pipeline.device)
    tokenizer = pipeline.tokenizer
    pair = tokenizer.quantizer.codes_to_embeddings(torch.stack([first, last]).to(pipeline.device), tokenizer.grid)
    return tokenizer.decoder(decoder).decode(_on_sphere(pair[0], pair[1], shares), num_steps=num_inference_steps)


def interpolate_prompts(
    pipeline: LaytonGenPipeline,
    first: str,
    last: str,
    *,
    steps: int,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_entropy: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Codes of images between two prompts: text features are mixed linearly; all images draw with the same seed.

    Args:
        pipeline: Draws.
        first: First prompt.
        last: Last prompt.
        steps: Number of images, both ends included: these have the codes that the prompts alone give, drawn once.
        guidance_scale: As for the pipeline.
        temperature: See there.
        top_k: See there.
        top_p: See there.
        min_entropy: See there.
        seed: Of every image.

    Returns:
        (steps, N) int64.

    Raises:
        ValueError: If there are fewer than 2 steps.
    """
    shares = _shares(steps).to(pipeline.device)
    text = pipeline.encode_prompt([first, last])
    features = text.features[0] * (1 - shares[:, None, None]) + text.features[1] * shares[:, None, None]
    # between the ends a token counts that either prompt has; at the ends only the prompt's own
    inside = (text.mask[0] | text.mask[1]).expand(steps, -1).clone()
    inside[0], inside[-1] = text.mask[0], text.mask[1]
    sampling, guidance = pipeline.options(
        guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p, min_entropy=min_entropy
    )
    generators = [torch.Generator().manual_seed(seed) for _ in range(steps)]
    for generator in generators:  # as in the pipeline, which takes a number for the decoder's noise first
        torch.randint(2**62, (1,), generator=generator)
    text = pipeline.planned(TextFeatures(features, inside), generators)
    return pipeline.draw_codes(text, generators=generators, sampling=sampling, guidance=guidance)


def _shares(steps: int) -> Tensor:
    if steps < 2:
        raise ValueError(f"steps must be >= 2, got {steps}")
    return torch.linspace(0, 1, steps)


def _on_sphere(first: Tensor, last: Tensor, shares: Tensor) -> Tensor:
    """Great-circle mixture (T, d, h, w) of unit vectors (d, h, w); straight lines where they nearly coincide."""
    cosine = torch.cosine_similarity(first, last, dim=0).clamp(-1, 1)
    angle = cosine.acos()
    weights = shares.view(-1, 1, 1, 1)
    sine = angle.sin()
    straight = (1 - weights) * first + weights * last
    curved = ((1 - weights) * angle).sin() / sine * first + (weights * angle).sin() / sine * last
    return torch.where(sine > 1e-4, curved, straight)
