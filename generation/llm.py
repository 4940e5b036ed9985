"""Image codes as words of a language model: from an image tokenizer to any causal model of ``transformers``.

An image is N + 2 ids in a row: a mark where it begins, its codes, each ``offset`` above its own number, and a mark
where it ends. Text and images can then follow one another in any order, are learnt by the model's own cross-entropy,
and what the model writes is taken apart again. `WholeImages` keeps it from writing anything in between.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor
from transformers import AddedToken, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from layton.interface import ImageTokenizer

BEGIN, END = "<image>", "</image>"
Part = str | Tensor
_LEARNT = "image_vocabulary"  # what a model's config says of the images that it has rows for


@dataclass(frozen=True, slots=True)
class ImageVocabulary:
    """Where images lie among a language model's ids.

    Attributes:
        begin: Id of the mark in front of an image.
        end: Id of the mark behind it.
        offset: Id of code 0; the others follow.
        vocab_size: V.
        num_tokens: N codes for an image.
        known: So many ids the text tokenizer had before images' were added; all of them, where these were found there.
    """

    begin: int
    end: int
    offset: int
    vocab_size: int
    num_tokens: int
    known: int = field(compare=False, default=0)

    @classmethod
    def add_to(
        cls, words: PreTrainedTokenizerBase, images: ImageTokenizer, *, begin: str = BEGIN, end: str = END
    ) -> Self:
        """Add the two marks and the V codes to a text tokenizer, in place; asked again, find them there.

        Args:
            words: The language model's tokenizer. Its ``save_pretrained`` saves what was added.
            images: Whose codes they are.
            begin: Mark in front of an image; choose others where a vision-language model has a use for ``<image>``.
            end: Mark behind it.

        Raises:
            ValueError: The two marks are one, or codes of another number were added before.
        """
        if begin == end:
            raise ValueError(f"begin and end must differ, got {begin!r} twice")
        known = len(words)
        texts = [begin, end, *(f"<code_{code}>" for code in range(images.vocab_size))]
        words.add_tokens([AddedToken(text, normalized=False, special=True) for text in texts], special_tokens=True)
        first, last, *codes = words.convert_tokens_to_ids(texts)
        beyond = f"<code_{images.vocab_size}>"
        if codes != list(range(codes[0], codes[0] + len(codes))) or beyond in words.get_added_vocab():
            raise ValueError(f"the text tokenizer has codes of its own that are not these {images.vocab_size}")
        return cls(first, last, codes[0], images.vocab_size, images.num_tokens, known)

    @property
    def size(self) -> int:
        """How many ids a model needs, its own included, if images' come last."""
        return max(self.begin, self.end, self.offset + self.vocab_size - 1) + 1

    def ids(self, codes: Tensor) -> Tensor:
        """Codes (B, N), integers of any width -> ids (B, N + 2) int64, marks included.

        Raises:
            ValueError: They are no images' codes.
        """
        if codes.ndim != 2 or codes.shape[1] != self.num_tokens:
            raise ValueError(f"codes must be (B, {self.num_tokens}), got {tuple(codes.shape)}")
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be integers, got {codes.dtype}")
        codes = codes.long()
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.vocab_size:
            raise ValueError(f"codes must lie in [0, {self.vocab_size}), got {int(codes.min())}..{int(codes.max())}")
        marks = codes.new_tensor([self.begin, self.end]).expand(len(codes), 2)
        return torch.cat([marks[:, :1], codes + self.offset, marks[:, 1:]], dim=1)

    def join(self, parts: Sequence[Part], words: PreTrainedTokenizerBase, *, special: bool = False) -> list[int]:
        """Ids of texts and images in their order, with nothing between them.

        A text that reads like an image's token stays text, so that nobody can write an image into it.

        Args:
            parts: Texts, and codes (N,) of images.
            words: The text tokenizer.
            special: Whether texts may hold special tokens of the language model's own, such as its end of text or the
                marks of a chat; otherwise they stay text, too. For texts of yours, not of users.

        Raises:
            ValueError: A part is neither, or codes are no image's.
        """
        if isinstance(parts, str):
            raise ValueError(f"parts must be a list of texts and codes, got the text {parts[:40]!r}")
        found: list[int] = []
        for part in parts:
            if not isinstance(part, str):
                found += self.ids(torch.as_tensor(part)[None])[0].tolist()
            else:
                found += self._said_in(part, words, special=special)
        return found

    def _said_in(self, text: str, words: PreTrainedTokenizerBase, *, special: bool) -> list[int]:
        marks = [re.escape(str(words.convert_ids_to_tokens(each))) for each in (self.begin, self.end)]
        found: list[int] = []
        for number, piece in enumerate(re.split(f"({'|'.join(marks)}|<code_[0-9]+>)", text) if special else [text]):
            spelt = number % 2 == 1 or not special  # it reads like an image's
            found += words(piece, add_special_tokens=False, split_special_tokens=spelt)["input_ids"] if piece else []
        return found

    def split(self, ids: Sequence[int] | Tensor, words: PreTrainedTokenizerBase) -> list[Part]:
        """Texts and codes (N,) of images of what `join` gave or a model wrote; special tokens of its own are left out.

        Raises:
            ValueError: An image is not whole, a code stands outside one, or the ids are those of several texts.
        """
        row = torch.as_tensor(ids, dtype=torch.int64)
        if row.ndim != 1:
            raise ValueError(f"ids must be those of one text, (L,), got {tuple(row.shape)}")
        given: list[int] = row.tolist()
        parts: list[Part] = []
        text: list[int] = []
        place = 0
        while place < len(given):
            if given[place] == self.begin:
                parts += self._said(text, words)
                text = []
                parts.append(self._codes(given[place : place + self.num_tokens + 2], place))
                place += self.num_tokens + 2
                continue
            if given[place] == self.end or self._is_code(given[place]):
                raise ValueError(f"id {given[place]} at place {place} is of an image, and none has begun")
            text.append(given[place])
            place += 1
        return parts + self._said(text, words)

    def _said(self, ids: list[int], words: PreTrainedTokenizerBase) -> list[Part]:
        said = str(words.decode(ids, skip_special_tokens=True)) if ids else ""
        return [said] if said else []

    def _codes(self, ids: list[int], place: int) -> Tensor:
        codes = [each - self.offset for each in ids[1:-1]]
        if len(ids) < self.num_tokens + 2 or ids[-1] != self.end or not all(map(self._is_code, ids[1:-1])):
            raise ValueError(f"the image that begins at place {place} is not {self.num_tokens} codes and a mark")
        return torch.tensor(codes, dtype=torch.int64)

    def _is_code(self, each: int) -> bool:
        return self.offset <= each < self.offset + self.vocab_size


def make_room(
    model: PreTrainedModel,
    vocabulary: ImageVocabulary,
    *,
    generator: torch.Generator,
    codebook: Tensor | None = None,
    learnt: bool | None = None,
) -> None:
    """Give a language model rows for an image's ids, in place; a model that has them already is left as it is.

    What it has is noted in ``model.config.image_vocabulary``, which its ``save_pretrained`` keeps.

    New rows are drawn with the mean and the spread of the model's own, in its embedding and its head. With a codebook
    the rows of codes are a random projection of it instead, so that codes that look alike begin alike.

    Args:
        model: Any causal model of ``transformers``; tied weights stay tied.
        vocabulary: Of its tokenizer.
        generator: On the CPU, the only randomness.
        codebook: (V, d), for instance a quantizer's `Quantizer.codes_to_embeddings` of all codes.
        learnt: Whether the model has learnt images before; by default what its config says.

    Raises:
        ValueError: A codebook of another size, or nobody says whether images were learnt: the tokenizer has had these
            ids before, the model has rows for them, and its config says nothing.
    """
    if codebook is not None and (codebook.ndim != 2 or len(codebook) != vocabulary.vocab_size):
        raise ValueError(f"the codebook must be ({vocabulary.vocab_size}, d), got {tuple(codebook.shape)}")
    note = [vocabulary.begin, vocabulary.end, vocabulary.offset, vocabulary.vocab_size]
    if learnt is None:
        learnt = _has_learnt(model, vocabulary, note)
    setattr(model.config, _LEARNT, note)
    if learnt:
        return
    if len(model.get_input_embeddings().weight) < vocabulary.size:  # some models have spare rows
        model.resize_token_embeddings(vocabulary.size, mean_resizing=False)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(table.weight): table.weight for table in tables if table is not None}
    for weight in weights.values():
        _fill(weight, vocabulary, codebook, generator)


def _has_learnt(model: PreTrainedModel, vocabulary: ImageVocabulary, note: list[int]) -> bool:
    noted = getattr(model.config, _LEARNT, None)
    if noted is not None and list(noted) != note:
        raise ValueError(f"the model has rows for images of other ids ({list(noted)}, and not {note})")
    new = vocabulary.known <= vocabulary.offset or len(model.get_input_embeddings().weight) < vocabulary.size
    if noted is None and not new:
        raise ValueError(
            "the tokenizer has had images' ids before, and the model may have learnt them: say learnt=True to leave "
            "its rows as they are, or learnt=False to make them anew"
        )
    return noted is not None


@torch.no_grad()
def _fill(weight: Tensor, vocabulary: ImageVocabulary, codebook: Tensor | None, generator: torch.Generator) -> None:
    own = weight[: min(vocabulary.begin, vocabulary.end, vocabulary.offset)].float()  # of words
    ids = torch.tensor(
        [vocabulary.begin, vocabulary.end, *range(vocabulary.offset, vocabulary.offset + vocabulary.vocab_size)]
    )
    rows = torch.randn(len(ids), weight.shape[1], generator=generator)
    # A mark that a vision-language model had is its own; of a tokenizer that was saved only places tell.
    known = vocabulary.known if vocabulary.known <= vocabulary.offset else vocabulary.offset - 2
    if codebook is not None:
        table = codebook.detach().float().cpu()
        table = (table - table.mean(0)) / table.std(0).clamp(min=1e-6)
        mixing = torch.randn(table.shape[1], weight.shape[1], generator=generator) / table.shape[1] ** 0.5
        rows[2:] = table @ mixing
    new = ids >= known
    weight[ids[new].to(weight.device)] = (own.mean(0) + own.std(0) * rows[new].to(own.device)).to(weight.dtype)


class WholeImages(LogitsProcessor):
    """Lets a model write whole images only: after the mark N codes, then the end; no code anywhere else.

    For ``model.generate(..., logits_processor=[WholeImages(vocabulary)])``.

    Args:
        vocabulary: Of the model's tokenizer.
    """

    def __init__(self, vocabulary: ImageVocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Ids (B, L) so far and scores (B, vocabulary) of the next one -> scores, -inf where nothing may follow."""
        known = self.vocabulary
        recent = input_ids[:, -(known.num_tokens + 1) :]
        begun = recent == known.begin
        since = begun.flip(1).long().argmax(1)  # ids after the last mark
        inside = begun.any(1)
        code = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        code[known.offset : known.offset + known.vocab_size] = True
        end = torch.zeros_like(code)
        end[known.end] = True
        asks_code, asks_end = (
            (inside & (since < known.num_tokens))[:, None],
            (inside & (since == known.num_tokens))[:, None],
        )
        allowed = torch.where(asks_code, code, torch.where(asks_end, end, ~(code | end)))
        return scores.masked_fill(~allowed, -torch.inf)
