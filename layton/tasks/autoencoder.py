"""Trains the autoencoder of the latent diffusion model: an ordinary `diffusers.AutoencoderKL`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from layton.data.types import ImageBatch
from layton.ldm.autoencoder import Autoencoder, standardise_latents
from layton.losses.perceptual import PictureDistance
from layton.losses.reconstruction import psnr
from layton.tasks.base import LaytonTask, LRSchedulerCallable, OptimizerCallable

_LATEST = 0.01  # share of a batch in the latents' moments


class AutoencoderTask(LaytonTask):
    """Pixel and perceptual reconstruction with a small Kullback-Leibler term (arXiv 2112.10752, section 3.1).

    The autoencoder is convolutional, so it trains on crops. `export` makes every latent channel zero-mean and
    unit-variance over the latest training images by folding the affine map into the 1x1 convolutions around the latent.

    Args:
        autoencoder: The model.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule.
        perceptual: Perceptual loss, the own one or LPIPS or DISTS (`layton.losses`); None trains on pixels alone.
        l1_weight: Weight of the mean absolute error.
        l2_weight: Weight of the mean squared error.
        perceptual_weight: Weight of the perceptual term.
        kl_weight: Weight of the divergence from N(0, I), per latent number.
        decoder_only: Keep the encoder as it is: latents that are cached, and models trained on them, stay valid.
    """

    latent_batches: Tensor
    latent_moments: Tensor

    def __init__(
        self,
        autoencoder: Autoencoder,
        *,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        perceptual: PictureDistance | None = None,
        l1_weight: float = 1.0,
        l2_weight: float = 1.0,
        perceptual_weight: float = 0.1,
        kl_weight: float = 1e-4,
        decoder_only: bool = False,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.autoencoder = autoencoder
        self.decoder_only = decoder_only
        if decoder_only:
            for part in (autoencoder.model.encoder, autoencoder.model.quant_conv):
                if part is not None:  # SD3's and FLUX's have no second one
                    part.requires_grad_(False)
        self.perceptual = perceptual
        self.weights = {"l1": l1_weight, "l2": l2_weight, "kl": kl_weight}
        if perceptual is not None:
            self.weights["perceptual"] = perceptual_weight
        channels = autoencoder.latent_channels
        # Of about the last hundred batches, of the first ones all: their number, and the channels' mean and mean square
        self.register_buffer("latent_batches", torch.zeros(()))
        self.register_buffer("latent_moments", torch.zeros(2, channels))

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Loss of one batch, ()."""
        images = batch["image"]
        posterior = self.autoencoder.model.encode(images).latent_dist
        self._remember(posterior.mean)
        noise = torch.randn(
            posterior.mean.shape, generator=self.step_generator("latent"), device=images.device, dtype=torch.float32
        )
        latents = posterior.mean + posterior.std * noise.to(posterior.std.dtype)
        decoded = self.autoencoder.model.decode(latents).sample.float()
        return self._losses(images, decoded, posterior.kl().mean() / latents[0].numel())

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Loss with the latent's mean, ()."""
        images = batch["image"]
        posterior = self.autoencoder.model.encode(images).latent_dist
        decoded = self.autoencoder.model.decode(posterior.mean).sample.float()
        return self._losses(images, decoded, posterior.kl().mean() / posterior.mean[0].numel())

    def _losses(self, images: Tensor, decoded: Tensor, kl: Tensor) -> Tensor:
        error = decoded - images
        terms = {"l1": error.abs().mean(), "l2": error.square().mean(), "kl": kl}
        if self.perceptual is not None:
            generator = self.step_generator("perceptual") if self.stage == "train" else None
            terms["perceptual"] = self.perceptual(decoded, images, generator=generator)
        self.log_measure("psnr", psnr(decoded.detach(), images), prog_bar=True)
        return self.log_losses(terms, weights=self.weights, batch_size=len(images))

    def picture_grid(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Originals over reconstructions, eight of each."""
        images = batch["image"][:8]
        return {"image": images, "reconstruction": self.autoencoder.reconstruct(images)}

    @torch.no_grad()
    def _remember(self, latents: Tensor) -> None:
        found = torch.stack([latents.float().mean((0, 2, 3)), latents.float().square().mean((0, 2, 3))])
        self.latent_batches += 1
        self.latent_moments.lerp_(found, max(1 / float(self.latent_batches), _LATEST))

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Write a diffusers ``AutoencoderKL`` folder; latents are standardised if they changed."""
        model = self.autoencoder.model
        if not self.decoder_only:
            mean, square = self.latent_moments
            model = standardise_latents(model, mean, (square - mean.square()).clamp(min=0).sqrt())
        model.save_pretrained(folder)
