"""Prompts to features: one border, `TextEncoder`, and one implementation over any encoder of transformers.

Every prompt has a defined result: the empty one is a text like any other here (its special tokens; that it means "no
caption" is the generator's affair), one that is too long is cut and says so (`TextFeatures.cut`), characters that no
UTF-8 text can hold become "?".
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generation.text.loading import clean_caption, load_model, load_tokenizer, require_cleaning, silent_transformers
from layton.folder import CONFIG_NAME, class_name, load_config, save_config
from layton.ldm.text import unread_words

Padding = Literal["left", "right"]
Cleaning = Literal["none", "deepfloyd"]
_DEFAULT_LENGTH = 120  # of LlamaGen and LaytonGen (FoundationVision/LlamaGen, language/extract_t5_feature.py)


@dataclass(frozen=True, slots=True)
class TextCut:
    """A prompt that was longer than the encoder reads.

    Attributes:
        index: Which prompt.
        kept: Tokens that were read, special ones included.
        total: Tokens that it has.
    """

    index: int
    kept: int
    total: int

    def __str__(self) -> str:
        """For people."""
        return f"prompt {self.index} was cut: {self.kept} of its {self.total} tokens are read"


@dataclass(frozen=True, slots=True, eq=False)
class TextFeatures:
    """What a generator sees of B prompts.

    Attributes:
        features: (B, L, D), zero at padding.
        mask: (B, L) bool, true where there is a token.
        cut: Prompts that were too long.
        layout: (B, M, F) int64, where objects are to stand (`generation.model.layout`); None when nothing is told.
    """

    features: Tensor
    mask: Tensor
    cut: tuple[TextCut, ...] = ()
    layout: Tensor | None = None

    def pick(self, rows: Tensor) -> TextFeatures:
        """Those of chosen prompts, by their places (b,) or by a mask (B,); what was cut is not kept."""
        layout = None if self.layout is None else self.layout[rows]
        return TextFeatures(self.features[rows], self.mask[rows], layout=layout)


def without_common_padding(text: TextFeatures) -> TextFeatures:
    """Features from the longest caption's first token on; what stands before is padding of all and changes nothing."""
    longest = max(1, int(text.mask.sum(1).max()))
    return replace(text, features=text.features[:, -longest:], mask=text.mask[:, -longest:])


class TextEncoder(nn.Module, ABC):
    """Prompts to features of a fixed length.

    Attributes:
        max_length: L, tokens that are read, special ones included; the length of all features.
        width: D of the features.
        name: What it is, for people and protocols.
        trainable: Whether it learns together with the generator.
    """

    max_length: int
    width: int
    name: str
    trainable: bool

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of B prompts; those of one prompt do not depend on the others.

        Raises:
            ValueError: If there is no prompt, or one is no text.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits that tell it from other encoders (weights count as float16)."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write tokenizer, weights and settings; floating-point weights are cast to ``dtype``."""

    def unread(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """Words of the prompts that a small vocabulary of its own takes for letters; none of a large one."""
        return ()

    def forward(self, prompts: Sequence[str]) -> TextFeatures:
        """See `encode`."""
        return self.encode(prompts)


class TransformersTextEncoder(TextEncoder):
    """Any encoder of transformers with its tokenizer: T5, CLIP's text model, BERT and its kin (MiniLM, XLM-R).

    Args:
        tokenizer: A transformers tokenizer.
        model: Encoder whose output has ``last_hidden_state`` (B, L, D).
        max_length: L; by default what the tokenizer says, at most 120.
        padding: Side of the padding; the left, as in LlamaGen, puts the last word next to the first image token.
        trainable: Let it learn; otherwise its parameters are frozen and it stays in eval mode.
        name: What it is.
        cleaning: What is done to captions first: nothing, or DeepFloyd's cleaning (lower case, no links, tags or odd
            quotes), as the released LlamaGen and LaytonGen models had it; needs the packages of the extra ``clean``.

    Raises:
        ValueError: If the length makes no sense, the tokenizer cannot pad, or packages are missing.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: nn.Module,
        *,
        max_length: int | None = None,
        padding: Padding = "left",
        trainable: bool = False,
        name: str = "text encoder",
        cleaning: Cleaning = "none",
    ) -> None:
        super().__init__()
        limit = int(tokenizer.model_max_length)  # transformers writes 10^30 for "not known"
        self.max_length = min(limit, _DEFAULT_LENGTH) if max_length is None else max_length
        positions = getattr(model.config, "max_position_embeddings", None)
        if not 3 <= self.max_length <= min(limit, positions or limit):
            raise ValueError(f"max_length must be in [3, {min(limit, positions or limit)}], got {self.max_length}")
        if padding not in ("left", "right"):
            raise ValueError(f"padding must be 'left' or 'right', got {padding!r}")
        if tokenizer.pad_token_id is None:
            raise ValueError(f"{name}: the tokenizer has no padding token")
        if cleaning not in get_args(Cleaning):
            raise ValueError(f"cleaning must be one of {get_args(Cleaning)}, got {cleaning!r}")
        if cleaning == "deepfloyd":
            require_cleaning()
        self.cleaning: Cleaning = cleaning
        self.tokenizer = tokenizer
        self.model = model.requires_grad_(trainable)
        self.width = int(cast(Any, model.config).hidden_size)
        self.padding: Padding = padding
        self.trainable = trainable
        self.name = name
        self.train(trainable)

    def train(self, mode: bool = True) -> Self:
        """A frozen encoder stays in eval mode."""
        return super().train(mode and self.trainable)

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of B prompts; see `TextEncoder.encode`. With gradients if it is trainable."""
        ids, mask, cut = self.tokenize(prompts)
        device = next(self.model.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        learning = self.trainable and torch.is_grad_enabled()
        # The last bits of a product depend on how many rows it has, and int8 layers make codes of last bits. A CPU
        # gains little by batches, so that there a prompt is encoded alone, whatever it stands beside.
        rows = len(ids) if learning or device.type != "cpu" else 1
        with torch.set_grad_enabled(learning):
            parts = [self._features(*part) for part in zip(ids.split(rows), mask.split(rows), strict=True)]
        features = torch.cat(parts)
        if self.padding == "left":
            features, mask = pad_left(features, mask)
        return TextFeatures(features, mask, cut)

    def _features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Features (B, L, D) of ids (B, L), zero at padding."""
        longest = max(1, int(mask.sum(1).max()))  # what stands behind is padding of all
        seen = mask[:, :longest]
        found: Tensor = self.model(input_ids=ids[:, :longest], attention_mask=seen.long()).last_hidden_state
        return F.pad(found * seen[..., None].to(found.dtype), (0, 0, 0, ids.shape[1] - longest))

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, tuple[TextCut, ...]]:
        """Token ids (B, L) int64 padded on the right, their mask (B, L) bool, and what was cut.

        Raises:
            ValueError: As `encode`.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts must be a list of at least one text, got {str(prompts)[:80]!r}")
        texts = [prompt.encode("utf-8", "replace").decode("utf-8") for prompt in prompts]  # lone surrogates
        if self.cleaning == "deepfloyd":
            texts = [clean_caption(text) for text in texts]
        rows: list[list[int]] = self.tokenizer(texts, verbose=False)["input_ids"]
        cut: list[TextCut] = []
        ids = torch.full((len(rows), self.max_length), int(self.tokenizer.pad_token_id))
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for index, row in enumerate(rows):
            kept = row
            if len(row) > self.max_length:
                kept = self.tokenizer(texts[index], truncation=True, max_length=self.max_length)["input_ids"]
                cut.append(TextCut(index, len(kept), len(row)))
            ids[index, : len(kept)] = torch.tensor(kept)
            mask[index, : len(kept)] = True
        return ids, mask, tuple(cut)

    def fingerprint(self) -> str:
        """See `TextEncoder.fingerprint`; of kind, length, padding, vocabulary, cleaning and weights."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        facts = [type(self.model).__name__, self.max_length, self.padding, vocabulary]
        if self.cleaning != "none":
            facts.append(self.cleaning)
        digest = hashlib.sha256(json.dumps(facts).encode())
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            value = tensor.detach().cpu()
            digest.update((value.half() if value.is_floating_point() else value).contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def unread(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """See `TextEncoder.unread`."""
        return tuple(dict.fromkeys(word for prompt in prompts for word in unread_words(self.tokenizer, prompt)))

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write ``config.json``, ``tokenizer/`` and ``model/``; see `TextEncoder.save_pretrained`."""
        root = Path(folder)
        dtype = torch.float16 if dtype == torch.bfloat16 else dtype  # the fingerprint counts weights as float16
        self.tokenizer.save_pretrained(str(root / "tokenizer"))
        state = {
            key: value.to(dtype) if dtype is not None and value.is_floating_point() else value
            for key, value in self.model.state_dict().items()
        }
        with silent_transformers():
            self.model.save_pretrained(str(root / "model"), state_dict=state)  # type: ignore[operator]
        save_config(
            root,
            {
                "class": class_name(type(self)),
                "max_length": self.max_length,
                "padding": self.padding,
                "trainable": self.trainable,
                "name": self.name,
                "cleaning": self.cleaning,
            },
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load what `save_pretrained` wrote, in float32, frozen, without network.

        Raises:
            ValueError: If the folder holds something else.
        """
        root = Path(folder)
        config = load_config(root, expected_class=class_name(cls))
        tokenizer, model = load_tokenizer(root / "tokenizer"), load_model(root / "model")
        try:
            return cls(
                tokenizer,
                model,
                max_length=int(str(config["max_length"])),
                padding="left" if config["padding"] == "left" else "right",
                name=str(config["name"]),
                cleaning=cast(Cleaning, config.get("cleaning", "none")),
            ).eval()
        except KeyError as error:
            raise ValueError(f"{folder}: config.json has no {error}") from error


def text_encoder(
    folder: str,
    *,
    max_length: int | None = None,
    padding: Padding | None = None,
    cleaning: Cleaning | None = None,
    trainable: bool = False,
) -> TransformersTextEncoder:
    """A text encoder from a local folder; a run file names this function where it would name a class.

    Args:
        folder: A transformers model folder with its tokenizer (flan-t5-xl is the published choice, CLIP, MiniLM ...),
            a diffusers pipeline (its ``tokenizer/`` and ``text_encoder/``), what `TextEncoder.save_pretrained` wrote,
            or a tokenizer (a folder or ``mini``), whose latent diffusion model's text encoder is taken.
        max_length: Tokens that are read; by default what was saved, or what the tokenizer says.
        padding: Side of the padding; by default what was saved, or the left.
        cleaning: Of captions, see `TransformersTextEncoder`; by default what was saved, or none.
        trainable: Let it learn together with the generator.

    Raises:
        ValueError: If it cannot be loaded; nothing is downloaded, no code of the folder is run.
    """
    from layton import assets

    root = assets.resolve(folder, part=assets.LDM)
    saved: dict[str, Any] = {}
    if (root / "model_index.json").is_file():
        places = root / "tokenizer", root / "text_encoder"
    elif (root / "tokenizer").is_dir() and (root / "model").is_dir():
        places = root / "tokenizer", root / "model"
        if (root / CONFIG_NAME).is_file():
            saved = load_config(root, expected_class=class_name(TransformersTextEncoder))
    else:
        places = root, root
    return TransformersTextEncoder(
        load_tokenizer(places[0]),
        load_model(places[1]),
        max_length=max_length if max_length is not None else saved.get("max_length"),
        padding=padding or saved.get("padding", "left"),
        trainable=trainable,
        name=str(saved.get("name", root.name)),
        cleaning=cleaning or saved.get("cleaning", "none"),
    )


def small_text_encoder(
    *, width: int = 192, depth: int = 3, num_heads: int = 4, max_length: int = 32, padding: Padding = "left"
) -> TransformersTextEncoder:
    """A small trainable encoder with a vocabulary of scene captions, for runs without a pretrained one.

    Args:
        width: D.
        depth: Layers.
        num_heads: Attention heads.
        max_length: Tokens that are read.
        padding: Side of the padding.

    Returns:
        A CLIP text model, randomly initialised from torch's global generator; it learns with the generator.
    """
    from layton.ldm.text import build_text_encoder, build_tokenizer

    tokenizer = build_tokenizer(max_length=max_length)
    model = build_text_encoder(tokenizer, width=width, depth=depth, num_heads=num_heads)
    return TransformersTextEncoder(tokenizer, model, padding=padding, trainable=True, name=f"small-{width}x{depth}")


def pad_left(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move features (B, L, D) and mask (B, L), padded on the right, so that the padding is on the left."""
    length = mask.shape[1]
    places = torch.arange(length, device=mask.device) - (length - mask.sum(1, keepdim=True))
    moved = places % length  # the padding at the end comes round to the front
    return features.gather(1, moved[..., None].expand_as(features)), mask.gather(1, moved)
