"""The decoder of stage 1: a diffusion model steered by codes, as it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor

from distill.denoiser import Condition
from distill.samplers import dpmpp_2m, sample
from distill.schedules import FlowSchedule
from distill.timesteps import timesteps
from layton.decoders.latent import SAMPLING_FOLDER, LatentDecoder, read_network
from layton.folder import JsonValue, class_name, load_config, save_config
from layton.interface import Generators
from layton.ladd import LADD
from layton.ldm.autoencoder import Autoencoder


class DiffusionDecoder(LatentDecoder):
    """Plain LADD: a diffusion model conditioned on codes, sampled in any number of steps, then the VAE decoder.

    Times run from pure noise (``trailing``, then shifted); the solver is second order (DPM-Solver++ 2M, arXiv
    2211.01095).

    Args:
        network: As for `LatentDecoder`.
        autoencoder: As for `LatentDecoder`.
        latents_per_token: As for `LatentDecoder`.
        temperature: Factor on the noise that sampling begins with. 1 draws from the model: one of the images that have
            these codes, as far from the original as two of them are from one another. Below 1 it comes closer to their
            middle, and so to the original.
        time_shift: Above 1, more of the steps are taken at noisy times: a share u of all times becomes
            ``s u / (1 + (s - 1) u)`` (arXiv 2403.03206, 5.3.2), as are the times that stage 1 trains at.

    Raises:
        ValueError: ``temperature`` is negative or not finite, ``time_shift`` is below 1, or not 1 on a flow, whose
            schedule has a shift of its own.
    """

    __module__ = "layton.decoders"  # what files say
    default_steps = 25

    def __init__(
        self,
        network: LADD,
        autoencoder: Autoencoder,
        *,
        latents_per_token: float = 1,
        temperature: float = 1.0,
        time_shift: float = 1.0,
    ) -> None:
        super().__init__(network, autoencoder, latents_per_token=latents_per_token)
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be finite and >= 0, got {temperature}")
        if not 1.0 <= time_shift < float("inf"):
            raise ValueError(f"time_shift must be finite and >= 1, got {time_shift}")
        if time_shift != 1.0 and isinstance(network.schedule, FlowSchedule):
            raise ValueError("a flow has a shift of its own: time_shift must be 1")
        self.temperature, self.time_shift = temperature, time_shift

    def sample(self, x_T: Tensor, embeddings: Tensor, *, num_steps: int, generator: Generators) -> Tensor:
        """Solve the probability flow; no noise is drawn on the way."""
        x_T = x_T * self.temperature
        return sample(self.network, x_T, self.times(num_steps), Condition(spatial=embeddings), solver=dpmpp_2m)

    def times(self, num_steps: int) -> Tensor:
        """Times of the evaluations (N,) float64, noisiest first; those of a shift need not be whole."""
        times = timesteps(self.network.schedule, num_steps, "trailing")
        if self.time_shift == 1.0:
            return times
        total = self.network.schedule.num_train_timesteps
        share = (times + 1.0) / total
        return total * self.time_shift * share / (1.0 + (self.time_shift - 1.0) * share) - 1.0

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the control branch and how it is sampled; UNet and autoencoder belong to the latent diffusion model."""
        self.network.save_pretrained(folder, dtype=dtype)
        save_config(Path(folder) / SAMPLING_FOLDER, self.sampling_record())

    def sampling_record(self) -> dict[str, JsonValue]:
        """What ``sampling/config.json`` says; see `CodeDecoder.sampling_record`."""
        return {
            "class": class_name(DiffusionDecoder),
            "latents_per_token": self.latents_per_token,
            "temperature": self.temperature,
            "time_shift": self.time_shift,
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, ldm: str | Path | None = None) -> Self:
        """Read what `save_pretrained` wrote.

        Args:
            folder: The control branch.
            ldm: Folder of the diffusers pipeline (``unet/``, ``vae/``) that it was trained on.

        Raises:
            ValueError: If ``ldm`` is missing or does not fit.
        """
        network, autoencoder = read_network(Path(folder), ldm)
        sampling = load_config(Path(folder) / SAMPLING_FOLDER, expected_class=class_name(DiffusionDecoder))
        return cls(
            network,
            autoencoder,
            latents_per_token=cast(float, sampling["latents_per_token"]),
            # folders of before hold neither
            temperature=cast(float, sampling.get("temperature", 1.0)),
            time_shift=cast(float, sampling.get("time_shift", 1.0)),
        ).eval()
