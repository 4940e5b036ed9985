"""A perceptual distance in latent space: LPIPS without decoding (arXiv 2406.05768, section 4.3: L-LPIPS).

The published network is a VGG16 with 4 input channels and three of its max-pools removed, trained from scratch on
BAPPS. Which pools are removed is not published; keeping the second is inferred: latents are small already. Here any
number of channels will do, and `small` gives a network for 16-channel 16x16 latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.held import Held

VGG_WIDTHS = (64, 128, 256, 512, 512)
VGG_DEPTHS = (2, 2, 3, 3, 3)


class LatentPerceptualNet(nn.Module):
    """VGG-like stages over latents; the end of each stage is one level of the distance.

    Args:
        in_channels: C of the latents.
        widths: Channels of each stage; the defaults are VGG16's.
        depths: Convolutions of each stage.
        pool_before: Stages (0-based) that begin with a 2x2 max-pool; VGG16 has (1, 2, 3, 4).

    Raises:
        ValueError: Widths and depths differ in length, are not positive, or a pool names no stage.
    """

    def __init__(
        self,
        in_channels: int = 4,
        widths: Sequence[int] = VGG_WIDTHS,
        depths: Sequence[int] = VGG_DEPTHS,
        pool_before: Sequence[int] = (2,),
    ) -> None:
        super().__init__()
        if len(widths) != len(depths) or min(in_channels, *widths, *depths) < 1:
            raise ValueError(f"need as many positive widths as depths, got {widths}, {depths} on {in_channels}")
        if not set(pool_before) <= set(range(len(widths))):
            raise ValueError(f"pool_before must name stages 0 to {len(widths) - 1}, got {tuple(pool_before)}")
        self.in_channels = in_channels
        self.widths, self.depths, self.pool_before = tuple(widths), tuple(depths), tuple(pool_before)
        self.stages = nn.ModuleList()
        before = in_channels
        for number, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if number in pool_before else []
            for _ in range(depth):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            self.stages.append(nn.Sequential(*layers))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def small(cls, in_channels: int = 16) -> LatentPerceptualNet:
        """Four stages for latents of about 16x16: 16, 16, 8 and 4 wide."""
        return cls(in_channels, widths=(48, 64, 96, 128), depths=(1, 2, 2, 2), pool_before=(2, 3))

    def forward(self, latents: Tensor) -> list[Tensor]:
        """Latents (B, C, h, w), scaled to about unit variance -> one feature map (B, C_i, h_i, w_i) for each stage.

        Raises:
            ValueError: Another number of channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.in_channels:
            raise ValueError(f"latents must be (B, {self.in_channels}, h, w), got {tuple(latents.shape)}")
        features = []
        x = latents
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class LatentPerceptualDistance(nn.Module):
    """Mean squared distance of unit-normalised features over all stages (LPIPS, arXiv 1801.03924, eq. 1).

    LPIPS weighs channels by what people judged; without judgements every channel counts the same.

    Args:
        net: The feature network; it is frozen in place and is no part of the owner's parameters or ``state_dict``.
        l2_weight: Adds so much of the mean squared difference, which sees what the features ignore.

    Raises:
        ValueError: Negative ``l2_weight``.
    """

    def __init__(self, net: LatentPerceptualNet, *, l2_weight: float = 0.0) -> None:
        super().__init__()
        if l2_weight < 0:
            raise ValueError(f"l2_weight must be >= 0, got {l2_weight}")
        self.l2_weight = l2_weight
        self._net = Held(net, frozen=True)

    def forward(self, latents: Tensor, targets: Tensor) -> Tensor:
        """Distance () between two batches (B, C, h, w); gradients flow into the first, none into the second."""
        net = self._net.on(latents.device)
        with torch.no_grad():
            wanted = net(targets.float())
        found = net(latents.float())
        levels = [(unit(a) - unit(b)).square().sum(dim=1).mean() for a, b in zip(found, wanted, strict=True)]
        distance = torch.stack(levels).mean()
        if self.l2_weight:
            distance = distance + self.l2_weight * F.mse_loss(latents.float(), targets.detach().float())
        return distance


def unit(features: Tensor) -> Tensor:
    """Features (B, C, h, w) of unit length along the channels, float32."""
    return F.normalize(features.float(), dim=1, eps=1e-4)
