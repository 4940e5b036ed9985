"""Released checkpoints into this library's parts; the back end of ``layton convert``."""

from __future__ import annotations

from layton.convert.checkpoint import ConvertError, read_checkpoint
from layton.convert.llamagen import ConvertedVQGAN, convert_vqgan
from layton.convert.tokenizer import ConvertedParts, convert_tokenizer

__all__ = [
    "ConvertError",
    "ConvertedParts",
    "ConvertedVQGAN",
    "convert_tokenizer",
    "convert_vqgan",
    "read_checkpoint",
]
