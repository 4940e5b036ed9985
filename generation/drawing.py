"""Prompts and seeds to pictures: what SceneEval, GenEval and the demonstration ask of any text-to-image model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from generation.model.compiled import compile_decoding
from generation.model.layout import PlacedObject
from generation.model.quantization import choose_place, set_weights, weights_type
from generation.model.weight_types import Weights
from generation.pipeline import LaytonGenPipeline, UnreadWordsWarning
from generation.sampling.choice import SamplingChoice
from generation.text.encoders import TextCut
from layton.ldm.text import remark_on
from layton.modules import weights_digest
from layton.pictures import to_uint8

Layout = Sequence[PlacedObject]


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """Pictures, and how their prompts were understood.

    Attributes:
        images: uint8 (H, W, 3).
        codes: (B, N) int64, their tokens.
        layouts: Where objects were told to stand, for each image; None where nothing was told.
        cut: Prompts that were longer than the text encoder reads.
    """

    images: list[NDArray[np.uint8]]
    codes: Tensor
    layouts: tuple[Layout | None, ...]
    cut: tuple[TextCut, ...]


@dataclass(frozen=True, slots=True, eq=False)
class LaytonGenDrawer:
    """A LaytonGen pipeline and how it is sampled.

    Attributes:
        pipeline: The pipeline.
        name: What was loaded.
        decoder: Name of the decoder; the tokenizer's choice if None.
        num_steps: Its steps; its own number if None.
        sampling: What is asked for beside the model's defaults.
    """

    pipeline: LaytonGenPipeline
    name: str
    decoder: str | None = None
    num_steps: int | None = None
    sampling: SamplingChoice = field(default_factory=SamplingChoice)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        tokenizer: str | None = None,
        decoder: str | None = None,
        num_steps: int | None = None,
        sampling: SamplingChoice | None = None,
        weights: Weights | None = None,
        compiled: bool = False,
        device: str | None = None,
        allow: Sequence[str] = (),
    ) -> LaytonGenDrawer:
        """Load a model with the one decoder that is wanted.

        ``weights`` sets the transformer's for the time being; by default they are as saved. ``compiled`` has its
        decoding steps compiled (`generation.model.compiled`).

        Raises:
            ValueError: If it does not exist or is damaged, or a setting is out of range.
        """
        from generation.generator import find_generator, find_tokenizer
        from layton.loading import default_decoder

        warnings.filterwarnings("ignore", category=UnreadWordsWarning)  # commands tell it once, or keep it by prompt
        folder = find_generator(name)
        beside = tokenizer if tokenizer is not None else str(find_tokenizer(name, folder))
        chosen = decoder if decoder is not None else default_decoder(beside)
        pipeline = LaytonGenPipeline.from_pretrained(name, tokenizer=beside, decoders=[chosen], allow=allow)
        pipeline.tokenizer.decoder(chosen).check_steps(num_steps)
        choice = sampling or SamplingChoice()
        choice.over(pipeline.card.sampling)
        placed = pipeline.to(choose_place(pipeline.transformer, weights, device))
        if weights is not None:
            set_weights(placed.transformer, weights)
        if compiled:
            compile_decoding(placed.transformer)
        return cls(placed, name, chosen, num_steps, choice)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[NDArray[np.uint8]]:
        """One image uint8 (H, W, 3) for each prompt and seed, which depends on these two alone."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return self.draw(prompts, generators).images

    def draw(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        images_per_prompt: int = 1,
        layouts: Sequence[Layout | None] | None = None,
        callback: Callable[[int], object] | None = None,
    ) -> Drawn:
        """Images of prompts, some of each one after another, each from its own generator.

        Args:
            prompts: What to draw.
            generators: One for each image.
            images_per_prompt: Images of each prompt.
            layouts: Where objects shall stand, one for each prompt; see `LaytonGenPipeline`.
            callback: Is told the index of each code.

        Raises:
            ValueError: If layouts are given to be left out.
        """
        if layouts is not None and self.sampling.no_layout:
            raise ValueError("layouts are given, and no_layout says to leave them out")
        sampling, guidance = self.sampling.over(self.pipeline.card.sampling)
        result = self.pipeline(
            list(prompts),
            num_images_per_prompt=images_per_prompt,
            num_inference_steps=self.num_steps,
            decoder=self.decoder,
            guidance_scale=guidance,
            temperature=sampling.temperature,
            top_k=sampling.top_k or 0,
            top_p=sampling.top_p,
            min_entropy=sampling.min_entropy,
            candidates=self.sampling.candidates,
            generator=list(generators),
            output_type="np",
            layouts=[None] * len(prompts) if self.sampling.no_layout and self._is_told else layouts,
            callback_on_step_end=None if callback is None else lambda _, index, *__: callback(index),
            batch_size=max(1, len(generators)) * self.pipeline.candidates(self.sampling.candidates),
        )
        return Drawn(to_uint8(np.asarray(result.images)), result.codes, result.layouts, result.cut)

    def remarks(self, prompts: Sequence[str], cut: Sequence[TextCut]) -> list[str]:
        """What was not read of each prompt, in words; empty if all was.

        Args:
            prompts: What was to be drawn.
            cut: See `Drawn`.
        """
        lengths = {each.index: {"kept": each.kept, "total": each.total} for each in cut}
        encoder = self.pipeline.text_encoder
        return [remark_on(p, encoder.unread([p]), **lengths.get(place, {})) for place, p in enumerate(prompts)]

    @property
    def _is_told(self) -> bool:
        return self.pipeline.transformer.layout_control is not None

    def settings(self, *, told: bool = False) -> dict[str, Any]:
        """Every setting that decides a picture, beside prompt and seed.

        Args:
            told: Whether the layouts are given, so that nobody plans.
        """
        sampling, guidance = self.sampling.over(self.pipeline.card.sampling)
        decoder = self.pipeline.tokenizer.decoder(self.decoder)
        planner = self.pipeline.planner if not (told or self.sampling.no_layout) else None
        candidates, judge = self.pipeline.candidates(self.sampling.candidates), self.pipeline.judge
        return {
            "model": self.name,
            "weight_type": weights_type(self.pipeline.transformer),
            "compiled": self.pipeline.transformer.compiled_step is not None,
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
            "guidance_scale": guidance.scale,
            "guidance_schedule": guidance.schedule,
            "guidance_start": guidance.start,
            "guidance_stop": guidance.stop,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_entropy": sampling.min_entropy,
            "candidates": candidates,
            "judge": None if candidates == 1 or judge is None else weights_digest(judge.judge, judge.text_encoder),
            "planner": None if planner is None else weights_digest(planner),
            "planner_temperature": None if planner is None else planner.temperature,
            "planner_tries": None if planner is None else planner.tries,
            "prompts_rewritten": False,
        }
