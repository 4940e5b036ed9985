"""Prompts and seeds to pictures: what SceneEval, GenEval and the demonstration ask of any text-to-image model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from generation.guidance import Guidance
from generation.pipeline import LaytonGenPipeline
from generation.quantization import set_weights, weights_type
from generation.weight_types import Weights
from layton.modules import weights_digest


@dataclass(frozen=True, slots=True, eq=False)
class LaytonGenDrawer:
    """A LaytonGen pipeline and how it is sampled.

    Attributes:
        pipeline: The pipeline.
        name: What was loaded.
        decoder: Name of the decoder; the tokenizer's choice if None.
        num_steps: Its steps; its own number if None.
        guidance_scale: The model's default if None; so are the next three.
        temperature: Of the logits.
        top_k: Number of likeliest codes; 0 for all.
        top_p: Share of the likeliest codes.
        interim: Whether the model is one that is still in training.
    """

    pipeline: LaytonGenPipeline
    name: str
    decoder: str | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    interim: bool = False

    @classmethod
    def load(
        cls,
        name: str,
        *,
        tokenizer: str | None = None,
        decoder: str | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        weights: Weights | None = None,
        device: str | None = None,
        allow: Sequence[str] = (),
    ) -> LaytonGenDrawer:
        """Load a model with the one decoder that is wanted.

        ``weights`` sets the transformer's for the time being; by default they are as saved.

        Raises:
            ValueError: If it does not exist or is damaged, or a setting is out of range.
        """
        from generation.generator import find_generator, find_tokenizer, is_interim
        from layton.commands.models import default_decoder
        from layton.devices import choose_device

        folder = find_generator(name)
        beside = tokenizer if tokenizer is not None else str(find_tokenizer(name, folder))
        chosen = decoder if decoder is not None else default_decoder(beside)
        pipeline = LaytonGenPipeline.from_pretrained(name, tokenizer=beside, decoders=[chosen], allow=allow)
        pipeline.tokenizer.decoder(chosen).check_steps(num_steps)
        pipeline.options(guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p)
        placed = pipeline.to(choose_device(device))
        if weights is not None:
            set_weights(placed.transformer, weights)
        return cls(placed, name, chosen, num_steps, guidance_scale, temperature, top_k, top_p, is_interim(folder))

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[NDArray[np.uint8]]:
        """One image uint8 (H, W, 3) for each prompt and seed, which depends on these two alone."""
        result = self.pipeline(
            list(prompts),
            num_inference_steps=self.num_steps,
            decoder=self.decoder,
            guidance_scale=self.guidance_scale,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
            batch_size=max(1, len(prompts)),
        )
        return [np.round(image * 255).astype(np.uint8) for image in np.asarray(result.images)]

    def settings(self) -> dict[str, Any]:
        """Every setting that decides a picture, beside prompt and seed."""
        sampling, guidance = self.pipeline.options(
            self.guidance_scale, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
        )
        decoder = self.pipeline.tokenizer.decoder(self.decoder)
        scale: Guidance = guidance
        return {
            "model": self.name,
            "interim": self.interim,
            "weight_type": weights_type(self.pipeline.transformer),
            "weights": weights_digest(self.pipeline.transformer, decoder),
            "pipeline_class": type(self.pipeline).__name__,
            "tokenizer_fingerprint": self.pipeline.card.tokenizer.fingerprint,
            "text_encoder": self.pipeline.text_encoder.name,
            "text_encoder_fingerprint": self.pipeline.card.text_encoder,
            "decoder": self.decoder,
            "decoder_class": type(decoder).__name__,
            "num_inference_steps": decoder.check_steps(self.num_steps),
            "condition_scale": decoder.default_scale,
            "decoder_sampling": decoder.sampling_record(),
            "guidance_scale": scale.scale,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_entropy": sampling.min_entropy,
            "prompts_rewritten": False,
        }
