"""The Layton tokenizer: an image becomes 256 tokens and comes back (arXiv 2503.08377)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layton.codes_file import load_codes, save_codes
    from layton.tokenizer import LaytonTokenizer

__all__ = ["LaytonTokenizer", "__version__", "load_codes", "save_codes"]
__version__ = "0.1.0"
_PLACES = {"LaytonTokenizer": "tokenizer", "load_codes": "codes_file", "save_codes": "codes_file"}


def __getattr__(name: str) -> object:
    """Import what is first asked for: ``import layton`` alone stays light (PEP 562)."""
    if name in _PLACES:
        return getattr(import_module(f"layton.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'layton' has no attribute {name!r}")
