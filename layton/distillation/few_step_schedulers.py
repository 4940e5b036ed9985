"""diffusers schedulers that know the inference times of one distilled student and refuse any others.

They are what `layton.distillation.distilled.load_distilled` puts into a pipeline, so that
``pipeline(..., num_inference_steps=4)`` evaluates the network exactly where it was trained to be evaluated. Their
configuration carries the times. diffusers loads a pipeline that was saved with one where this module has been imported
before; elsewhere their plain base classes take the same configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, LCMScheduler, TCDScheduler
from diffusers import SchedulerMixin as SchedulerMixin  # pipelines with a class of this module look for it here
from diffusers.schedulers.scheduling_tcd import TCDSchedulerOutput

from distill.few_step import FewStepSampling

TIMES = "few_step_times"  # key of the configuration: one list of times for each number of steps
NO_BOUNDARY = 1e6  # timestep_scaling at which LCMScheduler's c_skip is 0 and its c_out 1 in float32


def times_in(config: Mapping[str, Any], num_steps: int | None, given: Sequence[float] | None) -> list[float]:
    """The times to use, from a scheduler's configuration.

    Args:
        config: Of one of this module's schedulers.
        num_steps: Number of steps asked for.
        given: Times asked for instead.

    Raises:
        ValueError: The student was not trained for them.
    """
    rows = FewStepSampling(times=tuple(tuple(float(t) for t in row) for row in config[TIMES]))
    row = list(rows.times_for(len(given) if given is not None else int(num_steps or 0)))
    if given is not None and [float(t) for t in given] != row:
        raise ValueError(f"this student was trained for the times {row}, not for {list(given)}")
    return row


class _TrainedTimes:
    """For schedulers of networks on a table of whole times; goes before diffusers' class."""

    config: Any

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        original_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Set the trained times for a number of steps.

        Raises:
            ValueError: The student was not trained for this number of steps, or these times.
        """
        times = [int(t) for t in times_in(self.config, num_inference_steps, timesteps)]
        cast(Any, super()).set_timesteps(device=device, timesteps=times, strength=strength)


class FewStepLCMScheduler(_TrainedTimes, LCMScheduler):
    """Multistep consistency sampling at the trained times."""


class FewStepTCDScheduler(_TrainedTimes, TCDScheduler):
    """Strategic stochastic sampling at the trained times; as in diffusers it ends at time 0."""


class FewStepDDIMScheduler(_TrainedTimes, TCDScheduler):
    """Deterministic DDIM at the trained times, down to the clean end: the last prediction of ``x_0`` is the result.

    TCD with ``eta = 0`` but for its last step, which would keep the noise of time 0.
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> TCDSchedulerOutput | tuple[Any, ...]:
        """One step; ``eta`` has no influence."""
        last = int(timestep) == int(cast(Any, self).timesteps[-1])
        found = super().step(model_output, timestep, sample, eta=0.0, generator=generator)
        if last:
            alpha_squared = self.alphas_cumprod[int(timestep)].to(sample)
            alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
            kind = self.config.prediction_type
            clean = {
                "epsilon": lambda: (sample - sigma * model_output) / alpha,
                "v_prediction": lambda: alpha * sample - sigma * model_output,
                "sample": lambda: model_output,
            }[kind]()
            found = TCDSchedulerOutput(prev_sample=clean, pred_noised_sample=clean)
        return found if return_dict else (found.prev_sample, found.pred_noised_sample)


class _ForUNets:
    """What Stable Diffusion's pipelines, made for other schedulers, ask of a flow's; goes before diffusers' class.

    Attributes:
        init_noise_sigma: What they multiply their noise by.
    """

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        """The sample itself: flow networks see states as they are."""
        return sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Clean samples at times of the schedule: ``(1 - sigma) x_0 + sigma noise``; for image-to-image and inpainting.

        Args:
            original_samples: (B, C, h, w) clean latents.
            noise: (B, C, h, w).
            timesteps: (B,) or (1,), of those that were set.
        """
        sigma = timesteps.to(original_samples) / float(cast(Any, self).config.num_train_timesteps)
        sigma = sigma.reshape(-1, *([1] * (original_samples.ndim - 1)))
        return (1.0 - sigma) * original_samples + sigma * noise


class FlowMatchUNetScheduler(_ForUNets, FlowMatchEulerDiscreteScheduler):
    """For UNets that became flows: diffusers' own with InstaFlow's times."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Even steps from pure noise, ``1 - i / N``, as InstaFlow takes them, where nothing else is asked for."""
        if sigmas is None and timesteps is None and num_inference_steps is not None:
            sigmas = [1.0 - i / num_inference_steps for i in range(num_inference_steps)]
        super().set_timesteps(device=device, sigmas=sigmas, mu=mu, timesteps=timesteps)


class _TrainedFlowTimes(_ForUNets):
    """For schedulers of flow networks; goes before diffusers' class."""

    config: Any

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Set the trained times; of ``sigmas``, which pipelines make up by themselves, only the number counts.

        Raises:
            ValueError: The student was not trained for this number of steps, or these times.
        """
        steps = num_inference_steps if sigmas is None else len(sigmas)
        times = times_in(self.config, steps, timesteps)
        sigmas = [t / self.config.num_train_timesteps for t in times]
        cast(Any, super()).set_timesteps(device=device, sigmas=sigmas)


class FewStepFlowLCMScheduler(_TrainedFlowTimes, FlowMatchLCMScheduler):
    """Multistep consistency sampling of a flow network at the trained times.

    diffusers' SD3 and FLUX pipelines hand the scheduler no generator: its noise is that of torch's global one, unless
    ``noise_generators`` are set before a call, one for each image.
    """

    noise_generators: list[torch.Generator] | None = None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As diffusers', with the generators that were set where none is given."""
        chosen = self.noise_generators if generator is None else generator
        return super().step(model_output, timestep, sample, generator=cast(Any, chosen), return_dict=return_dict)


class FewStepFlowEulerScheduler(_TrainedFlowTimes, FlowMatchEulerDiscreteScheduler):
    """Deterministic sampling of a flow network at the trained times."""


FewStepScheduler = (
    FewStepLCMScheduler
    | FewStepTCDScheduler
    | FewStepDDIMScheduler
    | FewStepFlowLCMScheduler
    | FewStepFlowEulerScheduler
)


def few_step_scheduler(sampling: FewStepSampling, config: Mapping[str, Any]) -> FewStepScheduler:
    """The scheduler that samples in a diffusers pipeline as ``sampling`` says.

    Args:
        sampling: Record of the student.
        config: Configuration of the pipeline's scheduler, which gives the noise schedule.

    Raises:
        ValueError: diffusers has no scheduler for this kind of sampling, or needs whole times and they are not.
    """
    times = [list(steps) for steps in sampling.times]
    if sampling.prediction == "flow":
        return _flow_scheduler(sampling, config, times)
    if any(t != int(t) for steps in times for t in steps):
        raise ValueError(f"diffusers' schedulers need whole times, got {times}")
    shared = {key: config[key] for key in _NOISE_KEYS if key in config}
    shared["prediction_type"] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[sampling.prediction]
    # With the original grid being all times, none of ours is off it.
    shared |= {"original_inference_steps": shared.get("num_train_timesteps", 1000), "clip_sample": False}
    scheduler: FewStepScheduler
    if sampling.kind == "renoise":
        scaling = 10.0 if sampling.boundary == "lcm" else NO_BOUNDARY
        scheduler = FewStepLCMScheduler.from_config({**shared, "timestep_scaling": scaling})
    else:
        scheduler = (FewStepTCDScheduler if sampling.kind == "tcd" else FewStepDDIMScheduler).from_config(shared)
    scheduler.register_to_config(**{TIMES: times})
    return scheduler


_NOISE_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "rescale_betas_zero_snr", "set_alpha_to_one", "steps_offset",
)  # fmt: skip


def _flow_scheduler(
    sampling: FewStepSampling, config: Mapping[str, Any], times: list[list[float]]
) -> FewStepFlowLCMScheduler | FewStepFlowEulerScheduler:
    if sampling.kind == "tcd" or sampling.boundary != "none":
        raise ValueError(f"diffusers has no flow scheduler for kind {sampling.kind!r}, boundary {sampling.boundary!r}")
    # The times are the network's own: no shift is to be put on them.
    shared = {"num_train_timesteps": config.get("num_train_timesteps", 1000), "shift": 1.0}
    build = FewStepFlowLCMScheduler if sampling.kind == "renoise" else FewStepFlowEulerScheduler
    scheduler: FewStepFlowLCMScheduler | FewStepFlowEulerScheduler = build.from_config(shared)
    scheduler.register_to_config(**{TIMES: times})
    return scheduler
