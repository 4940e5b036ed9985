"""Tokenizer and text encoder of the small latent diffusion model: CLIP's classes with a vocabulary of our own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerBase

from layton.modules import variant_of
from layton.scenes import caption, sample_scene
from layton.scenes.captions import vocabulary
from layton.scenes.placed import DIAMETER_TOKENS, SQUARE_TOKENS

_OWN_VOCABULARY = 2048  # no vocabulary of the world at large is as small
# no picture is missed for want of them
_FILLING_WORDS = frozenset(["the", "in", "on", "with", "at", "of", "to", "there", "is", "are"])
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"


def scene_captions(count: int, *, language: Literal["en", "zh"]) -> Iterator[str]:
    """Captions of the first training Scenes."""
    return (caption(sample_scene(seed), language=language) for seed in range(count))


def build_tokenizer(
    corpus: Iterable[str] | None = None, *, vocab_size: int = 1280, max_length: int = 32
) -> CLIPTokenizer:
    """Train a byte-level BPE vocabulary for CLIP's tokenizer.

    Every byte is in the vocabulary, also as the end of a word, so that no text is unknown to it. Chinese is written
    without spaces, so learnt merges would swallow whole sentences; each character is one token instead.

    Args:
        corpus: Texts to learn merges from; None takes the captions of 4,000 training Scenes.
        vocab_size: Entries that the training may make, the 512 byte symbols included.
        max_length: Tokens of a prompt, the two special ones included; longer prompts are cut by the pipeline.

    Returns:
        The tokenizer; the same for the same corpus, in every process: a resumed run builds it again.
    """
    base: Tokenizer = CLIPTokenizer().backend_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        # Named as special tokens, the word-final symbols get their numbers in this order, and ties between merges,
        # which go by number, fall the same way each time; the trainer's own order is that of a hash map.
        special_tokens=[BOS, EOS, *(symbol + END_OF_WORD for symbol in alphabet)],
        initial_alphabet=alphabet,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    base.train_from_iterator(corpus if corpus is not None else scene_captions(4000, language="en"), trainer)
    model = json.loads(base.to_str())["model"]
    characters = sorted({c for text in scene_captions(4000, language="zh") for c in text if not c.isspace()})
    merges = [tuple(merge) for merge in model["merges"]] + character_merges(characters)
    entries = sorted(model["vocab"], key=lambda entry: model["vocab"][entry])
    entries += ["".join(merge) for merge in merges]
    vocab = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def character_merges(characters: list[str]) -> list[tuple[str, str]]:
    """BPE merges that make one token of each character of several bytes, within a word and at its end."""
    merges: dict[tuple[str, str], None] = {}
    for character in characters:
        symbols = ByteLevel(add_prefix_space=False).pre_tokenize_str(character)[0][0]
        for last in (symbols[-1], symbols[-1] + END_OF_WORD):
            parts = [*symbols[:-1], last]
            for length in range(1, len(parts)):
                merges["".join(parts[:length]), parts[length]] = None
    return list(merges)


def build_text_encoder(
    tokenizer: CLIPTokenizer, *, width: int = 192, depth: int = 3, num_heads: int = 4
) -> CLIPTextModel:
    """A CLIP text model of D = ``width`` for a tokenizer, randomly initialised; trained together with the UNet."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        max_position_embeddings=int(tokenizer.model_max_length),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def read_text_parts(pipeline: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Tokenizer and text encoder of a pipeline folder, in float32, whatever else is there.

    Raises:
        ValueError: If one of them is missing or damaged.
    """
    try:
        tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer", local_files_only=True)
        place = pipeline / "text_encoder"
        model = CLIPTextModel.from_pretrained(
            place, local_files_only=True, use_safetensors=True, variant=variant_of(place)
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{pipeline}: tokenizer or text_encoder cannot be read ({error})") from error
    return tokenizer, model.float()


def knows_places(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a pipeline's tokenizer has the words of `layton.scenes.placed`."""
    return DIAMETER_TOKENS.keys() | SQUARE_TOKENS.keys() <= tokenizer.get_vocab().keys()


def unread_words(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[str]:
    """Words of a prompt that captions of Scenes never have: a vocabulary made of these takes them for letters.

    Returns:
        Words, of Chinese characters, in their order; none where the vocabulary is a large one, of words' parts.
    """
    if len(tokenizer) > _OWN_VOCABULARY:
        return []
    words = re.findall(r"[\u3400-\u9fff]|[^\W\d_\u3400-\u9fff]+", re.sub(r"<\w+>", " ", prompt.lower()))
    known = _FILLING_WORDS.union(vocabulary())
    return [word for word in dict.fromkeys(words) if word not in known]


def remark_on(prompt: str, unread: Sequence[str], *, kept: int = 0, total: int = 0) -> str:
    """What was not read of a prompt, in words; empty if all was.

    Args:
        prompt: The prompt.
        unread: Words that are not in the vocabulary, see `unread_words`.
        kept: Tokens that were read.
        total: Tokens that it has.
    """
    told = [f"not in its vocabulary: {', '.join(unread)}"] if unread else []
    if not any(character.isalnum() for character in prompt):
        told.append("there is no word in it")
    if kept < total:
        told.append(f"{kept} of its {total} tokens are read")
    return "; ".join(told)


def hears_places(pipeline: Path) -> bool:
    """Whether the tokenizer of a pipeline's folder has them; not if the folder has none."""
    if not (pipeline / "tokenizer").is_dir():
        return False
    return knows_places(AutoTokenizer.from_pretrained(pipeline / "tokenizer", local_files_only=True))


def tell_places(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """Add the tokens of `layton.scenes.placed`, in place. What the model made of other prompts stays as it was.

    Tokens of neighbouring squares, and of diameters alike, begin alike: waves of their places, as far apart as the
    tokens that are there. Without effect where they are known already.
    """
    values = [(size, size, 0.0) for size in DIAMETER_TOKENS.values()] + [(0.0, x, y) for x, y in SQUARE_TOKENS.values()]
    added = tokenizer.add_tokens([*DIAMETER_TOKENS, *SQUARE_TOKENS])
    if not added:
        return
    if added < len(values):
        raise ValueError(f"the tokenizer knows some of the tokens of places, but not {added} of {len(values)}")
    old = text_encoder.get_input_embeddings().weight.detach()
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    frequencies = 2 * math.pi * torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0])
    angles = torch.tensor(values)[:, :, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    new = waves @ torch.randn(waves.shape[1], old.shape[1], generator=torch.Generator().manual_seed(0))
    new = (new - new.mean(0)) / new.std() * old.float().std()
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight[len(tokenizer) - added :] = new.to(old)


class TextConditioner(nn.Module):
    """Prompts to embeddings exactly as ``StableDiffusionPipeline`` does it: padded to the full length, no mask.

    Args:
        tokenizer: CLIP tokenizer; None builds the embedded world's.
        text_encoder: CLIP text model; None builds one for the tokenizer.
    """

    def __init__(self, tokenizer: CLIPTokenizer | None = None, text_encoder: CLIPTextModel | None = None) -> None:
        super().__init__()
        self.tokenizer = tokenizer if tokenizer is not None else build_tokenizer()
        self.text_encoder = text_encoder if text_encoder is not None else build_text_encoder(self.tokenizer)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids (B, L) int64 of B prompts, cut and padded to L = ``model_max_length``."""
        return self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=int(self.tokenizer.model_max_length),
            return_tensors="pt",
        ).input_ids

    def forward(self, prompts: list[str]) -> Tensor:
        """Embeddings (B, L, D) of B prompts."""
        device = next(self.text_encoder.parameters()).device
        return self.text_encoder(self.tokenize(prompts).to(device)).last_hidden_state

    @torch.no_grad()
    def null(self) -> Tensor:
        """Embedding (L, D) of the empty prompt."""
        return self([""])[0].float()
