"""Tokenizers and encoders of transformers from local folders: safetensors only, no network, no code of the folder."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from layton.modules import variant_of

# model_type of a transformers config -> class that holds the text encoder alone; AutoModel for all others
_ENCODER_CLASSES = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        ValueError: If there is none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{folder} holds no tokenizer that transformers can load: {_first_line(error)}") from error


def require_cleaning() -> None:
    """Look for what DeepFloyd's cleaning of captions needs.

    Raises:
        ValueError: Packages are missing.
    """
    missing = [name for name in ("bs4", "ftfy") if find_spec(name) is None]
    if missing:
        raise ValueError(f"DeepFloyd's cleaning of captions needs {' and '.join(missing)}: pip install 'layton[clean]'")


@functools.lru_cache(maxsize=1024)  # several pictures of one prompt; it takes half a second for a thousand characters
def clean_caption(text: str) -> str:
    """DeepFloyd's cleaning, twice over, as diffusers has it: what the released models' captions went through.

    It needs what `require_cleaning` looks for.
    """
    from diffusers import IFPipeline

    cleaner: Any = IFPipeline.__new__(IFPipeline)  # its method uses nothing of the object
    return str(cleaner._text_preprocessing(text, clean_caption=True)[0])


def load_model(folder: Path) -> nn.Module:
    """The text encoder of a folder, in float32; of models that hold more, the text encoder alone.

    A pooler whose weights are not in the folder, which transformers would draw at random, is left out: features do
    not pass it.

    Raises:
        ValueError: If there is none that can be loaded, or weights are missing.
    """
    import transformers

    try:
        kind = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        if getattr(kind, "is_encoder_decoder", False) and kind.model_type not in _ENCODER_CLASSES:
            raise ValueError(f"{kind.model_type} is no text encoder")
        loader = getattr(transformers, _ENCODER_CLASSES.get(kind.model_type, "AutoModel"))
        with silent_transformers():
            model, report = loader.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                variant=variant_of(folder),
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{folder} holds no text encoder that can be loaded: {_first_line(error)}") from error
    missing = set(report["missing_keys"])
    if any(_is_pooler(key) for key in missing):
        model.pooler = None
    if lacking := sorted(key for key in missing if not _is_pooler(key)):
        raise ValueError(f"{folder} lacks {len(lacking)} weights of its text encoder, such as {lacking[0]}")
    return cast(nn.Module, model)


def _is_pooler(key: str) -> bool:
    return key.startswith("pooler.")


@contextmanager
def silent_transformers() -> Iterator[None]:
    """No progress bars and no advice of transformers within the block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
