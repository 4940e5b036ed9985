"""A score for keep-best that any latent diffusion model allows: how a student's latents differ from its teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

DIRECTIONS = 128
_PATCH = 3
_POOLS = (1, 4)  # texture; layout and colour


def sliced_wasserstein(latents: Tensor, reference: Tensor, *, seed: int = 0) -> float:
    """Distance of two sets of latents in the distribution of their 3x3 patches, at full size and pooled by 4.

    Sliced Wasserstein-2 distance over fixed random directions (the measure of arXiv 1710.10196, section 5, without its
    image pyramid), relative to the spread of the reference: 0 is equal, blur or missing texture shows as lost spread.
    Unlike an error against the teacher's own picture it does not prefer blurred answers to sharp ones. It says nothing
    of prompts; `layton evaluate sceneval` does.

    Args:
        latents: (n, C, h, w).
        reference: (n, C, h, w).
        seed: Of the directions.

    Returns:
        A number >= 0.

    Raises:
        ValueError: The two differ in shape.
    """
    if latents.shape != reference.shape:
        raise ValueError(f"sets must have one shape, got {tuple(latents.shape)} and {tuple(reference.shape)}")
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for pool in _POOLS:
        if min(latents.shape[-2:]) // pool < _PATCH:
            continue
        ours, theirs = (_patches(x.detach().float().cpu(), pool) for x in (latents, reference))
        directions = F.normalize(torch.randn(ours.shape[1], DIRECTIONS, generator=generator), dim=0)
        wanted = (theirs @ directions).sort(dim=0).values
        found = (ours @ directions).sort(dim=0).values
        spread = wanted.var(dim=0).clamp(min=1e-12)
        distances.append(((found - wanted).square().mean(dim=0) / spread).mean().sqrt())
    if not distances:
        raise ValueError(f"latents of {tuple(latents.shape[-2:])} have no patch of {_PATCH} x {_PATCH}")
    return float(torch.stack(distances).mean())


def _patches(x: Tensor, pool: int) -> Tensor:
    """All patches (n * places, C * 9)."""
    pooled = F.avg_pool2d(x, pool) if pool > 1 else x
    patches: Tensor = rearrange(F.unfold(pooled, _PATCH), "n d p -> (n p) d")
    return patches
