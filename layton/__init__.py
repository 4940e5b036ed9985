"""The Layton tokenizer: an image becomes 256 tokens and comes back (arXiv 2503.08377)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.lazy import lazily

if TYPE_CHECKING:
    from layton.codes_file import load_codes, save_codes
    from layton.tokenizer import LaytonTokenizer

__all__ = ["LaytonTokenizer", "__version__", "load_codes", "save_codes"]
__version__ = "0.1.0"
__getattr__, __dir__ = lazily(
    __name__, {"LaytonTokenizer": "tokenizer", "load_codes": "codes_file", "save_codes": "codes_file"}
)
