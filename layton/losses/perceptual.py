"""A perceptual loss that needs no downloaded weights.

The usual backbones (VGG, AlexNet) are to be had only from the network, and the backbone of the project's *metric*
(EfficientNet-lite0, `layton.metrics`) must not also be trained on. So the loss uses a small network of our own,
trained by `layton.tasks.perceptual.PerceptualTask` to tell what was done to an image (blur, noise, JPEG, blocks ...),
how strongly, and what the image shows: its features react to the damage that decoders do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.held import Held
from distill.methods.latent_perceptual import unit
from layton import assets
from layton.folder import load_pretrained, save_pretrained


class PerceptualNet(nn.Module):
    """Four strided stages of convolutions; each stage's output is one level of the perceptual distance.

    Args:
        widths: Channels of the stages; each stage halves the resolution.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 128)) -> None:
        super().__init__()
        self.widths = tuple(widths)
        inputs = (3, *self.widths[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 4, stride=2, padding=1),
                nn.SiLU(),
                nn.Conv2d(after, after, 3, padding=1),
                nn.SiLU(),
            )
            for before, after in zip(inputs, self.widths, strict=True)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> one feature map for each stage, (B, C_i, H / 2^i, W / 2^i)."""
        features = []
        x = images
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features

    def save_pretrained(self, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
        """Write config and weights into ``folder``."""
        save_pretrained(self, {"widths": list(self.widths)}, folder, dtype=dtype)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> PerceptualNet:
        """Read what `save_pretrained` wrote; ``"mini"`` names the embedded weights.

        Raises:
            ValueError: If the folder does not hold such a network.
        """
        return load_pretrained(cls, assets.resolve(folder, part="perceptual"))


class PictureDistance(nn.Module, ABC):
    """How unlike pictures look: what training tasks take as their perceptual loss."""

    @abstractmethod
    def forward(self, images: Tensor, targets: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Mean distance () between two batches (B, 3, H, W) in [-1, 1]; gradients flow into the first.

        Args:
            images: What is judged.
            targets: What it should look like.
            generator: Of choices, where a distance makes any; tasks give it in training.
        """


class PerceptualLoss(PictureDistance):
    """Mean squared distance between unit-normalised features at all stages (the form of LPIPS, arXiv 1801.03924 eq. 1).

    The network is frozen and is not part of the owner's ``state_dict``.

    Args:
        weights: Folder of a `PerceptualNet`, or ``"mini"``.
        crop: Side in pixels of a random part that stands for the image, to save compute; None compares the whole.
    """

    def __init__(self, weights: str = "mini", *, crop: int | None = None) -> None:
        super().__init__()
        self.crop = crop
        self._net = Held(PerceptualNet.from_pretrained(weights), frozen=True)

    def forward(self, images: Tensor, targets: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Distance () between two batches (B, 3, H, W) in [-1, 1]; zero for equal images.

        Args:
            images: What is judged; gradients flow into it.
            targets: What it should look like.
            generator: Chooses the part that is compared; without it, or without ``crop``, the whole is.
        """
        if self.crop is not None and generator is not None:
            part = random_part(images, self.crop, generator)
            images, targets = images[part], targets[part]
        net = self._net.on(images.device)
        with torch.no_grad():
            wanted = net(targets)
        terms = [(unit(a) - unit(b)).square().sum(dim=1).mean() for a, b in zip(net(images), wanted, strict=True)]
        return torch.stack(terms).mean()


def random_part(images: Tensor, side: int, generator: torch.Generator) -> tuple[slice, ...]:
    """Index of a random square of ``side`` pixels, the same for all images (B, 3, H, W) of a batch."""
    spans = []
    for length in images.shape[-2:]:
        room = max(0, length - side)
        start = int(torch.randint(room + 1, (), generator=generator, device=generator.device))
        spans.append(slice(start, start + side))
    return (slice(None), slice(None), *spans)
