"""Alternative code decoders, one step each: `InstaFlowDecoder` and `HiPADecoder`, and what trains them.

Both are distilled from Layton's stage-1 decoder and saved as what they change in it. Files name the classes as
``generation.decoders.NAME``; a tokenizer folder that lists them loads them by that name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from generation.decoders.hipa import HiPADecoder
    from generation.decoders.instaflow import InstaFlowDecoder

__all__ = ["HiPADecoder", "InstaFlowDecoder"]

_PLACES = {"HiPADecoder": "hipa", "InstaFlowDecoder": "instaflow"}


def __getattr__(name: str) -> object:
    """Import a decoder when it is first asked for: diffusers is slow to load (PEP 562)."""
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
