"""Prompts to conditions, with a pipeline's own text encoders and its own ``encode_prompt``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn

from distill.condition import Condition
from layton.ldm.text import unread_words

NETWORK_GUIDANCE = 3.5  # what FLUX dev is told by default
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class PromptEncoder:
    """The text side of a pipeline: Stable Diffusion 1.x and 2.x, SDXL, SD3, FLUX, and the embedded model.

    What a network is given equals what its pipeline gives it. Text encoders stay frozen and are no part of any module,
    so they are in no checkpoint. Nothing is remembered between calls: a batch's numbers depend on that batch alone.

    Args:
        pipe: The pipeline; shared, not copied.
        latent_size: (h, w) of the latents that will be made, for SDXL's size conditioning.
        guidance_scale: Fed to networks that take guidance as an input (FLUX dev); of no effect on others.
        max_length: Tokens of T5 in SD3 and FLUX; diffusers' default when None.

    Raises:
        ValueError: A pipeline of another kind.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        latent_size: tuple[int, int],
        guidance_scale: float = NETWORK_GUIDANCE,
        max_length: int | None = None,
    ) -> None:
        known = (StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline, FluxPipeline)
        if not isinstance(pipe, known):
            names = ", ".join(kind.__name__ for kind in known)
            raise ValueError(f"prompts are encoded for {names}, got {type(pipe).__name__}")
        self.pipe = pipe
        self.guidance_scale = guidance_scale
        self._image_size = tuple(side * pixels_per_latent(pipe) for side in latent_size)
        self._lengths = {} if max_length is None else {"max_sequence_length": max_length}
        for encoder in self.encoders:
            encoder.requires_grad_(False).eval()

    def unread(self, prompt: str) -> list[str]:
        """Words of a prompt that a small vocabulary has no tokens for; see `layton.ldm.text.unread_words`."""
        return unread_words(self.pipe.tokenizer, prompt)

    @property
    def has_guidance(self) -> bool:
        """Whether conditions hold ``guidance_scale``: the network takes guidance as an input (FLUX dev)."""
        return takes_guidance(self.pipe)

    def told(self, condition: Condition) -> Condition:
        """A condition (B, ...) with this encoder's guidance scale for the network's input.

        Raises:
            ValueError: It holds no text.
        """
        embeds = condition.embeds
        if embeds is None:
            raise ValueError("the condition holds no text")
        return replace(condition, guidance=self._scales(len(embeds), embeds.device))

    def _scales(self, count: int, device: torch.device | str) -> Tensor:
        return torch.full((count,), self.guidance_scale, device=device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], *, device: torch.device | str = "cpu") -> Condition:
        """The condition (B, ...) of B prompts.

        Args:
            prompts: B texts; the pipeline cuts long ones.
            device: Where to encode; the text encoders are moved there.

        Raises:
            ValueError: No prompts.
        """
        if not prompts:
            raise ValueError("no prompts to encode")
        return self._encode(list(prompts), torch.device(device))

    @torch.no_grad()
    def null(self, negative_prompt: str | None = None, *, device: torch.device | str = "cpu") -> Condition:
        """The condition (1, ...) that guidance guides away from, as the pipeline makes it.

        Args:
            negative_prompt: What to avoid; None is the pipeline's own default: the empty prompt, or zeros where the
                pipeline forces them (SDXL).
            device: As for a call.
        """
        negative = None if negative_prompt is None else [negative_prompt]
        return self._encode([""], torch.device(device), null=True, negative=negative)

    def _encode(
        self, prompts: list[str], device: torch.device, *, null: bool = False, negative: list[str] | None = None
    ) -> Condition:
        for encoder in self.encoders:
            encoder.to(device)
        pipe: Any = self.pipe
        if isinstance(pipe, FluxPipeline):
            return self._flux((negative or [""]) if null else prompts, device)
        options = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": null}
        options |= {"negative_prompt": negative} if negative is not None else {}
        side = 1 if null else 0  # encode_prompt returns (prompt, negative prompt) for every kind of embedding
        if isinstance(pipe, StableDiffusion3Pipeline):
            found = pipe.encode_prompt(prompts, None, None, **options, **self._lengths)
            return Condition(embeds=found[side], pooled=found[2 + side])
        found = pipe.encode_prompt(prompts, **options)
        if isinstance(pipe, StableDiffusionXLPipeline):
            return Condition(embeds=found[side], pooled=found[2 + side], time_ids=self._time_ids(found[side]))
        return Condition(embeds=found[side])

    def _flux(self, prompts: list[str], device: torch.device) -> Condition:
        embeds, pooled, _ = self.pipe.encode_prompt(prompts, None, device=device, **self._lengths)
        scale = self._scales(len(prompts), device) if self.has_guidance else None
        return Condition(embeds=embeds, pooled=pooled, guidance=scale)

    def _time_ids(self, embeds: Tensor) -> Tensor:
        """Original size, crop corner and target size (B, 6): whole images of the wanted size."""
        ids = torch.tensor([[*self._image_size, 0, 0, *self._image_size]], dtype=embeds.dtype, device=embeds.device)
        return ids.repeat(len(embeds), 1)

    def leave(self, device: torch.device) -> None:
        """Take the text encoders off an accelerator; a later call brings them back."""
        if device.type != "cpu":
            for encoder in self.encoders:
                encoder.to("cpu")

    @property
    def encoders(self) -> list[nn.Module]:
        """The pipeline's text encoders."""
        found = [getattr(self.pipe, name, None) for name in _ENCODERS]
        return [encoder for encoder in found if isinstance(encoder, nn.Module)]


def takes_guidance(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline's network takes guidance as an input (FLUX dev)."""
    return isinstance(pipe, FluxPipeline) and bool(pipe.transformer.config.guidance_embeds)


def latent_shape_of(pipe: DiffusionPipeline, latent_size: int | None = None) -> tuple[int, int, int]:
    """(C, h, w) of the latents that a pipeline's network denoises, square and of its own default size.

    Args:
        pipe: A pipeline with a ``unet`` or a ``transformer``.
        latent_size: Another h = w.

    Raises:
        ValueError: The size is below 1.
    """
    if latent_size is not None and latent_size < 1:
        raise ValueError(f"latent_size must be >= 1, got {latent_size}")
    if isinstance(pipe, FluxPipeline):  # 2x2 patches are packed into channels, and no size is in the configuration
        flux_side = latent_size or int(pipe.default_sample_size)
        return int(pipe.transformer.config.in_channels) // 4, flux_side, flux_side
    network = getattr(pipe, "unet", None) or pipe.transformer
    side = latent_size or int(network.config.sample_size)
    return int(network.config.in_channels), side, side


def pixels_per_latent(pipe: DiffusionPipeline) -> int:
    """Side of the square that one latent stands for."""
    return int(2 ** (len(pipe.vae.config.block_out_channels) - 1))
