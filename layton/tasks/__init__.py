"""Training tasks: one LightningModule per stage, all built on `layton.tasks.base.LaytonTask`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.lazy import lazily

if TYPE_CHECKING:
    from layton.tasks.autoencoder import AutoencoderTask
    from layton.tasks.base import LaytonTask
    from layton.tasks.consistency_decoder import ConsistencyDecoderTask
    from layton.tasks.decoder import DecoderTask
    from layton.tasks.distill import DistillTask
    from layton.tasks.text_to_image import TextToImageTask
    from layton.tasks.tokenizer import AdversarialTokenizerTask, TokenizerTask

__all__ = [
    "AdversarialTokenizerTask",
    "AutoencoderTask",
    "ConsistencyDecoderTask",
    "DecoderTask",
    "DistillTask",
    "LaytonTask",
    "TextToImageTask",
    "TokenizerTask",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "AdversarialTokenizerTask": "tokenizer",
        "AutoencoderTask": "autoencoder",
        "ConsistencyDecoderTask": "consistency_decoder",
        "DecoderTask": "decoder",
        "DistillTask": "distill",
        "LaytonTask": "base",
        "TextToImageTask": "text_to_image",
        "TokenizerTask": "tokenizer",
    },
)
