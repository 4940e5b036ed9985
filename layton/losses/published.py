"""DISTS and LPIPS as training losses, where the weights of their backbones are on disk; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from distill.held import Held
from layton.losses.perceptual import PerceptualLoss, PictureDistance
from layton.metrics.external import AbsentError, ExternalSources, LpipsNet, dists_network, lpips_network

Measure = Literal["dists", "lpips"]


class PublishedPerceptualLoss(PictureDistance):
    """DISTS (arXiv 2004.07728) or LPIPS (arXiv 1801.03924) through torchmetrics, else the network of our own.

    The network is frozen and is not part of the owner's ``state_dict``. Which one was taken is in ``measure``.

    Args:
        prefer: Measures in the order in which they are looked for.
        otherwise: Weights of the `layton.losses.perceptual.PerceptualLoss` that stands in for them, such as ``"mini"``;
            None makes it an error that none is there.
        lpips_net: Backbone of LPIPS; the paper of reflow names AlexNet, others VGG.
        hub_dir: Folder with ``checkpoints/`` as torch.hub keeps it; None for torch.hub's own.

    Attributes:
        measure: ``dists``, ``lpips`` or ``own``.

    Raises:
        ValueError: An unknown measure, or no weights and nothing in their place.
    """

    def __init__(
        self,
        *,
        prefer: tuple[Measure, ...] = ("dists", "lpips"),
        otherwise: str | None = "mini",
        lpips_net: LpipsNet = "vgg",
        hub_dir: Path | None = None,
    ) -> None:
        super().__init__()
        if not prefer or set(prefer) - set(get_args(Measure)):
            raise ValueError(f"prefer must name some of {get_args(Measure)}, got {prefer}")
        sources = ExternalSources(hub_dir=hub_dir, lpips_net=lpips_net)
        absent: list[str] = []
        self.measure: Literal["dists", "lpips", "own"] = "own"
        net: nn.Module | None = None
        for name in prefer:
            try:
                net = (dists_network if name == "dists" else lpips_network)(sources)
            except AbsentError as reason:
                absent.append(f"{name}: {reason}")
                continue
            self.measure = name
            break
        if net is None:
            if otherwise is None:
                raise ValueError("; ".join(absent))
            net = PerceptualLoss(otherwise)
        self._net = Held(net, frozen=True)

    def forward(self, images: Tensor, targets: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """See `PictureDistance.forward`; the whole pictures are compared."""
        net = self._net.on(images.device)
        # in float32: DISTS takes differences of nearly equal means
        with torch.autocast(images.device.type, enabled=False):
            a, b = images.float(), targets.float()
            if self.measure == "dists":
                found: Tensor = net((a + 1.0) / 2.0, (b + 1.0) / 2.0, require_grad=True)
            else:
                found = torch.as_tensor(net(a, b))
        return found.mean()
