"""LaytonGen: text to image tokens to images, and the alternative decoders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.lazy import lazily

if TYPE_CHECKING:
    from generation.data.source import TokenShards
    from generation.generator import Generator, load_generator
    from generation.llm import ImageVocabulary
    from generation.model.transformer import LaytonGenTransformer
    from generation.pipeline import LaytonGenOutput, LaytonGenPipeline

__all__ = [
    "Generator",
    "ImageVocabulary",
    "LaytonGenOutput",
    "LaytonGenPipeline",
    "LaytonGenTransformer",
    "TokenShards",
    "load_generator",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Generator": "generator",
        "ImageVocabulary": "llm",
        "LaytonGenOutput": "pipeline",
        "LaytonGenPipeline": "pipeline",
        "LaytonGenTransformer": "model.transformer",
        "TokenShards": "data.source",
        "load_generator": "generator",
    },
)
