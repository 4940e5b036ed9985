"""`LaytonGenPipeline`: prompts to images, in the manner of diffusers.

>>> pipe = LaytonGenPipeline.from_pretrained("mini")
>>> image = pipe("a red circle left of a blue star").images[0]
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from generation.caption_judge import PART as JUDGE_PART
from generation.caption_judge import CaptionJudge, judge_beside
from generation.generator import (
    MAX_CANDIDATES,
    PART,
    Generator,
    find_generator,
    find_tokenizer,
    load_generator,
    save_generator,
)
from generation.model.layout import PlacedObject
from generation.model.packing import PackedCopy
from generation.model.quantization import require_place
from generation.model.transformer import LaytonGenTransformer
from generation.pictures import OUTPUT_TYPES, OutputType, Pictures, finish, join
from generation.sampling.choice import SamplingChoice
from generation.sampling.codes import SamplingOptions
from generation.sampling.decoding import FREE, generate_codes
from generation.sampling.guidance import Guidance
from generation.sampling.seeding import child_generator, image_generators
from generation.text.encoders import TextCut, TextEncoder, TextFeatures
from layton import assets
from layton.interface import Generators
from layton.tokenizer import LaytonTokenizer

MAX_IMAGES = 10_000
UNTOLD = (
    "this model has learnt to be told where objects stand, and nothing tells it: its pictures may stay empty. Train it "
    "with a planner (option planner), add one to its folder (tools/assemble.py --planner), or give layouts (--layout); "
    "[None] for each prompt (--no-layout) tells nothing, silently"
)
UNPLANNED = (
    "nobody plans where objects stand in an image of which codes are known: give layouts, such as those of the result "
    "that the codes come from (layouts=result.layouts), or [None] to tell nothing"
)
_TOLD_WORDS, _TOLD_LETTERS = 8, 40
StepEnd = Callable[["LaytonGenPipeline", int, int, dict[str, Any]], object]


class PromptWarning(UserWarning):
    """Something of a prompt was not heard."""


class PromptCutWarning(PromptWarning):
    """A prompt was longer than the text encoder reads."""


class UnreadWordsWarning(PromptWarning):
    """Words of a prompt are not in the model's vocabulary, where that is a small one of its own."""


@dataclass
class LaytonGenOutput(BaseOutput):
    """What a pipeline gives.

    Attributes:
        images: By output type: "pil" a list, "np" (B, H, W, 3) float32 in [0, 1], "pt" (B, 3, H, W) float32 in
            [0, 1], as in diffusers; "codes" leaves it empty.
        codes: (B, N) int64.
        cut: Prompts that were longer than the text encoder reads.
        unread: Words of the prompts that are not in the model's vocabulary, where that is a small one of its own.
        layouts: Where objects were told to stand, for each image; None where nothing was told.
    """

    images: Pictures
    codes: Tensor
    cut: tuple[TextCut, ...] = ()
    unread: tuple[str, ...] = ()
    layouts: tuple[tuple[PlacedObject, ...] | None, ...] = ()


class LaytonGenPipeline:
    """Text to image: text encoder, transformer, tokenizer (LaytonGen, arXiv 2503.08377).

    Args:
        generator: Transformer and text encoder.
        tokenizer: With at least one decoder, unless only codes are wanted.
        judge: Chooses among candidates; without it each image is drawn once.

    Raises:
        ValueError: If the tokenizer is not the one that the generator, or the judge, was trained with.
    """

    def __init__(self, generator: Generator, tokenizer: LaytonTokenizer, judge: CaptionJudge | None = None) -> None:
        generator.card.require_tokenizer(tokenizer)
        if judge is not None:
            judge.require_tokenizer(tokenizer)
        self.judge = judge
        self.card = generator.card
        self.transformer = generator.transformer.eval()
        self.text_encoder = generator.text_encoder.eval()
        self.planner = None if generator.planner is None else generator.planner.eval()
        self.tokenizer = tokenizer.eval()
        self._packed: PackedCopy[LaytonGenTransformer] = PackedCopy()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        tokenizer: str | Path | LaytonTokenizer | None = None,
        decoders: Sequence[str] | None = None,
        text_encoder: TextEncoder | None = None,
        judge: CaptionJudge | None = None,
        torch_dtype: torch.dtype = torch.float32,
        allow: Sequence[str] = (),
    ) -> Self:
        """Load a pipeline without network.

        Args:
            name: An embedded model such as ``"mini"``, a folder that `save_pretrained` wrote, or a generator's folder.
            tokenizer: Its tokenizer, or where it is; by default what lies beside the generator.
            decoders: Names of the decoders to load; all by default.
            text_encoder: Taken instead of the saved one; must be the same.
            judge: Chooses among candidates; by default the one that lies beside the tokenizer, if there is one.
            torch_dtype: Of the transformer's weights.
            allow: Prefixes of class names that may be loaded beside ``layton.`` and ``generation.``.

        Raises:
            ValueError: If something is missing, damaged, or the tokenizer is not the one trained with.
        """
        folder = find_generator(name)
        generator = load_generator(folder, text_encoder=text_encoder, dtype=torch_dtype, allow=allow)
        if isinstance(tokenizer, LaytonTokenizer):
            return cls(generator, tokenizer, judge)
        place = assets.resolve(tokenizer) if tokenizer is not None else find_tokenizer(name, folder)
        beside = judge_beside(place)
        if judge is None and beside is not None:
            judge = CaptionJudge.from_pretrained(beside, allow=allow)
        return cls(generator, LaytonTokenizer.from_pretrained(place, decoders=decoders, allow=allow), judge)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write tokenizer, latent diffusion model and, in ``laytongen/``, the generator: the layout of ``mini``.

        Args:
            folder: Where to.
            dtype: Floating-point type on disk.

        Raises:
            ValueError: If a part that belongs in the folder is not known, or cannot be stored as ``dtype``.
        """
        root = Path(folder)
        if self.tokenizer.ldm is None and any(decoder.needs_ldm for decoder in self.tokenizer.decoders.values()):
            raise ValueError(
                "the latent diffusion model of the tokenizer's decoders is not at hand: load the pipeline with the "
                "tokenizer's folder instead of a LaytonTokenizer"
            )
        if self.transformer.config.get("int8") and dtype not in (None, torch.float32):
            raise ValueError(f"an int8 transformer is saved as it is: give no dtype, got {dtype}")
        self.tokenizer.save_pretrained(root, dtype=dtype)
        shutil.rmtree(root / JUDGE_PART, ignore_errors=True)  # of another that lay here
        if self.judge is not None:
            self.judge.save_pretrained(root / JUDGE_PART, dtype=dtype)
        parts = Generator(self.transformer, self.text_encoder, self.card, self.planner)
        save_generator(root / PART, parts, dtype=dtype)

    def to(self, device: torch.device | str) -> Self:
        """Move all parts.

        Raises:
            ValueError: int8 weights are to leave the CPU.
        """
        require_place(self.transformer, torch.device(device))
        for part in (self.transformer, self.text_encoder, self.tokenizer, self.planner):
            if part is not None:
                part.to(device)
        if self.judge is not None:
            self.judge.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    @property
    def num_tokens(self) -> int:
        """N codes for an image."""
        return self.tokenizer.num_tokens

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        guidance_scale: float | Guidance | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_entropy: float | None = None,
        candidates: int | None = None,
        num_inference_steps: int | None = None,
        decoder: str | None = None,
        generator: Generators | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepEnd | None = None,
        known_codes: Tensor | None = None,
        layouts: Sequence[Sequence[PlacedObject] | None] | None = None,
        batch_size: int = 16,
    ) -> LaytonGenOutput:
        """Draw images; the same prompt and generator give the same codes in any batch.

        Args:
            prompt: One text or several.
            num_images_per_prompt: Images for each, one after another.
            guidance_scale: Of classifier-free guidance; 1 is none. A `Guidance` says which codes too.
            temperature: 0 takes the likeliest code each time.
            top_k: Number of likeliest codes to draw among; 0 for all.
            top_p: Share of the likeliest codes to draw among; 1 for all.
            min_entropy: Where the model is surer of the next code than so many nats, it is drawn plainly, without
                guidance and at temperature 1; 0 for nowhere. See `generation.sampling.codes.SamplingOptions`.
            candidates: Images drawn for each one that is wanted, of which the judge keeps the best; by default the
                model's own number, or 1 where there is no judge.
            num_inference_steps: Steps of the decoder; its own number by default.
            decoder: Name of the decoder; the tokenizer's choice by default.
            generator: One for each image, or one that seeds them all; seeds 0, 1, 2 ... by default.
            output_type: "pil", "np", "pt", or "codes" for no pictures.
            callback_on_step_end: Called with the pipeline, the index of the code, the same again (diffusers' time
                step), and a dictionary with ``codes`` (B, N) of all candidates so far, -1 where none is yet.
            known_codes: (B, N) codes that are given, -1 where one is to be drawn (`generation.editing` makes such); one
                row stands for all images.
            layouts: Where objects shall stand, one list for each prompt (`generation.model.layout`); None instead of a
                list tells nothing, and with an empty prompt nothing should be told. By default the planner says it,
                anew for each image, where there is one and no codes are known, which it cannot look at (a warning
                says so, and where there is none).
            batch_size: Images encoded, drawn and decoded at once, candidates counted, but at least one; what more
                images take is their codes and pictures.

        Raises:
            ValueError: If an argument is out of range or the prompt is no text.
        """
        if not isinstance(prompt, str | Sequence):
            raise ValueError(f"prompt must be a text or several, got {type(prompt).__name__}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        total = len(prompts) * num_images_per_prompt
        if known_codes is not None and len(known_codes) == 1:
            known_codes = known_codes.expand(total, -1)
        self._check(prompts, total, batch_size, known_codes)
        prompts = [each.strip() for each in prompts]
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        if output_type != "codes":
            self.tokenizer.decoder(decoder).check_steps(num_inference_steps)
        generators = image_generators(generator, total)
        noise = [child_generator(each) for each in generators]
        sampling, guidance = self.options(
            guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p, min_entropy=min_entropy
        )
        wanted = self._wanted_layouts(layouts, len(prompts))
        free = known_codes is None or bool((known_codes == FREE).all())
        if self.transformer.layout_control is not None and wanted is None and (self.planner is None or not free):
            warnings.warn(UNTOLD if self.planner is None else UNPLANNED, stacklevel=2)
        draw = partial(self.draw_codes, sampling=sampling, guidance=guidance, callback=callback_on_step_end)
        each = self.candidates(candidates)
        at_once = max(1, batch_size // each)
        unread = self.text_encoder.unread(prompts)
        if unread:
            some = ", ".join(word[:_TOLD_LETTERS] for word in unread[:_TOLD_WORDS])
            some += ", ..." * (len(unread) > _TOLD_WORDS)
            warnings.warn(f"not in this model's vocabulary: {some}", UnreadWordsWarning, stacklevel=2)
        codes: list[Tensor] = []
        cuts: dict[int, TextCut] = {}
        pictures: list[Any] = []
        told: list[tuple[PlacedObject, ...] | None] = []
        for start in range(0, total, at_once):
            part = slice(start, min(start + at_once, total))
            images = range(part.start, part.stop)
            text = self._text_of(prompts, images, num_images_per_prompt, cuts)
            if wanted is not None:
                text = replace(text, layout=wanted[[index // num_images_per_prompt for index in images]])
            drawn, stand = self._draw_best(
                text,
                [prompts[index // num_images_per_prompt] for index in images],
                generators[part],
                candidates=each,
                free=free,
                known=None if known_codes is None else known_codes[part],
                draw=draw,
            )
            told += stand
            codes.append(drawn.cpu())
            if output_type != "codes":
                decoded = self.tokenizer.decode(
                    drawn, decoder=decoder, num_steps=num_inference_steps, generator=noise[part]
                )
                pictures.append(finish(decoded.float().cpu(), output_type))
        return LaytonGenOutput(
            images=join(pictures, output_type),
            codes=torch.cat(codes),
            cut=tuple(cuts.values()),
            unread=unread,
            layouts=tuple(told),
        )

    def _check(self, prompts: Sequence[str], total: int, batch_size: int, known_codes: Tensor | None) -> None:
        if not 1 <= total <= MAX_IMAGES or batch_size < 1:
            raise ValueError(f"images and batch_size must be in [1, {MAX_IMAGES}], got {total} and {batch_size}")
        if not all(isinstance(each, str) for each in prompts):
            raise ValueError(f"prompts must be texts, got {str(prompts)[:80]}")
        if known_codes is not None and known_codes.shape != (total, self.num_tokens):
            raise ValueError(
                f"known_codes must be ({total}, {self.num_tokens}), one row an image, got {tuple(known_codes.shape)}"
            )
        if known_codes is not None:
            low, high = (int(value) for value in known_codes.aminmax())
            if not FREE <= low <= high < self.tokenizer.vocab_size:
                raise ValueError(f"known_codes must be in [-1, {self.tokenizer.vocab_size - 1}], got {low} to {high}")

    def _draw_best(
        self,
        text: TextFeatures,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        candidates: int,
        free: bool,
        known: Tensor | None,
        draw: Callable[..., Tensor],
    ) -> tuple[Tensor, list[tuple[PlacedObject, ...] | None]]:
        """Codes (B, N) of B images, each the best of its candidates, and where their objects were told to stand."""
        own = _generators_of_candidates(generators, candidates)
        text = self.planned(_repeated(text, candidates), own, free=free)
        drawn = draw(text, generators=own, known=None if known is None else known.repeat_interleave(candidates, 0))
        best = torch.arange(len(prompts)) * candidates
        if candidates > 1 and self.judge is not None:
            best = self._best(self.judge, drawn, prompts)
        return drawn[best.to(drawn.device)], self._told(text, best)

    def candidates(self, asked: int | None) -> int:
        """How many images to draw for each.

        Raises:
            ValueError: If it is out of range, or there is nobody to choose.
        """
        count = asked if asked is not None else self.card.sampling.candidates if self.judge is not None else 1
        if not 1 <= count <= MAX_CANDIDATES:
            raise ValueError(f"candidates must be in [1, {MAX_CANDIDATES}], got {count}")
        if count > 1 and self.judge is None:
            raise ValueError(f"the best of {count} candidates is chosen by a judge, and the pipeline has none")
        return count

    def _best(self, judge: CaptionJudge, codes: Tensor, prompts: Sequence[str]) -> Tensor:
        """Of each prompt's candidates, codes (P * C, N), where those are that the judge likes best, (P,)."""
        each = len(codes) // len(prompts)
        odds = judge.odds(self.tokenizer, codes, [prompt for prompt in prompts for _ in range(each)])
        told = torch.tensor([bool(prompt) for prompt in prompts], device=odds.device)
        best = torch.where(told[:, None], odds.view(-1, each), 0.0).argmax(1)  # the first where nothing is asked for
        return best + each * torch.arange(len(prompts), device=odds.device)

    def _text_of(
        self, prompts: Sequence[str], images: range, images_per_prompt: int, cuts: dict[int, TextCut]
    ) -> TextFeatures:
        """Text features of some images, of whose prompts each is encoded once; new cuts are told and added."""
        rows = torch.tensor([index // images_per_prompt for index in images])
        first, last = int(rows[0]), int(rows[-1])
        text = self._encode(prompts[first : last + 1])
        for found in text.cut:
            cut = replace(found, index=first + found.index)
            if cut.index not in cuts:  # the images of one prompt may lie in several batches
                warnings.warn(str(cut), PromptCutWarning, stacklevel=3)
                cuts[cut.index] = cut
        rows = (rows - first).to(text.mask.device)
        return text.pick(rows)

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Text features as in training, where an empty caption is the transformer's own "none"."""
        prompts = [prompt.strip() for prompt in prompts]  # a blank one is none
        text = self.text_encoder.encode(prompts)
        untold = torch.tensor([not prompt for prompt in prompts], device=text.mask.device)
        return replace(text, features=self.transformer.drop_condition(text.features, untold))

    def planned(self, text: TextFeatures, generators: Sequence[torch.Generator], *, free: bool = True) -> TextFeatures:
        """The same with layouts drawn by the planner, if ``free``, none are told and there is one; of no caption, none.

        The generators of a model that can be told layouts go on alike in all cases, so that a layout that was drawn,
        told again, gives the same image.
        """
        if self.transformer.layout_control is None or not len(text.mask):
            return text
        own = [child_generator(each) for each in generators]
        if self.planner is None or text.layout is not None or not free:
            return text
        untold = (text.features == self.transformer.null_condition(text.features)).all((1, 2))
        layout = self.planner.draw(text, own)
        return replace(text, layout=self.transformer.drop_layout(layout, untold | (layout[:, 0, 0] == 0)))

    def _wanted_layouts(self, layouts: Sequence[Sequence[PlacedObject] | None] | None, prompts: int) -> Tensor | None:
        """Layouts of prompts (P, M, F); None if the user says nothing of them.

        Raises:
            ValueError: If they do not fit, or the model is not told where objects stand.
        """
        if layouts is None:
            return None
        control = self.transformer.layout_control
        if control is None:
            raise ValueError("layouts are given, and the model was not trained with any")
        if len(layouts) != prompts or any(isinstance(each, PlacedObject) for each in layouts):
            raise ValueError(
                f"{prompts} prompts need as many layouts, a list of objects each, got {str(layouts)[:120]}"
            )
        shape = control.shape
        rows = [shape.untold(1)[0] if objects is None else shape.tensor(objects) for objects in layouts]
        return torch.stack(rows).to(self.device)

    def _told(self, text: TextFeatures, rows: Tensor) -> list[tuple[PlacedObject, ...] | None]:
        control = self.transformer.layout_control
        if control is None or text.layout is None:
            return [None] * len(rows)
        found = [control.shape.objects_of(text.layout[row]) for row in rows.tolist()]
        return [None if objects is None else tuple(objects) for objects in found]

    def encode_prompt(self, prompts: Sequence[str]) -> TextFeatures:
        """Text features of prompts; a prompt that is cut is told by a `PromptCutWarning`, an empty one means none."""
        text = self._encode(prompts)
        for cut in text.cut:
            warnings.warn(str(cut), PromptCutWarning, stacklevel=2)
        return text

    def draw_codes(
        self,
        text: TextFeatures,
        *,
        generators: Sequence[torch.Generator],
        sampling: SamplingOptions,
        guidance: Guidance,
        known: Tensor | None = None,
        callback: StepEnd | None = None,
    ) -> Tensor:
        """Codes (B, N) int64 for text features; see `generation.sampling.decoding.generate_codes`."""

        def step(index: int, codes: Tensor) -> None:
            if callback is not None:
                callback(self, index, index, {"codes": codes})

        drawn = generate_codes(
            self._packed.of(self.transformer),
            text.features.to(next(self.transformer.parameters()).dtype),
            text.mask,
            generators=generators,
            sampling=sampling,
            guidance=guidance,
            known=None if known is None else known.to(self.device),
            layout=text.layout,
            callback=step,
        )
        return drawn.clone()  # a tensor of inference mode may not be used in training

    def options(
        self,
        guidance_scale: float | Guidance | None,
        *,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        min_entropy: float | None = None,
    ) -> tuple[SamplingOptions, Guidance]:
        """What is asked for, filled up with the model's defaults.

        Raises:
            ValueError: If a value is out of range.
        """
        asked = SamplingChoice(
            None if isinstance(guidance_scale, Guidance) else guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_entropy=min_entropy,
        )
        sampling, guidance = asked.over(self.card.sampling)
        return sampling, guidance_scale if isinstance(guidance_scale, Guidance) else guidance


def _repeated(text: TextFeatures, count: int) -> TextFeatures:
    if count == 1:
        return text
    return text.pick(torch.arange(len(text.mask), device=text.mask.device).repeat_interleave(count))


def _generators_of_candidates(generators: Sequence[torch.Generator], count: int) -> list[torch.Generator]:
    """One generator for each candidate; a single one of each image draws with the image's own."""
    if count == 1:
        return list(generators)
    return [child_generator(each) for each in generators for _ in range(count)]
