"""Code decoders of the tokenizer: `LightDecoder` (stage 0), `DiffusionDecoder` (1) and `ConsistencyDecoder` (2).

Files name the classes as ``layton.decoders.NAME``, wherever in this package they are written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.lazy import lazily

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

__getattr__, __dir__ = lazily(__name__, _PLACES)  # the light one is there without diffusers
