"""Code decoders of the tokenizer: `LightDecoder` (stage 0), `DiffusionDecoder` (1) and `ConsistencyDecoder` (2).

Files name the classes as ``layton.decoders.NAME``, wherever in this package they are written.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layton.decoders.consistency import ConsistencyDecoder
    from layton.decoders.diffusion import DiffusionDecoder
    from layton.decoders.latent import SAMPLING_FOLDER
    from layton.decoders.light import LightDecoder

__all__ = ["SAMPLING_FOLDER", "ConsistencyDecoder", "DiffusionDecoder", "LightDecoder"]

_PLACES = {
    "ConsistencyDecoder": "consistency",
    "DiffusionDecoder": "diffusion",
    "LightDecoder": "light",
    "SAMPLING_FOLDER": "latent",
}


def __getattr__(name: str) -> object:
    """Import a decoder when it is first asked for: the light one does without diffusers (PEP 562)."""
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
