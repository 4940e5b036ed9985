"""Uses of a distilled student beyond text to image that diffusers' pipelines do not cover by themselves.

A second LoRA, ControlNet, image-to-image and, on 4-channel models, inpainting need nothing from here: load the student
with `layton.distillation.distilled.load_distilled` and call the pipeline. Here is inpainting for models that the
inpaint pipeline refuses, such as those with 16 latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

StepCallback = Callable[[DiffusionPipeline, int, Any, dict[str, Any]], dict[str, Any]]


@torch.no_grad()
def encode_image(pipeline: DiffusionPipeline, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] to the pipeline's scaled latents (B, C, h, w), the mode of the posterior."""
    vae = pipeline.vae
    latents: Tensor = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
    return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def mask_blending(latents: Tensor, mask: Tensor, noise: Tensor) -> StepCallback:
    """A ``callback_on_step_end`` that keeps a known image outside a mask: inpainting with any text-to-image pipeline.

    After every step the state outside the mask is replaced by the known image noised to the next time (RePaint's
    conditioning, arXiv 2201.09865, and that of diffusers' inpaint pipeline on 4-channel models); after the last one by
    the image itself.

    Args:
        latents: (B, C, h, w) or (1, C, h, w) the known image, see ``encode_image``.
        mask: (B, 1, H, W) or (1, 1, H, W) at any size, 1 where to paint, 0 what to keep.
        noise: Shaped like ``latents``; give the pipeline the same as ``latents`` for a seamless first step.

    Returns:
        A function for the pipeline's ``callback_on_step_end``.

    Raises:
        ValueError: Shapes do not fit, or the mask leaves [0, 1].
    """
    if latents.ndim != 4 or noise.shape != latents.shape:
        raise ValueError(
            f"latents and noise must both be (B, C, h, w), got {tuple(latents.shape)}, {tuple(noise.shape)}"
        )
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, len(latents)):
        raise ValueError(f"mask must be ({len(latents)} or 1, 1, H, W), got {tuple(mask.shape)}")
    if not 0.0 <= float(mask.min()) <= float(mask.max()) <= 1.0:
        raise ValueError(f"mask must lie in [0, 1], got {float(mask.min())} to {float(mask.max())}")
    # A latent is painted if any of its pixels is: an average would leave a seam of half-painted ones.
    painted = F.adaptive_max_pool2d(mask.float(), latents.shape[-2:])

    def blend(pipeline: DiffusionPipeline, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        state: Tensor = values["latents"]
        times = pipeline.scheduler.timesteps
        following = int((times == t).nonzero()[0, 0]) + 1
        known = latents.to(state)
        if following < len(times):
            known = pipeline.scheduler.add_noise(known, noise.to(state), times[following : following + 1])
        weight = painted.to(state)
        return {"latents": weight * state + (1.0 - weight) * known}

    return blend
