"""Text-conditioned reflow: straightening a teacher's trajectories (InstaFlow, arXiv 2309.06380, eq. 5).

``v_{k+1} = argmin E int_0^1 |(X_1 - X_0) - v(X_s, s)|^2 ds`` with ``X_1 = ODE[v_k](X_0)`` and
``X_s = (1 - s) X_0 + s X_1``. The teacher is any denoiser: Stable Diffusion is the 1-flow, a reflowed student the
2-flow whose pairs give the 3-flow, and so on; k is the number of runs.

Two ways to read a student that is no flow:

* ``exact``: the network keeps its prediction (eps or v) and its schedule, and is asked at the state and time of equal
  noise-to-signal ratio. Training starts from the teacher's own field and the result still is an ordinary diffusers
  model, for which DDIM is Euler's method on the flow.
* ``reinterpret``: as the paper: the network is given ``X_s`` and the clock ``1000 (1 - s)`` and learns to put out a
  velocity, whatever it put out before. This is what the released InstaFlow pipelines sample.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.method import DistillationMethod, DistillBatch, MethodOutput, Networks
from distill.methods.pairs import DEFAULT_SOLVER, Pair, TeacherSolver, pair_of
from distill.parameterization import like
from distill.schedules import FlowSchedule, NoiseSchedule, VPSchedule, as_times
from distill.timesteps import uniform_flow_times

Reading = Literal["exact", "reinterpret"]


class VelocityDenoiser(Denoiser):
    """A network whose raw output is taken for a flow velocity on the clock 0..1000, with no input scaling.

    Args:
        denoiser: The network; its own schedule and prediction type are ignored.
        toward_image: The sign of the output: ``dZ/ds = X_1 - X_0`` as the released InstaFlow models have it, or
            ``eps - x_0`` as SD3 and FLUX.
        schedule: The clock.
    """

    def __init__(self, denoiser: Denoiser, *, toward_image: bool = True, schedule: FlowSchedule | None = None) -> None:
        super().__init__(schedule or FlowSchedule(), "flow")
        self.denoiser = denoiser
        self.toward_image = toward_image

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """``eps - x_0`` (B, C, h, w); see ``Denoiser.forward``."""
        output: Tensor = self.denoiser(x_t, t, condition)
        return -output if self.toward_image else output


def read_as(denoiser: Denoiser, reading: Reading, *, toward_image: bool = True) -> Denoiser:
    """The denoiser that a student is trained and sampled as; a flow is itself whatever the reading."""
    if reading == "reinterpret" and not isinstance(denoiser.schedule, FlowSchedule):
        return VelocityDenoiser(denoiser, toward_image=toward_image)
    return denoiser


def clock_of(schedule: NoiseSchedule, reading: Reading) -> NoiseSchedule:
    """The schedule on which `read_as` shows a student of the given schedule."""
    return FlowSchedule() if reading == "reinterpret" and not isinstance(schedule, FlowSchedule) else schedule


class Reflow(DistillationMethod):
    """Reflow on pairs of the batch, or on pairs that the teacher makes on the fly.

    The loss is the mean square of the velocity error. In the exact reading the error of an eps-network weighs
    ``(1 + lambda)^2`` in it, up to 240 at Stable Diffusion's noisy end; ``space="network"`` takes the error of the
    network's own output instead, which trains more evenly from such a start and has the same minimum.

    Args:
        solver: How pairs are made where the batch has none, and the guidance of the field that is straightened. The
            student learns the guided field: sample it without guidance (or with little, see the paper's 1.5).
        reading: See the module.
        toward_image: Sign of the output in the reading ``reinterpret``.
        space: Where the error is taken: ``velocity`` (the paper) or ``network`` (the student's own prediction).
        eps: Smallest flow time s that is trained (the official CIFAR code has 1e-3; the paper 0).
        time_samples: Times drawn for every pair, each an evaluation of the student; pairs made on the fly are dear.
        step_counts: Numbers of steps that the student is meant for.
        schedule: The student's own schedule for `inference_times`, default Stable Diffusion's; set from the student
            at the first batch.

    Raises:
        ValueError: An unknown reading or space, ``eps`` outside [0, 1), or fewer than one time sample.
    """

    needs_latents = False
    sampling = "ddim"

    def __init__(
        self,
        *,
        solver: TeacherSolver = DEFAULT_SOLVER,
        reading: Reading = "exact",
        toward_image: bool = True,
        space: Literal["velocity", "network"] = "velocity",
        eps: float = 1e-3,
        time_samples: int = 1,
        step_counts: tuple[int, ...] = (1, 2, 4, 8, 25),
        schedule: NoiseSchedule | None = None,
    ) -> None:
        super().__init__()
        if reading not in get_args(Reading) or space not in ("velocity", "network"):
            raise ValueError(f"unknown reading {reading!r} or space {space!r}")
        if not 0 <= eps < 1:
            raise ValueError(f"eps must lie in [0, 1), got {eps}")
        if time_samples < 1:
            raise ValueError(f"time_samples must be >= 1, got {time_samples}")
        self.solver = solver
        self.reading: Reading = reading
        self.toward_image = toward_image
        self.space = space
        self.eps = eps
        self.time_samples = time_samples
        self.needs_null = solver.is_guided
        self._step_counts = tuple(step_counts)
        self.schedule: NoiseSchedule = schedule or VPSchedule()

    def losses(self, networks: Networks, batch: DistillBatch, *, step: int, generator: torch.Generator) -> MethodOutput:
        """The term ``reflow``; see ``DistillationMethod.losses``."""
        student = read_as(networks.student, self.reading, toward_image=self.toward_image)
        self.schedule = networks.student.schedule
        pair = pair_of(batch, networks.teacher, self.solver, generator)
        terms = [self._velocity_loss(student, pair, batch.condition, generator) for _ in range(self.time_samples)]
        return MethodOutput({"reflow": torch.stack(terms).mean()})

    def _velocity_loss(self, student: Denoiser, pair: Pair, condition: Condition, generator: torch.Generator) -> Tensor:
        s = flow_times(len(pair.x_0), generator, eps=self.eps)
        x_t, t = interpolate(student.schedule, pair, s)
        prediction = student.predict(x_t, t, condition)
        # the noise that leads to x_0 from this very state: X_0, but at the noisy end of a schedule that has signal left
        coef = student.schedule.coefficients(t)
        alpha, sigma = like(coef.alpha, x_t), like(coef.sigma, x_t)
        eps = torch.where(sigma > 0, (x_t - alpha * pair.x_0) / sigma.clamp(min=1e-12), pair.noise)
        error = prediction.flow - (eps - pair.x_0)
        if self.space == "network":
            error = error * like(_gain(student, t), error)
        return error.square().mean()

    def inference_times(self, num_steps: int) -> Tensor:
        """Uniform in flow time; on a VP clock rounded to whole times, so that diffusers' schedulers can follow."""
        if num_steps not in self._step_counts:
            raise ValueError(f"trained for {self._step_counts} steps, not for {num_steps}")
        return uniform_flow_times(clock_of(self.schedule, self.reading), num_steps)

    @property
    def step_counts(self) -> tuple[int, ...]:
        """See the constructor."""
        return self._step_counts


def flow_times(batch_size: int, generator: torch.Generator, *, eps: float = 1e-3) -> Tensor:
    """Flow times s (B,) float64, uniform in [eps, 1) and stratified: one in each of B equal parts, in random order."""
    place = generator.device
    order = torch.randperm(batch_size, generator=generator, device=place)
    within = torch.rand(batch_size, generator=generator, device=place, dtype=torch.float64)
    return eps + (1.0 - eps) * (order + within) / batch_size


def interpolate(schedule: NoiseSchedule, pair: Pair, s: Tensor) -> tuple[Tensor, Tensor]:
    """State and network time at flow time s on the straight line of a pair, on any schedule.

    On another schedule than a flow the state is rescaled to equal noise-to-signal ratio. Flow times below such a
    schedule's noisiest one are trained at that one, with pure noise for a state: what sampling starts from.

    Args:
        schedule: The student's.
        pair: Ends of the line, (B, C, h, w).
        s: (B,) in [0, 1], 0 noise.

    Returns:
        State (B, C, h, w) and times (B,) float64.
    """
    s = as_times(s, pair.x_0.device)
    lam = (1.0 - s) / s
    t = schedule.t_from_lambda(lam)
    x_t = schedule.add_noise(pair.x_0, pair.noise, t)
    if isinstance(schedule, FlowSchedule):
        return x_t, t
    beyond = like((t >= schedule.terminal_t).to(torch.float32), x_t)
    return torch.where(beyond > 0, pair.noise, x_t), t


def _gain(student: Denoiser, t: Tensor) -> Tensor:
    """Error of the network's output for one unit of velocity error, (B,).

    At a given state ``d x_0 = -(sigma / alpha) d eps``, so ``d flow = d eps (alpha + sigma) / alpha``; alike for v and
    x_0.
    """
    coef = student.schedule.coefficients(t)
    alpha, sigma = coef.alpha, coef.sigma
    if student.prediction_type == "flow":
        return torch.ones_like(alpha)
    if student.prediction_type == "eps":
        return alpha / (alpha + sigma)
    if student.prediction_type == "x0":
        return sigma / (alpha + sigma)
    return (alpha**2 + sigma**2) / (alpha + sigma)
