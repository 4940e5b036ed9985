"""The decoder of stage 1: a diffusion model steered by codes, as it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor

from distill.denoiser import Condition
from distill.samplers import dpmpp_2m, sample
from distill.timesteps import timesteps
from layton.decoders.latent import SAMPLING_FOLDER, LatentDecoder, read_network
from layton.folder import JsonValue, class_name, load_config, save_config
from layton.interface import Generators


class DiffusionDecoder(LatentDecoder):
    """Plain LADD: a diffusion model conditioned on codes, sampled in any number of steps, then the VAE decoder.

    Times are spaced from pure noise (``trailing``), the solver is second order (DPM-Solver++ 2M, arXiv 2211.01095).
    Arguments are `LatentDecoder`'s.
    """

    __module__ = "layton.decoders"  # what files say
    default_steps = 25

    def sample(self, x_T: Tensor, embeddings: Tensor, *, num_steps: int, generator: Generators) -> Tensor:
        """Solve the probability flow; no noise is drawn on the way."""
        times = timesteps(self.network.schedule, num_steps, "trailing").to(embeddings.device)
        return sample(self.network, x_T, times, Condition(spatial=embeddings), solver=dpmpp_2m)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the control branch and how it is sampled; UNet and autoencoder belong to the latent diffusion model."""
        self.network.save_pretrained(folder, dtype=dtype)
        sampling: dict[str, JsonValue] = {
            "class": class_name(DiffusionDecoder),
            "latents_per_token": self.latents_per_token,
        }
        save_config(Path(folder) / SAMPLING_FOLDER, sampling)

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
        return cls(network, autoencoder, latents_per_token=cast(int, sampling["latents_per_token"])).eval()
