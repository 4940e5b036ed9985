"""The quantizers of the tokenizer: features (B, d, h, w) to codes (B, N) and back.

`CosineVQ` is the default (16,384 codes of 8 dimensions, unit length); the others are chosen in a run's YAML by
``class_path``. All of them work through `vector_quantize_pytorch`; its return tuples stop here.
"""

from __future__ import annotations

from layton.quantizers.base import Quantizer, QuantizerOutput
from layton.quantizers.health import CodebookCollapseWarning, CodebookHealth, HealthMonitor
from layton.quantizers.lookup_free import FSQQuantizer, LFQQuantizer, SimVQQuantizer
from layton.quantizers.vq import CosineVQ, EuclideanVQ

QUANTIZERS: dict[str, type[Quantizer]] = {
    cls.__name__: cls for cls in (CosineVQ, EuclideanVQ, SimVQQuantizer, FSQQuantizer, LFQQuantizer)
}
"""The classes that a saved folder may name."""

__all__ = [
    "QUANTIZERS",
    "CodebookCollapseWarning",
    "CodebookHealth",
    "CosineVQ",
    "EuclideanVQ",
    "FSQQuantizer",
    "HealthMonitor",
    "LFQQuantizer",
    "Quantizer",
    "QuantizerOutput",
    "SimVQQuantizer",
]
