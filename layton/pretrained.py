"""Trained parts as a starting point of another run: functions that a run file names where it would name a class.

    encoder: {class_path: layton.pretrained.vit_encoder, init_args: {folder: runs/tokenizer/export/encoder}}

With ``frozen`` a part does not learn. Encoder and codebook frozen is decoder-only tuning: old tokens stay valid.
Parts that learn come in training mode: Lightning leaves modes as they are, and a quantizer in evaluation mode neither
learns nor holds the features to its codes.
"""

from __future__ import annotations

from layton.assets import LIGHT, resolve
from layton.encoder import ViTEncoder
from layton.pixel_decoder import PixelDecoder
from layton.quantizers import Quantizer
from layton.vqgan import VQGANEncoder


def vit_encoder(folder: str, *, frozen: bool = False) -> ViTEncoder:
    """A saved `ViTEncoder`.

    Args:
        folder: What its ``save_pretrained`` wrote, or the name of an embedded tokenizer, ``mini``.
        frozen: Keep it as it is.

    Raises:
        ValueError: If the folder holds something else.
    """
    return ViTEncoder.from_pretrained(resolve(folder, part="encoder")).requires_grad_(not frozen).train(not frozen)


def vqgan_encoder(folder: str, *, frozen: bool = False) -> VQGANEncoder:
    """A saved `VQGANEncoder`; see `vit_encoder`."""
    return VQGANEncoder.from_pretrained(resolve(folder, part="encoder")).requires_grad_(not frozen).train(not frozen)


def quantizer(folder: str, *, frozen: bool = False) -> Quantizer:
    """A saved quantizer of any kind; see `vit_encoder`. Its averages start anew, with equal counts for all codes."""
    loaded = Quantizer.from_pretrained(resolve(folder, part="quantizer"))
    return loaded.freeze() if frozen else loaded.train()


def pixel_decoder(folder: str, *, frozen: bool = False) -> PixelDecoder:
    """A saved `PixelDecoder`; see `vit_encoder`."""
    return PixelDecoder.from_pretrained(resolve(folder, part=LIGHT)).requires_grad_(not frozen).train(not frozen)
