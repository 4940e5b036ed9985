"""Trains the text-conditional UNet of the small latent diffusion model, with its text encoder, on cached latents."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.adapters import LoraSettings, add_lora, load_adapter_state_dict
from distill.denoiser import Condition, GuidedDenoiser
from distill.held import Held
from distill.models import UNetDenoiser
from distill.noise import gaussian_like
from distill.parameterization import prediction_type_from_config
from distill.samplers import sample
from distill.schedules import schedule_from_config
from distill.timesteps import timesteps
from layton.assets import find_autoencoder
from layton.decoders.rebase import read_adaptors
from layton.distillation.distilled import save_lora
from layton.ldm.autoencoder import Autoencoder
from layton.ldm.cache import require_latents
from layton.ldm.pipeline import build_scheduler, save_pipeline
from layton.ldm.positions import PlaceTeacher
from layton.ldm.teacher import open_pipeline
from layton.ldm.text import (
    TextConditioner,
    build_text_encoder,
    build_tokenizer,
    read_text_parts,
    tell_places,
    unread_words,
)
from layton.ldm.unet import build_unet, use_fast_attention
from layton.tasks.base import LaytonTask, LRSchedulerCallable, OptimizerCallable, required

ADAPTER = "lora"  # where an export's adaptors lie


class TextToImageTask(LaytonTask):
    """Latent diffusion with caption dropout (arXiv 2112.10752, eq. 3; arXiv 2207.12598 for the dropout).

    Batches hold ``latent`` (B, C, h, w), scaled, and ``caption`` (`layton.ldm.cache.CachedLatents`).

    Args:
        autoencoder: Folder of the AutoencoderKL that made the latents; it goes into the exported pipeline.
        pretrained: Exported pipeline whose UNet and text encoder go on learning; their sizes are then its own, and so
            are what the network predicts and the schedule of the noise.
        lora: Train adaptors of this shape on the UNet of ``pretrained``, and none of its own weights; they are folded
            into it when it is exported, and lie beside it as ``lora/``, so that they can be taken out again.
        start: Export of a run with the same ``pretrained`` and ``lora``, whose adaptors and text encoder go on; its
            ``lora``, ``text_encoder`` and ``tokenizer`` are enough.
        places: Whether the tokenizer gets the tokens of `layton.scenes.placed`.
        place_weight: Of the losses without which the UNet does not learn to hear places (`layton.ldm.positions`); 0
            for none.
        object_weight: Of the diffusion loss at cells where the prompt says that an object lies, against 1 elsewhere. It
            depends on nothing but the prompt, so the best model stays what it was; backgrounds are most of a picture
            and least of what it is judged by. Needs ``place_weight``.
        block_out_channels: Widths of the UNet's levels.
        num_heads: Its attention heads.
        text_width: D of the text encoder.
        text_depth: Its layers.
        caption_dropout: Share of captions replaced by the empty one.
        time_shift: Of the times trained at, see `draw`; 1 spreads them evenly.
        logit_normal: Mean and spread of the times trained at, see `draw`; instead of ``time_shift``.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule.
        preview_steps: Sampling steps of the pictures made while training.
        preview_guidance: Their guidance scale.
    """

    def __init__(
        self,
        autoencoder: str,
        *,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        pretrained: str | None = None,
        lora: LoraSettings | None = None,
        start: str | None = None,
        places: bool = False,
        place_weight: float = 0.0,
        object_weight: float = 1.0,
        block_out_channels: tuple[int, ...] = (96, 128),
        num_heads: int = 2,
        text_width: int = 192,
        text_depth: int = 3,
        caption_dropout: float = 0.1,
        time_shift: float = 1.0,
        logit_normal: tuple[float, float] | None = None,
        preview_steps: int = 20,
        preview_guidance: float = 3.0,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        if not 0 <= caption_dropout < 1:
            raise ValueError(f"caption_dropout must be in [0, 1), got {caption_dropout}")
        if time_shift <= 0:
            raise ValueError(f"time_shift must be above 0, got {time_shift}")
        if logit_normal is not None and (logit_normal[1] <= 0 or time_shift != 1):
            raise ValueError(f"logit_normal needs a spread above 0 and no time_shift, got {logit_normal}, {time_shift}")
        if lora is not None and pretrained is None:
            raise ValueError("adaptors are trained on a UNet that has learnt: lora needs pretrained")
        if start is not None and lora is None:
            raise ValueError("start names an export with adaptors: it needs lora")
        if place_weight < 0 or (place_weight > 0 and not places):
            raise ValueError(f"place_weight must be >= 0, and above 0 only with places, got {place_weight}")
        if object_weight <= 0 or (object_weight != 1 and place_weight == 0):
            raise ValueError(f"object_weight must be > 0, and 1 without place_weight, got {object_weight}")
        self._autoencoder_folder = find_autoencoder(autoencoder)
        self._autoencoder = Held(Autoencoder.from_pretrained(self._autoencoder_folder), frozen=True)
        if pretrained is not None:
            pipeline = open_pipeline(pretrained)
            text = (pipeline.tokenizer, pipeline.text_encoder) if start is None else read_text_parts(Path(start))
            self.text = TextConditioner(*text).requires_grad_(True).train()
            unet, self._scheduler = pipeline.unet.requires_grad_(True).train(), pipeline.scheduler
        else:
            self._scheduler = build_scheduler()
            tokenizer = build_tokenizer()
            self.text = TextConditioner(tokenizer, build_text_encoder(tokenizer, width=text_width, depth=text_depth))
            unet = build_unet(
                latent_channels=self._autoencoder.module.latent_channels,
                block_out_channels=block_out_channels,
                num_heads=num_heads,
                text_width=text_width,
            )
        if places:
            tell_places(self.text.tokenizer, self.text.text_encoder)
        if lora is not None:
            add_lora(unet, lora)
            if start is not None:
                state, shape = read_adaptors(Path(start) / ADAPTER)
                if (shape.rank, shape.alpha, set(shape.targets)) != (lora.rank, lora.alpha, set(lora.targets)):
                    raise ValueError(f"{start} holds adaptors of {shape}, the run trains {lora}")
                load_adapter_state_dict(unet, state, "default")
        self.teacher = PlaceTeacher(unet, self.text.tokenizer) if place_weight > 0 else None
        self.place_weight, self.object_weight = place_weight, object_weight
        config = dict(self._scheduler.config)
        self.denoiser = UNetDenoiser(unet, schedule_from_config(config), prediction_type_from_config(config))
        self.lora = lora
        self.caption_dropout, self.time_shift, self.logit_normal = caption_dropout, time_shift, logit_normal
        self.preview_steps, self.preview_guidance = preview_steps, preview_guidance

    def setup(self, stage: str) -> None:
        """Refuse latents of another autoencoder, and pick the attention that is quick."""
        require_latents(self.sources(), self._autoencoder_folder)
        use_fast_attention(self.denoiser.unet)

    def why_not_sharded(self) -> str | None:
        """Not adaptors, which are small, and not with places, which are read off attention between blocks."""
        if self.teacher is not None:
            return "place_weight reads attention's weights between blocks"
        return "adaptors are small" if self.lora is not None else None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch, ()."""
        self.look_at_captions(batch["caption"], partial(unread_words, self.text.tokenizer))
        generator = self.step_generator("diffusion", device="cpu")
        dropped = torch.rand(len(batch["caption"]), generator=generator) < self.caption_dropout
        captions = ["" if drop else caption for drop, caption in zip(dropped.tolist(), batch["caption"], strict=True)]
        return self._loss(required(batch, "latent")[0].float(), captions, generator)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss at times and noises that depend on the batch's position only, ()."""
        return self._loss(
            required(batch, "latent")[0].float(), batch["caption"], torch.Generator().manual_seed(batch_idx)
        )

    def _loss(self, x_0: Tensor, captions: list[str], generator: torch.Generator) -> Tensor:
        t, eps = draw(x_0, generator, shift=self.time_shift, logit_normal=self.logit_normal)
        if self.teacher is not None:
            self.teacher.forget()
        condition = Condition(embeds=self.text(captions))
        prediction = self.denoiser(self.denoiser.schedule.add_noise(x_0, eps, t), t, condition)
        errors = (prediction.float() - self.denoiser.target(x_0, eps, t).float()).square()
        if self.teacher is None or not torch.is_grad_enabled():
            return self.log_losses({"diffusion": errors.mean()}, batch_size=len(x_0))
        tokens = self.text.tokenize(captions).to(x_0.device)
        shown = self.teacher.object_at(tokens, x_0.shape[-2] * x_0.shape[-1]).view(len(x_0), 1, *x_0.shape[-2:]) > 0
        importance = torch.where(shown, self.object_weight, 1.0)
        taught = self.teacher.losses(tokens)
        terms = {"diffusion": (errors * importance).mean() / importance.mean(), **taught}
        weights = dict.fromkeys(taught, self.place_weight)
        return self.log_losses(terms, weights=weights, batch_size=len(x_0))

    @torch.no_grad()
    def generate(self, captions: list[str], seeds: list[int]) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] for captions, each from its own seed."""
        autoencoder = self._autoencoder.on(self.device)
        size = int(self.denoiser.unet.config.sample_size)
        x_T = torch.empty(len(captions), autoencoder.latent_channels, size, size, device=self.device)
        x_T = gaussian_like(x_T, [torch.Generator().manual_seed(seed) for seed in seeds])
        null = Condition(embeds=self.text([""] * len(captions)))
        guided = GuidedDenoiser(self.denoiser, self.preview_guidance, null)
        times = timesteps(self.denoiser.schedule, self.preview_steps, "trailing")
        latents = sample(guided, x_T, times, Condition(embeds=self.text(captions)))
        return autoencoder.decode(latents).float().clamp(-1, 1)

    def picture_grid(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Validation images over pictures generated from their captions."""
        autoencoder = self._autoencoder.on(self.device)
        captions = batch["caption"][:8]
        return {
            "image": autoencoder.decode(batch["latent"][:8].float()).float().clamp(-1, 1),
            "generated": self.generate(captions, list(range(len(captions)))),
        }

    def export(self, folder: Path) -> None:
        """Write the whole ``StableDiffusionPipeline`` folder, adaptors folded in and once more beside it."""
        unet = self.denoiser.unet
        if self.lora is not None:
            save_lora(unet, folder / ADAPTER)
            unet = copy.deepcopy(unet)
            unet.fuse_lora()
            unet.unload_lora()
        save_pipeline(
            folder,
            vae=self._autoencoder.module.model,
            text_encoder=self.text.text_encoder,
            tokenizer=self.text.tokenizer,
            unet=unet,
            scheduler=self._scheduler,
        )


def draw(
    x_0: Tensor,
    generator: torch.Generator,
    *,
    shift: float = 1.0,
    logit_normal: tuple[float, float] | None = None,
    num_train_timesteps: int = 1000,
) -> tuple[Tensor, Tensor]:
    """Times (B,), stratified over the schedule, and noise like ``x_0`` (B, C, h, w).

    Args:
        x_0: Clean latents.
        generator: Noise source.
        shift: Above 1, more of the times are noisy ones: ``u -> shift u / (1 + (shift - 1) u)`` of even ``u``
            (arXiv 2403.03206, eq. 23). Where latents say things several times over, as those of many channels do,
            what a picture shows is settled at times that an even spread seldom draws.
        logit_normal: Mean and spread of ``logit(t / 1000)``, normally distributed (arXiv 2403.03206, eq. 19); the
            shift then moves the mean by its logarithm. None spreads the times evenly.
        num_train_timesteps: Times of the schedule.
    """
    batch = len(x_0)
    u = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    if logit_normal is not None:
        mean, spread = logit_normal
        u = torch.sigmoid(mean + spread * torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6))).float()
    u = shift * u / (1 + (shift - 1) * u)
    t = (u * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)
    eps = torch.randn(x_0.shape, generator=generator)
    return t.to(x_0.device), eps.to(x_0)
