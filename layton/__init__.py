"""The Layton tokenizer: an image becomes 256 tokens and comes back (arXiv 2503.08377)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layton.tokenizer import LaytonTokenizer

__all__ = ["LaytonTokenizer", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import the tokenizer when it is first asked for: ``import layton`` alone stays light (PEP 562)."""
    if name == "LaytonTokenizer":
        from layton.tokenizer import LaytonTokenizer

        return LaytonTokenizer
    raise AttributeError(f"module 'layton' has no attribute {name!r}")
