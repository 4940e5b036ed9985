"""Code decoders of the tokenizer itself: `LightDecoder` (stage 0) and `DiffusionDecoder` (stage 1)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self, cast

import torch
from torch import Tensor

from distill.denoiser import Condition
from distill.noise import gaussian_like
from distill.samplers import dpmpp_2m, sample
from distill.timesteps import timesteps
from layton.folder import JsonValue, class_name, load_config, save_config
from layton.interface import CodeDecoder, Generators, default_generators
from layton.ladd import LADD
from layton.ldm.autoencoder import Autoencoder
from layton.pixel_decoder import PixelDecoder

SAMPLING_FOLDER = "sampling"


class LightDecoder(CodeDecoder):
    """Pixels in one pass, without a diffusion model: quick, and without any detail that codes do not hold.

    Args:
        network: The decoder that stage 0 trained.
    """

    needs_ldm: ClassVar[bool] = False
    steps = (1,)

    def __init__(self, network: PixelDecoder) -> None:
        super().__init__()
        self.network = network

    def decode(
        self,
        embeddings: Tensor,
        *,
        num_steps: int | None = None,
        conditioning_scale: float | None = None,
        generator: Generators | None = None,
    ) -> Tensor:
        """See `CodeDecoder.decode`; noise and scale play no part.

        Raises:
            ValueError: If a scale or more than one step is asked for.
        """
        self.check_steps(num_steps)
        if conditioning_scale is not None:
            raise ValueError(f"the light decoder has no conditioning scale, got {conditioning_scale}")
        return self.network(embeddings).float().clamp(-1, 1)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the network."""
        self.network.save_pretrained(folder, dtype=dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, ldm: str | Path | None = None) -> Self:
        """Read it; ``ldm`` is not needed."""
        return cls(PixelDecoder.from_pretrained(folder))


class DiffusionDecoder(CodeDecoder):
    """Plain LADD: a diffusion model conditioned on codes, sampled in any number of steps, then the VAE decoder.

    Times are spaced from pure noise (``trailing``), the solver is second order (DPM-Solver++ 2M, arXiv 2211.01095).

    Args:
        network: The conditioned denoiser.
        autoencoder: Latents to pixels.
        latents_per_token: Latent positions per token along one side: 8 for 16x16 tokens on SDXL's 128x128 latents at
            1024 pixels, 1 when both grids are 16x16.
    """

    default_steps = 25

    def __init__(self, network: LADD, autoencoder: Autoencoder, *, latents_per_token: int = 1) -> None:
        super().__init__()
        self.network = network
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.latents_per_token = latents_per_token

    def decode(
        self,
        embeddings: Tensor,
        *,
        num_steps: int | None = None,
        conditioning_scale: float | None = None,
        generator: Generators | None = None,
    ) -> Tensor:
        """See `CodeDecoder.decode`."""
        latents = self.decode_latents(
            embeddings, num_steps=num_steps, conditioning_scale=conditioning_scale, generator=generator
        )
        return self.autoencoder.decode(latents).float().clamp(-1, 1)

    def decode_latents(
        self,
        embeddings: Tensor,
        *,
        num_steps: int | None = None,
        conditioning_scale: float | None = None,
        generator: Generators | None = None,
    ) -> Tensor:
        """Code embeddings (B, d, h, w) -> scaled latents (B, C, h', w')."""
        steps = self.check_steps(num_steps)
        times = timesteps(self.network.schedule, steps, "trailing").to(embeddings.device)
        x_T = self.initial_noise(embeddings, generator)
        previous = self.network.conditioning_scale
        try:
            if conditioning_scale is not None:
                self.network.conditioning_scale = conditioning_scale
            return sample(self.network, x_T, times, Condition(spatial=embeddings), solver=dpmpp_2m)
        finally:
            self.network.conditioning_scale = previous

    def initial_noise(self, embeddings: Tensor, generator: Generators | None) -> Tensor:
        """Noise (B, C, h', w') on the latent grid that belongs to code embeddings (B, d, h, w)."""
        batch, _, h, w = embeddings.shape
        grid = (h * self.latents_per_token, w * self.latents_per_token)
        empty = embeddings.new_empty(batch, self.autoencoder.latent_channels, *grid)
        return gaussian_like(empty, generator if generator is not None else default_generators(batch))

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
        if ldm is None:
            raise ValueError(f"{folder}: a diffusion decoder needs the latent diffusion model it was trained on")
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel.from_pretrained(Path(ldm) / "unet", local_files_only=True).float()
        autoencoder = Autoencoder.from_pretrained(Path(ldm) / "vae")
        network = LADD.from_pretrained(folder, unet=unet)
        sampling = load_config(Path(folder) / SAMPLING_FOLDER, expected_class=class_name(DiffusionDecoder))
        return cls(network, autoencoder, latents_per_token=cast(int, sampling["latents_per_token"]))
