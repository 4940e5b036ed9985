"""Stage 1: trains the latent diffusion decoder (LADD) with the diffusion loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.denoiser import Condition
from distill.held import Held
from layton.assets import LDM, LIGHT, resolve
from layton.control import PAPER_CHANNELS, LoraSettings, null_caption
from layton.decoders import DiffusionDecoder
from layton.folder import WEIGHTS_NAME, load_config, load_tensors
from layton.ladd import CLASS_NAME, LADD, require_reader
from layton.ldm.autoencoder import Autoencoder
from layton.ldm.cache import at_code_size, code_size, load_code_parts, require_codes, require_latents
from layton.ldm.unet import use_fast_attention
from layton.losses.reconstruction import psnr
from layton.pixel_decoder import CodeReader
from layton.tasks.base import LaytonTask, LRSchedulerCallable, OptimizerCallable, required
from layton.tasks.text_to_image import draw
from layton.tasks.tokenizer import tell_health
from layton.tokenizer import LaytonTokenizer


class DecoderTask(LaytonTask):
    """``||LADD(z_t, C, t) - target||^2`` with the LDM's own target (Layton, arXiv 2503.08377, section 3, stage 1).

    With ``train_tokenizer`` false, batches hold ``latent`` (B, C, h, w) and ``codes`` (B, N) from a cache; otherwise
    ``image`` (B, 3, H, W), and the encoder learns through the straight-through codes while the codebook goes on
    following its features.

    Args:
        ldm: Diffusers pipeline folder, or the name of an embedded one.
        tokenizer: Folder with ``encoder/`` and ``quantizer/`` (an export of stage 0 or a tokenizer), or ``mini``.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule.
        train_tokenizer: Train encoder and codebook jointly.
        embedding_channels: Widths of the code embedding; 32 and 64 do for a UNet of 64 to 128 channels.
        conditioning_scale: Factor on the control branch's residuals.
        lora: Adaptors on the UNet that learn with the branch, as the released decoder has them; None for none.
        time_shift: Of the times trained at, see `layton.tasks.text_to_image.draw`. With little noise the UNet needs no
            codes, so what they say is learnt at noisy times.
        reader: Folder of a light decoder, as stage 0 exports it, or of a tokenizer with one, whose transformer the
            branch is to listen to (`layton.ladd.LADD.listen_to`); None trains as the paper does.
        start: Finished ``decoder/`` to go on from, of equal shape; it may have learnt on an earlier state of the LDM,
            without adaptors, and without the reader.
        gradient_checkpointing: Backward passes compute blocks anew instead of keeping what is in them: less memory for
            a third more time.
        preview_steps: Sampling steps of the pictures made while training.

    Raises:
        ValueError: A reader with ``train_tokenizer``, or parts that do not fit.
    """

    def __init__(
        self,
        ldm: str,
        tokenizer: str,
        *,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        train_tokenizer: bool = False,
        embedding_channels: tuple[int, ...] = PAPER_CHANNELS,
        conditioning_scale: float = 1.0,
        lora: LoraSettings | None = None,
        time_shift: float = 1.0,
        reader: str | None = None,
        start: str | None = None,
        gradient_checkpointing: bool = False,
        preview_steps: int = 25,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        if train_tokenizer and reader is not None:
            raise ValueError("the reader knows the codes as they are: with train_tokenizer leave it out")
        ldm = str(resolve(ldm, part=LDM))
        self.encoder, self.quantizer = load_code_parts(tokenizer, frozen=not train_tokenizer)
        self.train_tokenizer, self.code_size = train_tokenizer, code_size(tokenizer)
        if train_tokenizer and self.code_size is None:
            raise ValueError(f"{tokenizer} does not say of what size its images are: take what stage 0 exports, whole")
        self.ladd = LADD.from_pipeline(
            ldm,
            code_dim=self.quantizer.code_dim,
            embedding_channels=embedding_channels,
            conditioning_scale=conditioning_scale,
            null_embeds=null_caption(ldm),
            lora=lora,
        )
        if gradient_checkpointing:
            self.ladd.enable_gradient_checkpointing()
        if reader is not None:
            self.ladd.listen_to(CodeReader.from_pretrained(resolve(reader, part=LIGHT)))
        if start is not None:
            weights = Path(start) / WEIGHTS_NAME
            learnt = load_config(Path(start), expected_class=CLASS_NAME).get("reader_fingerprints")
            require_reader(self.ladd, cast("list[str] | None", learnt), source=weights)
            # The null caption is this LDM's own: it may have learnt on since.
            state = self.ladd.branch_state_dict() | load_tensors(weights) | {"null_embeds": self.ladd.null_embeds}
            self.ladd.load_branch_state_dict(state, source=weights)
        self._autoencoder_folder = Path(ldm) / "vae"
        self._autoencoder = Held(Autoencoder.from_pretrained(self._autoencoder_folder), frozen=True)
        self.preview_steps, self.time_shift = preview_steps, time_shift

    def setup(self, stage: str) -> None:
        """Refuse latents of another autoencoder, and codes of another tokenizer."""
        require_latents(self.sources(), self._autoencoder_folder)
        if not self.train_tokenizer:
            require_codes(self.sources(), self.quantizer.fingerprint())
        use_fast_attention(self.ladd.unet, self.ladd.controlnet)

    def why_not_sharded(self) -> str | None:
        """It can."""
        return None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch, ()."""
        x_0, embeddings, codebook_loss = self._inputs(batch)
        terms = {"diffusion": self._diffusion(x_0, embeddings, self.step_generator("diffusion", device="cpu"))}
        if self.train_tokenizer:
            terms["codebook"] = codebook_loss
            tell_health(self, self.quantizer)
        return self.log_losses(terms, batch_size=len(x_0))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss at times and noises that depend on the batch's position only, ()."""
        x_0, embeddings, _ = self._inputs(batch)
        loss = self._diffusion(x_0, embeddings, torch.Generator().manual_seed(batch_idx))
        return self.log_losses({"diffusion": loss}, batch_size=len(x_0))

    def _diffusion(self, x_0: Tensor, embeddings: Tensor, generator: torch.Generator) -> Tensor:
        t, eps = draw(x_0, generator, shift=self.time_shift)
        prediction = self.ladd(self.ladd.schedule.add_noise(x_0, eps, t), t, Condition(spatial=embeddings))
        return F.mse_loss(prediction.float(), self.ladd.target(x_0, eps, t).float())

    def _inputs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B, C, h, w), code embeddings (B, d, h', w'), codebook loss ()."""
        if self.train_tokenizer:
            (images,) = required(batch, "image")
            with torch.no_grad():
                x_0 = self._autoencoder.on(self.device).encode(images).float()
            output = self.quantizer(self.encoder(at_code_size(images, self.code_size)).float())
            return x_0, output.embeddings, output.loss
        latents, codes = required(batch, "latent", "codes")
        x_0, codes = latents.float(), codes.long()
        side = int(codes.shape[1] ** 0.5)
        return x_0, self.quantizer.codes_to_embeddings(codes, (side, side)), x_0.new_zeros(())

    def picture_grid(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the autoencoder keeps, over what the codes keep."""
        x_0, embeddings, _ = self._inputs(batch)
        decoder = DiffusionDecoder(
            self.ladd,
            self._autoencoder.on(self.device),
            latents_per_token=x_0.shape[-1] / embeddings.shape[-1],
        )
        image = self._autoencoder.module.decode(x_0).float().clamp(-1, 1)
        decoded = decoder.decode(embeddings, num_steps=self.preview_steps)
        self.log_preview(psnr(decoded, image).mean())
        return {"autoencoder": image, f"{self.preview_steps} steps": decoded}

    def log_preview(self, value: Tensor) -> None:
        """Give the loggers the PSNR of the preview against the autoencoder's own pictures, dB."""
        for logger in self.trainer.loggers:
            logger.log_metrics({"preview/psnr": float(value)}, step=self.global_step)

    def export(self, folder: Path) -> None:
        """Write ``decoder/``; if they were trained, ``encoder/`` and ``quantizer/`` as a tokenizer that encodes."""
        self.ladd.save_pretrained(folder / "decoder")
        if self.train_tokenizer and self.code_size is not None:
            self.encoder.save_pretrained(folder / "encoder")
            self.quantizer.save_pretrained(folder / "quantizer")
            LaytonTokenizer.write_index(folder, self.encoder, self.quantizer, image_size=self.code_size, light=False)

    def frozen_parts(self) -> list[nn.Module]:
        """The latent diffusion model's UNet and the reader."""
        return [self.ladd]
