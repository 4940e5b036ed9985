"""A trained generator as a folder: transformer, text encoder, and which tokenizer its codes belong to.

``config.json`` (`GeneratorCard`), ``transformer/``, ``text_encoder/`` and, if there is one, ``planner/``. Beside an
embedded tokenizer it lies in ``laytongen/``. Codes mean nothing without the tokenizer they were learnt from, so any
other one is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from generation.model.transformer import LaytonGenTransformer
from generation.planner import PART as PLANNER_PART
from generation.planner import LayoutPlanner
from generation.sampling.codes import SamplingOptions
from generation.text.encoders import TextEncoder
from layton import assets
from layton.data.cache import differences
from layton.folder import CONFIG_NAME, JsonValue, class_name, load_config, read_class, resolve_class, save_config
from layton.tokenizer import CLASS_NAME as TOKENIZER_CLASS
from layton.tokenizer import LaytonTokenizer

CLASS_NAME = "generation.pipeline.LaytonGenPipeline"
PART = "laytongen"
MAX_CANDIDATES = 64


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What a generator must find unchanged in its tokenizer.

    Attributes:
        fingerprint: Of the codebook.
        vocab_size: V.
        num_tokens: N.
        image_size: Side in pixels of what was encoded.
        code_dim: d.
    """

    fingerprint: str
    vocab_size: int
    num_tokens: int
    image_size: int
    code_dim: int

    @classmethod
    def of(cls, tokenizer: LaytonTokenizer) -> TokenizerFacts:
        """Those of a tokenizer."""
        return cls(
            tokenizer.fingerprint(),
            tokenizer.vocab_size,
            tokenizer.num_tokens,
            tokenizer.image_size,
            tokenizer.quantizer.code_dim,
        )


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """How a model is sampled when nothing else is asked for.

    Attributes:
        guidance_scale: Of classifier-free guidance; 1 is none.
        temperature: Of the logits; 0 takes the likeliest code.
        top_k: Number of likeliest codes; 0 for all.
        top_p: Share of the likeliest codes; 1 for all.
        min_entropy: Of the next code, in nats, from which on guidance and temperature act; see
            `generation.sampling.codes.SamplingOptions`.
        candidates: Images drawn for each one that is wanted, of which a judge keeps the best; heeded where there is a
            judge (`generation.caption_judge`).

    Raises:
        ValueError: If the number of candidates is out of range.
    """

    guidance_scale: float = 2.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_entropy: float = 0.0
    candidates: int = 1

    def __post_init__(self) -> None:
        """Check what no other class does."""
        if not 1 <= self.candidates <= MAX_CANDIDATES:
            raise ValueError(f"candidates must be in [1, {MAX_CANDIDATES}], got {self.candidates}")

    def options(self) -> SamplingOptions:
        """How a code is drawn."""
        return SamplingOptions(self.temperature, self.top_k or None, self.top_p, self.min_entropy)


@dataclass(frozen=True, slots=True)
class GeneratorCard:
    """What a generator's ``config.json`` says.

    Attributes:
        tokenizer: Its tokenizer.
        text_encoder: Fingerprint of its text encoder.
        sampling: Its defaults.
    """

    tokenizer: TokenizerFacts
    text_encoder: str
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)

    def require_tokenizer(self, tokenizer: LaytonTokenizer) -> None:
        """Refuse any tokenizer but the one whose codes were learnt.

        Raises:
            ValueError: With every fact that differs.
        """
        differs = differences(asdict(self.tokenizer), asdict(TokenizerFacts.of(tokenizer)))
        if differs:
            raise ValueError(f"the generator was trained with another tokenizer ({differs})")

    def require_text_encoder(self, text_encoder: TextEncoder) -> None:
        """Refuse any text encoder but the one whose features were learnt.

        Raises:
            ValueError: With both fingerprints.
        """
        found = text_encoder.fingerprint()
        if found != self.text_encoder:
            raise ValueError(
                f"the generator was trained with another text encoder (fingerprint: stored {self.text_encoder!r}, "
                f"wanted {found!r})"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Generator:
    """A loaded generator.

    Attributes:
        transformer: In eval mode.
        text_encoder: In eval mode.
        card: What belongs to it.
        planner: Says where objects stand when nobody else does, in eval mode; None if the transformer is not told.

    Raises:
        ValueError: If the planner was not made for the others.
    """

    transformer: LaytonGenTransformer
    text_encoder: TextEncoder
    card: GeneratorCard
    planner: LayoutPlanner | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit."""
        if self.planner is None:
            return
        control = self.transformer.layout_control
        if control is None or control.shape != self.planner.layout:
            told = None if control is None else control.shape
            raise ValueError(f"the transformer is told layouts of {told}, the planner makes {self.planner.layout}")
        if self.planner.text_encoder != self.card.text_encoder:
            raise ValueError(
                f"the planner reads features of another text encoder ({self.planner.text_encoder!r}, the generator's "
                f"is {self.card.text_encoder!r})"
            )


def save_generator(folder: str | Path, generator: Generator, *, dtype: torch.dtype | None = None) -> None:
    """Write a generator's folder; ``config.json``, which makes it one, comes last.

    Args:
        folder: Where to.
        generator: What to save.
        dtype: Floating-point type on disk.
    """
    root = Path(folder)
    generator.transformer.save_pretrained(root / "transformer", dtype=dtype)
    generator.text_encoder.save_pretrained(root / "text_encoder", dtype=dtype)
    if generator.planner is not None:
        generator.planner.save_pretrained(root / PLANNER_PART, dtype=dtype)
    elif (root / PLANNER_PART).exists():
        shutil.rmtree(root / PLANNER_PART)  # of a generator that was here before
    card = cast("dict[str, JsonValue]", asdict(generator.card))
    save_config(root, {"class": CLASS_NAME, "text_encoder_class": class_name(type(generator.text_encoder)), **card})


def load_generator(
    folder: str | Path,
    *,
    text_encoder: TextEncoder | None = None,
    dtype: torch.dtype = torch.float32,
    allow: Sequence[str] = (),
) -> Generator:
    """Read what `save_generator` wrote.

    Args:
        folder: Where it is.
        text_encoder: Taken instead of the one in the folder; must have the same fingerprint.
        dtype: Of the transformer's weights in memory.
        allow: Prefixes of class names that may be loaded beside ``layton.`` and ``generation.``.

    Raises:
        ValueError: If something is missing, damaged, or is not what the card says.
    """
    root = Path(folder)
    config = load_config(root, expected_class=CLASS_NAME)
    card = _card(config, root)
    if text_encoder is None:
        kind = resolve_class(str(config.get("text_encoder_class")), TextEncoder, allow)
        text_encoder = cast(TextEncoder, kind.from_pretrained(root / "text_encoder"))
    card.require_text_encoder(text_encoder)
    transformer = LaytonGenTransformer.from_pretrained(root / "transformer", dtype=dtype)
    sizes = {"vocab_size": transformer.vocab_size, "num_tokens": transformer.num_tokens}
    wanted = {name: value for name, value in asdict(card.tokenizer).items() if name in sizes}
    if differences(sizes, wanted):
        raise ValueError(f"{folder}: the transformer is not of the card's sizes ({differences(sizes, wanted)})")
    planner = LayoutPlanner.from_pretrained(root / PLANNER_PART) if (root / PLANNER_PART).is_dir() else None
    return Generator(transformer, text_encoder.eval(), card, planner)


def find_generator(name: str | Path) -> Path:
    """The folder of a generator: a path, an embedded model, or a tokenizer with one in ``laytongen/``.

    Raises:
        ValueError: If there is none.
    """
    problems: list[ValueError] = []
    for part in ("", PART):
        try:
            folder = assets.resolve(name, part=part)
        except ValueError as error:
            problems.append(error)
            continue
        for place in (folder, folder / PART):
            if (place / CONFIG_NAME).is_file() and read_class(place) == CLASS_NAME:
                return place
        problems.append(
            ValueError(f"{folder} holds no generator: neither it nor its {PART}/ has a config.json of {CLASS_NAME}")
        )
    raise problems[0]


def find_tokenizer(name: str | Path, folder: Path) -> Path:
    """The tokenizer that lies with a generator: above its folder, or the embedded one of the same name.

    Args:
        name: As it was given to `find_generator`.
        folder: What that found.

    Raises:
        ValueError: If there is none.
    """
    above = folder.parent
    if (above / CONFIG_NAME).is_file() and read_class(above) == TOKENIZER_CLASS:
        return above
    if not Path(name).is_dir():
        return assets.resolve(name)
    raise ValueError(f"{folder} is a generator alone: name its tokenizer too")


def _card(config: Mapping[str, Any], root: Path) -> GeneratorCard:
    try:
        return GeneratorCard(
            TokenizerFacts(**config["tokenizer"]), str(config["text_encoder"]), SamplingDefaults(**config["sampling"])
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{root}: damaged config.json ({error})") from error
