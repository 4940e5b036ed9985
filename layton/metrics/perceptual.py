"""EPD, EfficientNet perceptual distance: a perceptual measure that works offline, named for what it is.

It is **not** LPIPS: another network, no learned weights, never compared with published LPIPS figures. And nothing here
is trained on it: the perceptual loss of training is another network.
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import reduce
from torch import Tensor, nn

from layton.metrics.effnet import EfficientNetLite0, EffNetFeatures
from layton.metrics.image import check_pair


def feature_distance(a: EffNetFeatures, b: EffNetFeatures) -> Tensor:
    """Squared distance of unit-normalised feature vectors, averaged over positions, then over the five stages.

    The formula is LPIPS's with all weights equal ("baseline" of arXiv 1801.03924, Eq. 1 with w_l = 1), divided by the
    number of stages.

    Args:
        a: Features of B images.
        b: Features of B images of the same size.

    Returns:
        (B,) in [0, 4]; 0 for equal images.
    """
    distances = [
        reduce((_unit(x) - _unit(y)).square(), "b c h w -> b h w", "sum").mean(dim=(1, 2))
        for x, y in zip(a.stages, b.stages, strict=True)
    ]
    return torch.stack(distances).mean(0)


def _unit(features: Tensor) -> Tensor:
    """Scales the vector at each position to length one: (B, c, h, w) -> (B, c, h, w)."""
    return features / features.square().sum(1, keepdim=True).sqrt().clamp(min=1e-8)


class EPD(nn.Module):
    """Distance of two images in the features of five stages of EfficientNet-lite0, each normalised to unit length.

    Images go in at their own size, at least 32 pixels, in [-1, 1] (which is the network's own preprocessing). No
    gradient flows.

    Args:
        network: Shared network, to save memory; by default a new one with the package's weights.
        weights: Weights file for a new network, see `EfficientNetLite0`.

    Raises:
        ImportError: The extra ``eval`` is not installed.
    """

    def __init__(self, network: EfficientNetLite0 | None = None, *, weights: Path | None = None) -> None:
        super().__init__()
        self.network = network if network is not None else EfficientNetLite0(weights)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each pair.

        Args:
            a: (B, 3, H, W) in [-1, 1], H and W at least 32.
            b: (B, 3, H, W) in [-1, 1].

        Returns:
            (B,) in [0, 4].

        Raises:
            ValueError: The shapes are not equal, not (B, 3, H, W) or a side is shorter than 32.
        """
        check_pair(a, b)
        return feature_distance(self.network(a), self.network(b))
