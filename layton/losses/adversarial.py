"""A patch discriminator and its hinge losses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Convolutional discriminator that judges patches of 70 pixels (PatchGAN, arXiv 1611.07004), with group norm.

    Group norm instead of batch norm: batches are small here, and the result must not depend on them.

    Args:
        width: Channels of the first layer.
        num_layers: Strided layers; 3 make 70 pixels.
    """

    def __init__(self, width: int = 32, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for _ in range(1, num_layers):
            layers += [
                nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
                nn.GroupNorm(8, 2 * channels),
                nn.LeakyReLU(0.2),
            ]
            channels *= 2
        layers += [nn.Conv2d(channels, 2 * channels, 4, padding=1), nn.GroupNorm(8, 2 * channels), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(2 * channels, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> one score for each patch, (B, 1, h, w)."""
        return self.layers(images)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """E relu(1 - D(real)) + E relu(1 + D(fake)) over scores of any shape, as a scalar."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """-E D(fake) over scores of any shape, as a scalar."""
    return -fake.mean()
