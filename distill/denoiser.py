"""The denoiser interface: everything a distillation method or a sampler knows about a network.

A denoiser maps ``(x_t, t, condition)`` to a raw prediction whose kind it declares; ``predict`` reads that prediction as
``x_0`` and ``eps`` whatever the kind. Text-to-image UNets, flow transformers, token-conditioned decoders and the exact
toy models all look the same from here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.condition import Condition
from distill.parameterization import (
    PREDICTION_TYPES,
    Coefficients,
    PredictionType,
    change_schedule,
    eps_to_x0,
    flow_from_pair,
    flow_to_eps,
    flow_to_x0,
    like,
    v_from_pair,
    v_to_eps,
    v_to_x0,
    x0_to_eps,
)
from distill.schedules import NoiseSchedule, as_times

__all__ = ["Condition", "Denoiser", "GuidedDenoiser", "Prediction", "RescheduledDenoiser", "read_prediction"]


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What a denoiser says about a noisy state, in the two forms solvers need."""

    x_0: Tensor  # (B, C, h, w) clean estimate
    eps: Tensor  # (B, C, h, w) noise estimate

    @property
    def flow(self) -> Tensor:
        """Flow velocity ``u = eps - x_0`` (B, C, h, w)."""
        return flow_from_pair(self.x_0, self.eps)

    def v(self, coef: Coefficients) -> Tensor:
        """``alpha eps - sigma x_0`` (B, C, h, w)."""
        return v_from_pair(self.x_0, self.eps, coef)

    def map(self, function: Callable[[Tensor], Tensor]) -> Prediction:
        """Apply a function to both tensors, for instance ``Tensor.detach``."""
        return Prediction(function(self.x_0), function(self.eps))


def read_prediction(output: Tensor, x_t: Tensor, coef: Coefficients, prediction_type: PredictionType) -> Prediction:
    """Read a raw network output of the given kind as ``x_0`` and ``eps``; all tensors (B, C, h, w).

    Both come in ``x_t``'s dtype, at least float32, also when the network computes in half precision.
    """
    output = output.to(torch.promote_types(x_t.dtype, torch.float32))
    if prediction_type == "eps":
        return Prediction(eps_to_x0(x_t, output, coef), output)
    if prediction_type == "x0":
        return Prediction(output, x0_to_eps(x_t, output, coef))
    if prediction_type == "v":
        return Prediction(v_to_x0(x_t, output, coef), v_to_eps(x_t, output, coef))
    return Prediction(flow_to_x0(x_t, output, coef), flow_to_eps(x_t, output, coef))


class Denoiser(nn.Module, ABC):
    """A network together with the schedule it was trained on and the kind of its prediction.

    Args:
        schedule: Maps the times it is asked about to noise levels.
        prediction_type: Kind of ``forward``'s result.

    Raises:
        ValueError: Unknown prediction type.
    """

    schedule: NoiseSchedule
    prediction_type: PredictionType

    def __init__(self, schedule: NoiseSchedule, prediction_type: PredictionType) -> None:
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {prediction_type!r}")
        self.schedule = schedule
        self.prediction_type = prediction_type

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Raw prediction.

        Args:
            x_t: (B, C, h, w) noisy state.
            t: (B,) times on the schedule's clock, integer or real.
            condition: What to condition on; the empty ``Condition()`` for unconditional networks.

        Returns:
            (B, C, h, w), of kind ``prediction_type``.
        """

    def predict(self, x_t: Tensor, t: Tensor | float, condition: Condition) -> Prediction:
        """The prediction read as ``x_0`` and ``eps``.

        Half-precision states are read in float32 (see ``parameterization.like``).

        Args:
            x_t: (B, C, h, w) noisy state.
            t: (B,), () or a number.
            condition: See ``forward``.
        """
        t = as_times(t, x_t.device).expand(x_t.shape[0])
        output: Tensor = self(x_t, t, condition)
        return read_prediction(output, x_t, self.schedule.coefficients(t), self.prediction_type)

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """What ``forward`` should return at ``alpha_t x_0 + sigma_t eps``: the regression target of plain training.

        Args:
            x_0: (B, C, h, w) clean latents.
            eps: (B, C, h, w) noise.
            t: (B,), () or a number.
        """
        if self.prediction_type == "eps":
            return eps
        if self.prediction_type == "x0":
            return x_0
        if self.prediction_type == "v":
            return v_from_pair(x_0, eps, self.schedule.coefficients(as_times(t, x_0.device)))
        return flow_from_pair(x_0, eps)


class GuidedDenoiser(Denoiser):
    """Classifier-free guidance (arXiv 2207.12598): ``eps_null + w (eps_condition - eps_null)``, one doubled batch.

    The weights of the combination sum to one and all kinds of prediction are affine in one another at a given ``x_t``,
    so the raw outputs are combined, whatever their kind.

    **Two conventions of w.** Here, in Imagen, diffusers and InstaFlow, ``w = 1`` is the plain conditional model, and a
    number ``w <= 1`` skips the null pass, as diffusers does. The LCM papers write ``(1 + w) eps_c - w eps_null``
    (arXiv 2310.04378, eq. 13): their ``w`` is ours minus one. Some scripts draw w as if it were the first and apply the
    second. ``from_lcm_weight`` converts.

    Args:
        denoiser: The conditional network.
        guidance_scale: w, a number or (B,) tensor; a tensor always evaluates both halves.
        null: The null (or negative) condition, of batch size 1 or B. Its fields that are ``None`` are taken from the
            condition at hand (sizes, spatial maps), so only what differs needs to be given.

    Raises:
        ValueError: ``null`` is empty: there would be nothing to guide away from.
    """

    def __init__(self, denoiser: Denoiser, guidance_scale: float | Tensor, null: Condition) -> None:
        super().__init__(denoiser.schedule, denoiser.prediction_type)
        if null.is_empty:
            raise ValueError("guidance needs a null condition with at least one field set")
        self.denoiser = denoiser
        self.guidance_scale = guidance_scale
        self.null = null

    @staticmethod
    def from_lcm_weight(weight: float | Tensor) -> float | Tensor:
        """The guidance scale of this class for a weight in the LCM convention: one more."""
        return weight + 1.0

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Guided raw prediction, shapes as in ``Denoiser.forward``."""
        scale = self.guidance_scale
        if not isinstance(scale, Tensor) and scale <= 1.0:
            plain: Tensor = self.denoiser(x_t, t, condition)
            return plain
        null = self.null.to(device=x_t.device).filled_from(condition).expand(x_t.shape[0])
        both: Tensor = self.denoiser(
            torch.cat([x_t, x_t]), torch.cat([t, t]), Condition.cat([null, condition.expand(x_t.shape[0])])
        )
        output_null, output = both.chunk(2)
        weight = like(scale, output) if isinstance(scale, Tensor) else scale
        return output_null + weight * (output - output_null)


class RescheduledDenoiser(Denoiser):
    """A denoiser seen on another schedule, exactly: states rescaled and times carried over at equal ``lambda``.

    With a ``FlowSchedule`` and ``prediction_type="flow"`` it shows Stable Diffusion as the velocity field of a
    rectified flow (InstaFlow's 1-flow, arXiv 2309.06380), which makes warm starts and straightness measurements exact.
    Where the inner schedule ends before the outer one (SD: lambda 14.6, flow time s = 0.064), the inner network is
    asked at its own noisiest time.

    Args:
        denoiser: The network on its own schedule.
        schedule: The schedule to show.
        prediction_type: The kind of prediction to show; by default the inner one's.
    """

    def __init__(
        self, denoiser: Denoiser, schedule: NoiseSchedule, prediction_type: PredictionType | None = None
    ) -> None:
        super().__init__(schedule, prediction_type or denoiser.prediction_type)
        self.denoiser = denoiser

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Raw prediction on the outer schedule, shapes as in ``Denoiser.forward``."""
        inner_t = self.denoiser.schedule.t_from_lambda(self.schedule.lambda_t(t))
        outer, inner = self.schedule.coefficients(t), self.denoiser.schedule.coefficients(inner_t)
        prediction = self.denoiser.predict(change_schedule(x_t, outer, inner), inner_t, condition)
        if self.prediction_type == "eps":
            return prediction.eps
        if self.prediction_type == "x0":
            return prediction.x_0
        return prediction.v(outer) if self.prediction_type == "v" else prediction.flow
