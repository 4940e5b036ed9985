"""HiPA: one-step low-rank adaptors trained to restore high frequencies (arXiv 2311.18158).

The base model stays frozen; adaptors on its attention are trained for one step from pure noise at the noisiest time,
``x_0 = (x_T - sigma_T eps) / alpha_T``, towards the frozen teacher's sample of many steps from the same noise. The loss
is a spatial perceptual distance plus a high-frequency term made of Fourier components and of edges. The paper's full
text was not to be had: formulas and weights of the terms are this library's, after the wording of its abstract and of
GarDiff (ECCV 2024), which uses the same terms.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distill.adapters import ATTENTION_LORA_TARGETS
from distill.frequency import HighPass, edge_strength, high_pass
from distill.held import Held
from distill.method import DistillationMethod, DistillBatch, MethodOutput, Networks
from distill.methods.image_space import ImageSpace
from distill.methods.one_step import one_step
from distill.methods.pairs import TeacherSolver, pair_of
from distill.schedules import NoiseSchedule, VPSchedule

PAPER_SHARE = 0.0038  # of the network's parameters: 3.3M of 866M
HIPA_SOLVER = TeacherSolver("dpmpp_2m", num_steps=25, guidance_scale=7.5)


def parameters_per_rank(network: nn.Module, targets: tuple[str, ...] = ATTENTION_LORA_TARGETS) -> int:
    """Parameters of low-rank adaptors of rank 1 on the linear layers whose names end in one of ``targets``.

    207,488 for Stable Diffusion 2.x, 199,296 for 1.x: rank 16 is the paper's 3.3M.

    Raises:
        ValueError: No layer matches.
    """
    ends = tuple(f".{target}" for target in targets)
    layers = [
        module
        for name, module in network.named_modules()
        if f".{name}".endswith(ends) and isinstance(module, nn.Linear)
    ]
    if not layers:
        raise ValueError(f"no linear layer's name ends in one of {targets}")
    return sum(layer.in_features + layer.out_features for layer in layers)


def rank_for_share(
    network: nn.Module, share: float = PAPER_SHARE, targets: tuple[str, ...] = ATTENTION_LORA_TARGETS
) -> int:
    """The rank, at least 1, at which adaptors come closest to a share of the network's parameters.

    Raises:
        ValueError: ``share`` is not positive, or no layer matches.
    """
    if not share > 0:
        raise ValueError(f"share must be > 0, got {share}")
    total = sum(parameter.numel() for parameter in network.parameters())
    return max(1, round(share * total / parameters_per_rank(network, targets)))


class HiPA(DistillationMethod):
    """Spatial perceptual loss and high-frequency promoted loss of one adapted step.

    The two high-frequency terms are relative errors: each is divided by the same measure of the target, so that equal
    weights mean equal influence whatever the images' contrast.

    Args:
        perceptual: Distance () of two batches of images (DISTS, LPIPS, ...), or of latents where there is no decoder;
            None: mean squared error in its place, the term ``spatial`` either way.
        decoder: Has ``decode(latents) -> images``; None compares latents.
        solver: How targets are made where the batch has none.
        spatial_weight: Of the perceptual term.
        frequency_weight: Of the Fourier term.
        edge_weight: Of the edge term.
        l2_weight: Of a plain error of the latents beside them, relative to the targets' power; 0 leaves it out.
        radius: Cut-off of the high pass, in shares of Nyquist.
        filter_kind: ``gaussian`` or ``ideal``.
        crop: Side in latent positions of the random part that is decoded and compared; None: the whole.
        schedule: The student's own schedule for `inference_times`, default Stable Diffusion's; set from the student
            at the first batch.

    Raises:
        ValueError: A negative weight, or a radius that is not positive.
    """

    needs_latents = False

    def __init__(
        self,
        *,
        perceptual: nn.Module | None = None,
        decoder: nn.Module | None = None,
        solver: TeacherSolver = HIPA_SOLVER,
        spatial_weight: float = 1.0,
        frequency_weight: float = 1.0,
        edge_weight: float = 1.0,
        l2_weight: float = 0.0,
        radius: float = 0.2,
        filter_kind: HighPass = "gaussian",
        crop: int | None = None,
        schedule: NoiseSchedule | None = None,
    ) -> None:
        super().__init__()
        self._weights = {
            "spatial": spatial_weight, "frequency": frequency_weight, "edges": edge_weight, "l2": l2_weight
        }  # fmt: skip
        if any(weight < 0 for weight in self._weights.values()):
            raise ValueError(f"weights must be >= 0, got {self._weights}")
        if not radius > 0:
            raise ValueError(f"radius must be > 0, got {radius}")
        self.perceptual = None if perceptual is None else Held(perceptual, frozen=True)
        self.space = ImageSpace(decoder, crop=crop)
        self.solver = solver
        self.radius = radius
        self.filter_kind: HighPass = filter_kind
        self.needs_null = solver.is_guided
        self.schedule: NoiseSchedule = schedule or VPSchedule()

    @property
    def weights(self) -> Mapping[str, float]:
        """Factor of each term that is in use."""
        return {name: weight for name, weight in self._weights.items() if weight > 0}

    def losses(self, networks: Networks, batch: DistillBatch, *, step: int, generator: torch.Generator) -> MethodOutput:
        """The terms ``spatial``, ``frequency``, ``edges`` and ``l2``, those with a positive weight."""
        self.schedule = networks.student.schedule
        pair = pair_of(batch, networks.teacher, self.solver, generator)
        x_0 = one_step(networks.student, pair.noise, batch)
        terms: dict[str, Tensor] = {}
        if self._weights["spatial"] > 0 or self._weights["frequency"] > 0 or self._weights["edges"] > 0:
            images, targets = self.space(x_0, pair.x_0, generator=generator)
            terms = self._image_terms(images, targets)
        if self._weights["l2"] > 0:
            terms["l2"] = (x_0 - pair.x_0).square().mean() / pair.x_0.square().mean().clamp(min=1e-8)
        return MethodOutput(terms)

    def _image_terms(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if self._weights["spatial"] > 0:
            held = self.perceptual
            terms["spatial"] = (
                (images - targets).square().mean() if held is None else held.on(images.device)(images, targets)
            )
        if self._weights["frequency"] > 0:
            upper, wanted = (high_pass(x, self.radius, kind=self.filter_kind) for x in (images, targets))
            terms["frequency"] = relative_error(upper, wanted)
        if self._weights["edges"] > 0:
            terms["edges"] = relative_error(edge_strength(images), edge_strength(targets))
        return terms

    def inference_times(self, num_steps: int) -> Tensor:
        """The noisiest time, for one step."""
        if num_steps != 1:
            raise ValueError(f"trained for 1 step, not for {num_steps}")
        return torch.tensor([self.schedule.terminal_t], dtype=torch.float64)

    @property
    def step_counts(self) -> tuple[int, ...]:
        """One."""
        return (1,)


def relative_error(values: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute error over the mean absolute target, (); 1 for values that are all zero."""
    return (values - targets).abs().mean() / targets.abs().mean().clamp(min=1e-6)
