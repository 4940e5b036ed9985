"""What the distillation bench measures: steps of this library's methods, of the peer, and single forwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from distill.adapters import STUDENT, LoraSettings, networks_for, update_target
from distill.budget import Budget
from distill.condition import Condition
from distill.method import DistillationMethod, DistillBatch
from distill.methods.consistency import draw_guidance, draw_pair
from distill.models import UNetDenoiser
from distill.noise import gaussian_like
from distill.recompute import Recompute, set_recompute
from distill.schedules import VPSchedule
from layton.bench.lcm_peer import Draws
from layton.ldm.unet import build_unet, use_fast_attention
from layton.tasks.critics import CriticSettings, attach_networks

GUIDANCE = (3.0, 8.0)
"""Range of `configs/distill/lcm.yaml` and `scott.yaml`."""
SEED = 7
"""Every step draws the same: the sizes of `mlcm`'s batches depend on it."""


@dataclass(frozen=True, slots=True)
class DistillationShape:
    """What is measured.

    Attributes:
        widths: Of the UNet's levels.
        channels: C of the latents.
        size: h = w of the latents.
        batch: B; 16 is that of the run files, and the peer's default.
        text_length: L; CLIP's 77.
        text_width: D.
        norm_num_groups: Of the UNet's group norms.
        rank: r of the LoRA; the layers are those of the published list.
    """

    widths: tuple[int, ...] = (96, 128)
    channels: int = 16
    size: int = 16
    batch: int = 16
    text_length: int = 77
    text_width: int = 192
    norm_num_groups: int = 16
    rank: int = 64


def make_unet(shape: DistillationShape) -> UNet2DConditionModel:
    """The UNet with random weights from seed 0; attention as diffusers chooses it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_unet(
            latent_channels=shape.channels,
            latent_size=shape.size,
            block_out_channels=shape.widths,
            text_width=shape.text_width,
            norm_num_groups=shape.norm_num_groups,
        )


def make_batch(shape: DistillationShape) -> DistillBatch:
    """Random latents and text, and one empty text."""
    generator = torch.Generator().manual_seed(1)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    condition = Condition(embeds=draw(shape.batch, shape.text_length, shape.text_width))
    null = Condition(embeds=draw(1, shape.text_length, shape.text_width))
    latent = (shape.channels, shape.size, shape.size)
    return DistillBatch(condition, null, latent, draw(shape.batch, *latent))


def draws_of_lcm(x_0: Tensor) -> Draws:
    """The numbers that a step of `distill.methods.lcm.LCM` draws from `SEED`, in its order, for the peer."""
    generator = torch.Generator().manual_seed(SEED)
    t, _ = draw_pair(VPSchedule(), len(x_0), generator, num_points=50, skip=20.0)
    scale = torch.as_tensor(draw_guidance(GUIDANCE, len(x_0), generator))
    return Draws(t.long(), gaussian_like(x_0, generator), scale - 1.0)


def learning_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """What learns in a UNet with one adapter, under names that do not depend on the adapter's, in their order."""
    named = {name.replace(f".{STUDENT}.", ".default."): p for name, p in unet.named_parameters() if p.requires_grad}
    return dict(sorted(named.items()))


@torch.no_grad()
def shake(unet: nn.Module) -> None:
    """Give a UNet's adapter random weights: unlike a new one's they have an effect."""
    generator = torch.Generator().manual_seed(2)
    for parameter in learning_parameters(unet).values():
        parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


class MethodStep:
    """One step of a method with a LoRA, as `layton.tasks.distill.DistillTask` does it, without its trainer.

    Args:
        unet: The teacher; it becomes part of the student.
        method: Any method.
        batch: Of every step.
        lora: The student's adapter.
        recompute: What the backward pass computes again.
        lr: Of AdamW.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        method: DistillationMethod,
        batch: DistillBatch,
        lora: LoraSettings,
        *,
        recompute: Recompute = "nothing",
        lr: float = 1e-4,
    ) -> None:
        use_fast_attention(unet)
        set_recompute(unet, recompute)
        self.denoiser = UNetDenoiser(unet, VPSchedule())
        self.networks = networks_for(self.denoiser, lora, target_decay=method.target_decay)
        attach_networks(method, self.networks, CriticSettings(lora=lora))
        method.prepare(self.networks)
        self.method, self.batch = method, batch
        critic = list(method.critic_parameters())
        others = {id(parameter) for parameter in critic}
        self.learning = [p for p in self.networks.student.parameters() if p.requires_grad and id(p) not in others]
        self._optimizer = torch.optim.AdamW(self.learning, lr=lr, weight_decay=0.0, foreach=True)
        self._critic = torch.optim.AdamW(critic, lr=lr, weight_decay=0.0, foreach=True) if critic else None

    def loss(self) -> Tensor:
        """The student's loss at the numbers of `SEED`, ()."""
        terms = self.method.losses(self.networks, self.batch, step=0, generator=_generator()).terms
        return self._weighted(terms)

    def step(self) -> None:
        """One step of the student, of the averaged target and of the critic."""
        generator = _generator()
        output = self.method.losses(self.networks, self.batch, step=0, generator=generator)
        _learn(self._optimizer, self.learning, self._weighted(output.terms))
        if self.method.target_decay is not None:
            update_target(self.networks, self.method.target_decay)
        if self._critic is not None:
            terms = self.method.critic_losses(self.networks, self.batch, output, step=0, generator=generator)
            _learn(self._critic, list(self.method.critic_parameters()), torch.stack(list(terms.values())).sum())

    def counted(self) -> tuple[float, list[int]]:
        """Forward-equivalents of one step by `distill.budget`, and the batch size of every evaluation in it."""
        budget, sizes = Budget(), []

        def note(_module: nn.Module, args: tuple[Tensor, ...], _output: object) -> None:
            sizes.append(len(args[0]))

        handles = [budget.watch(self.denoiser), self.denoiser.register_forward_hook(note)]
        try:
            self.step()
        finally:
            for handle in handles:
                handle.remove()
        return budget.total, sizes

    @torch.no_grad()
    def forward(self, size: int) -> None:
        """One evaluation of the bare UNet on ``size`` samples."""
        x = torch.randn(size, *self.batch.latent_shape, generator=_generator())
        self.networks.teacher(x, torch.full((size,), 499.0), self.batch.null.expand(size))

    def _weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        weights = self.method.weights
        return torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _learn(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
