"""The perceptual network over latents on disk; the network itself is `distill.methods.latent_perceptual`."""

from __future__ import annotations

from pathlib import Path

from distill.methods.latent_perceptual import LatentPerceptualDistance, LatentPerceptualNet
from layton.folder import JsonValue, load_pretrained, save_pretrained


def save_latent_perceptual(net: LatentPerceptualNet, folder: Path | str) -> None:
    """Write config and weights into ``folder``."""
    config: dict[str, JsonValue] = {
        "in_channels": net.in_channels,
        "widths": [*net.widths],
        "depths": [*net.depths],
        "pool_before": [*net.pool_before],
    }
    save_pretrained(net, config, folder)


def load_latent_perceptual(folder: Path | str) -> LatentPerceptualNet:
    """Read what `save_latent_perceptual` wrote.

    Raises:
        ValueError: The folder does not hold such a network.
    """
    return load_pretrained(LatentPerceptualNet, folder)


class SavedLatentPerceptualDistance(LatentPerceptualDistance):
    """`LatentPerceptualDistance` as run files name it, for ``MLCM(features=...)``.

    Args:
        folder: Of a trained network.
        l2_weight: See `LatentPerceptualDistance`.

    Raises:
        ValueError: The folder does not hold such a network.
    """

    def __init__(self, folder: str, *, l2_weight: float = 0.0) -> None:
        super().__init__(load_latent_perceptual(folder), l2_weight=l2_weight)
