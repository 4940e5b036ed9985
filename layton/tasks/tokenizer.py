"""Stage 0: trains encoder and codebook from scratch with a light decoder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layton.data.types import ImageBatch
from layton.encoder import ImageEncoder
from layton.losses.adversarial import PatchDiscriminator, hinge_discriminator_loss, hinge_generator_loss
from layton.losses.perceptual import PictureDistance
from layton.losses.reconstruction import psnr
from layton.pixel_decoder import PixelDecoder
from layton.quantizers import Quantizer
from layton.scenes import seed_of_key
from layton.tasks.base import LaytonTask, LRSchedulerCallable, OptimizerCallable
from layton.tasks.manual import ManualTask
from layton.tokenizer import LaytonTokenizer

HEALTH_INTERVAL = 20
DEFAULT_SIZE = 256
_SIZE = "tokenizer_image_size"


class TokenizerTask(LaytonTask):
    """Pixel + perceptual + codebook losses (VQGAN, arXiv 2012.09841; LlamaGen, arXiv 2406.06525, section 2.1).

    With a discriminator, `AdversarialTokenizerTask` adds its loss after a delayed start. The weights
    are this library's; LlamaGen has 1 for squared error and LPIPS each, no absolute error, and 0.5 for the
    discriminator after 20,000 steps.

    Args:
        encoder: Image to features.
        quantizer: Features to codes.
        decoder: Code embeddings to pixels.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule.
        perceptual: Perceptual loss, the own one or LPIPS or DISTS (`layton.losses`); None trains on pixels alone.
        l1_weight: Weight of the mean absolute error.
        l2_weight: Weight of the mean squared error.
        perceptual_weight: Weight of the perceptual term.

    Raises:
        ValueError: If encoder and quantizer disagree about d.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        quantizer: Quantizer,
        decoder: PixelDecoder,
        *,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        perceptual: PictureDistance | None = None,
        l1_weight: float = 1.0,
        l2_weight: float = 1.0,
        perceptual_weight: float = 0.1,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        if encoder.code_dim != quantizer.code_dim:
            raise ValueError(f"encoder gives {encoder.code_dim}-d features, quantizer takes {quantizer.code_dim}-d")
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder
        self.perceptual = perceptual
        self.image_size = DEFAULT_SIZE
        self.weights = {"l1": l1_weight, "l2": l2_weight}
        if perceptual is not None:
            self.weights["perceptual"] = perceptual_weight

    def why_not_sharded(self) -> str | None:
        """Not beside a discriminator."""
        return None if self.automatic_optimization else "model and discriminator take turns within a step"

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor | None:
        """Loss of one batch, ()."""
        self.image_size = batch["image"].shape[-1]
        output = self.quantizer(self.encoder(batch["image"]).float())
        decoded = self.decoder(output.embeddings).float()
        tell_health(self, self.quantizer)
        return self._losses(batch["image"], decoded, output.loss)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Loss of one batch through the codes, ()."""
        decoded = self.reconstruct(batch["image"])
        loss = self._losses(batch["image"], decoded, decoded.new_zeros(()))
        for name, mask in source_masks(batch.get("key", ())).items():
            self.log_measure(f"psnr_{name}", psnr(decoded[mask], batch["image"][mask]))
        return loss

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] through their codes, not clamped."""
        features = self.encoder(images).float()
        embeddings = self.quantizer.codes_to_embeddings(self.quantizer.encode(features), features.shape[-2:])
        return self.decoder(embeddings).float()

    def picture_grid(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Originals over reconstructions."""
        return {"image": batch["image"], "reconstruction": self.reconstruct(batch["image"]).clamp(-1, 1)}

    def export(self, folder: Path) -> None:
        """Write ``encoder/``, ``quantizer/`` and ``decoder/``, together a tokenizer with a light decoder."""
        self.encoder.save_pretrained(folder / "encoder")
        self.quantizer.save_pretrained(folder / "quantizer")
        self.decoder.save_pretrained(folder / "decoder")
        LaytonTokenizer.write_index(folder, self.encoder, self.quantizer, image_size=self.image_size)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the size of the images, which what is exported is used with."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_SIZE] = self.image_size

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        super().on_load_checkpoint(checkpoint)
        self.image_size = checkpoint.get(_SIZE, DEFAULT_SIZE)

    def _losses(self, images: Tensor, decoded: Tensor, codebook_loss: Tensor) -> Tensor:
        error = decoded - images
        terms = {"l1": error.abs().mean(), "l2": error.square().mean(), "codebook": codebook_loss}
        if self.perceptual is not None:
            generator = self.step_generator("perceptual") if self.stage == "train" else None
            terms["perceptual"] = self.perceptual(decoded, images, generator=generator)
        self.log_measure("psnr", psnr(decoded.detach(), images), prog_bar=True)
        return self.log_losses(terms, weights=self.weights, batch_size=len(images))


class AdversarialTokenizerTask(TokenizerTask, ManualTask):
    """Stage 0 with a patch discriminator that joins after a delay (LlamaGen starts it after 20,000 steps).

    The discriminator learns from ``start_step - lead_steps`` on, so that it is not new to its work when its opinion
    begins to count; its weight then rises linearly over ``ramp_steps``.

    Args:
        encoder: Image to features.
        quantizer: Features to codes.
        decoder: Code embeddings to pixels.
        discriminator: Judge of patches.
        optimizer: Makes the optimizer of encoder, codebook and decoder.
        discriminator_optimizer: Makes the discriminator's.
        lr_scheduler: Makes the learning-rate schedule of the former.
        perceptual: Perceptual loss.
        l1_weight: Weight of the mean absolute error.
        l2_weight: Weight of the mean squared error.
        perceptual_weight: Weight of the perceptual term.
        adversarial_weight: Final weight of the adversarial term.
        start_step: First step with an adversarial term.
        lead_steps: Steps by which the discriminator's training leads.
        ramp_steps: Steps over which the weight rises.
        gradient_clip: Largest gradient norm of either optimizer (the trainer's option does not apply here).
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        quantizer: Quantizer,
        decoder: PixelDecoder,
        discriminator: PatchDiscriminator,
        *,
        optimizer: OptimizerCallable,
        discriminator_optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        perceptual: PictureDistance | None = None,
        l1_weight: float = 1.0,
        l2_weight: float = 1.0,
        perceptual_weight: float = 0.1,
        adversarial_weight: float = 0.02,
        start_step: int = 20_000,
        lead_steps: int = 500,
        ramp_steps: int = 1000,
        gradient_clip: float = 1.0,
    ) -> None:
        super().__init__(
            encoder,
            quantizer,
            decoder,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            perceptual=perceptual,
            l1_weight=l1_weight,
            l2_weight=l2_weight,
            perceptual_weight=perceptual_weight,
        )
        self.automatic_optimization = False
        self.discriminator = discriminator
        self._make_critic_optimizer = discriminator_optimizer
        self.adversarial_weight = adversarial_weight
        self.start_step, self.lead_steps, self.ramp_steps = start_step, lead_steps, ramp_steps
        self.gradient_clip = gradient_clip

    def setup(self, stage: str) -> None:
        """Leave Lightning's advice out: checkpoints are meant to hold the weights after the step."""
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")

    def critic_parameters(self) -> list[nn.Parameter]:
        """The discriminator's."""
        return list(self.discriminator.parameters())

    def training_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """One step of either optimizer that is due."""
        generator_optimizer, judge_optimizer = self.all_optimizers()
        images, step = batch["image"], self.global_step
        self.image_size = images.shape[-1]
        output = self.quantizer(self.encoder(images).float())
        decoded = self.decoder(output.embeddings).float()
        tell_health(self, self.quantizer)
        loss = self._losses(images, decoded, output.loss)
        ramp = min(1.0, max(0.0, (step - self.start_step + 1) / max(1, self.ramp_steps)))
        if ramp > 0:
            adversarial = hinge_generator_loss(self.discriminator(decoded).float())
            self.log("train/adversarial", adversarial.detach())  # beside train/loss, which is of all other terms
            loss = loss + self.adversarial_weight * ramp * adversarial
        with self.turn_of(generator_optimizer):
            self.learn(generator_optimizer, loss)
        if step >= self.start_step - self.lead_steps:
            real, fake = self.discriminator(images).float(), self.discriminator(decoded.detach()).float()
            judge_loss = hinge_discriminator_loss(real, fake)
            self.log("train/discriminator", judge_loss.detach())
            with self.turn_of(judge_optimizer):
                self.learn(judge_optimizer, judge_loss, counted=False)


def tell_health(task: LaytonTask, quantizer: Quantizer) -> None:
    """Log, every so many steps, how much of a codebook that learns is in use; it warns where that collapses."""
    if quantizer.training and task.global_step % HEALTH_INTERVAL == 0:
        health = quantizer.health()
        task.log_dict({"train/usage": health.usage, "train/perplexity": health.perplexity})


def source_masks(keys: Sequence[str]) -> dict[str, Tensor]:
    """Which samples of a batch are Scenes and which are photographs, (B,) bool each; empty kinds are left out."""
    scenes = torch.tensor([seed_of_key(key) is not None for key in keys], dtype=torch.bool)
    return {name: mask for name, mask in (("scenes", scenes), ("photos", ~scenes)) if mask.any()}
