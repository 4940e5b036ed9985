"""Released GPT checkpoints (LaCTokGen-T, LlamaGen) into `LaytonGenTransformer`.

The released code turns neighbouring elements of a head as one plane, this library element i of a head's first half
with element i of its second half; the rows of query and key weights are put into that order once, here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from generation.model.shapes import CaptionShape
from generation.model.transformer import LaytonGenTransformer
from layton.convert.checkpoint import ConvertError, read_checkpoint
from layton.convert.layout import Layout, require, slot
from layton.convert.llamagen import count

HEAD_WIDTHS = {3200: 100, 4096: 128}
"""Released widths whose heads are not 64 wide."""
IGNORED = ("freqs_cis", "causal_mask")
"""Tables that some checkpoints carry; made anew here."""

_NAMES = (
    (r"^vocabulary\.embedding\.", "tok_embeddings."),
    (r"^vocabulary\.head\.", "output."),
    (r"^blocks\.(\d+)\.attention\.qkv\.", r"layers.\1.attention.wqkv."),
    (r"^blocks\.(\d+)\.attention\.out\.", r"layers.\1.attention.wo."),
    (r"^blocks\.(\d+)\.attention_norm\.", r"layers.\1.attention_norm."),
    (r"^blocks\.(\d+)\.ffn_norm\.", r"layers.\1.ffn_norm."),
    (r"^blocks\.(\d+)\.ffn\.down\.", r"layers.\1.feed_forward.w2."),
    (r"^prefix\.fc([12])\.", r"cls_embedding.cap_proj.fc\1."),
    (r"^prefix\.null$", "cls_embedding.uncond_embedding"),
    (r"^prefix\.embedding\.", "cls_embedding.embedding_table."),
)
_GATE_UP = re.compile(r"^blocks\.(\d+)\.ffn\.gate_up\.weight$")
_QKV = re.compile(r"\.attention\.qkv\.weight$")


@dataclass(frozen=True, slots=True)
class ReleasedShape:
    """What is read off the tensors of a released GPT file.

    Attributes:
        width: D.
        depth: Number of blocks.
        hidden: Width inside SwiGLU.
        vocab_size: V.
        caption: Shape of captions; None for a class-conditional model.
        num_classes: Of a class-conditional model.
    """

    width: int
    depth: int
    hidden: int
    vocab_size: int
    caption: CaptionShape | None
    num_classes: int | None

    @classmethod
    def read(cls, state: Mapping[str, Tensor], *, source: Path | str) -> ReleasedShape:
        """Read the shape.

        Raises:
            ConvertError: If tensors that tell it are missing.
        """
        try:
            vocab_size, width = state["tok_embeddings.weight"].shape
            hidden = state["layers.0.feed_forward.w1.weight"].shape[0]
            null = state.get("cls_embedding.uncond_embedding")
            classes = None if null is not None else state["cls_embedding.embedding_table.weight"].shape[0] - 1
        except (KeyError, ValueError) as error:
            raise ConvertError(source, [f"not a LlamaGen GPT: {error} is missing or mis-shaped"]) from error
        caption = None if null is None else CaptionShape(dim=null.shape[1], length=null.shape[0], rotary="zero")
        depth = count(state, r"^layers\.(\d+)\.")
        return cls(width, depth, hidden, vocab_size, caption, classes)

    def build(self, *, num_heads: int | None, num_tokens: int) -> LaytonGenTransformer:
        """An untrained model of this shape."""
        return LaytonGenTransformer(
            width=self.width,
            depth=self.depth,
            num_heads=num_heads or self.width // HEAD_WIDTHS.get(self.width, 64),
            hidden=self.hidden,
            caption=self.caption,
            num_classes=self.num_classes,
            class_rotary="zero",  # as all condition positions of the released models
            vocab_size=self.vocab_size,
            num_tokens=num_tokens,
        )


def official_names(key: str) -> tuple[str, ...]:
    """The released name, or for a fused weight the names, of one of this library's tensors."""
    fused = _GATE_UP.match(key)
    if fused:
        return tuple(f"layers.{fused[1]}.feed_forward.{part}.weight" for part in ("w1", "w3"))
    for pattern, replacement in _NAMES:
        key = re.sub(pattern, replacement, key)
    return (key,)


def gpt_layout(model: LaytonGenTransformer) -> Layout:
    """Names and shapes of a released file that fits ``model``."""
    layout: Layout = {}
    for key, value in model.state_dict().items():
        names = official_names(key)
        shape = (value.shape[0] // len(names), *value.shape[1:])
        layout |= {name: slot("model", key, value, file_shape=shape) for name in names}
    return layout


def half_planes(weight: Tensor, num_heads: int) -> Tensor:
    """Query, key and value rows (3 D, D) with planes as `generation.model.rope.rotate` has them."""
    query, key, value = weight.chunk(3)

    def reorder(part: Tensor) -> Tensor:
        return rearrange(part, "(k i two) d -> (k two i) d", k=num_heads, two=2)

    return torch.cat([reorder(query), reorder(key), value])


def convert_gpt(
    path: str | Path, *, num_heads: int | None = None, num_tokens: int = 256, dtype: torch.dtype = torch.float32
) -> LaytonGenTransformer:
    """Convert a LaCTokGen-T or LlamaGen GPT checkpoint; sizes are read off the tensors.

    Captions get the rotary tables of zeros with which the released models were trained (`generation.model.rope`).

    Args:
        path: ``.pt``, ``.pth`` or ``.safetensors``; nothing in it is executed.
        num_heads: Attention heads, which no tensor tells; those of the released model of that width when None.
        num_tokens: N.
        dtype: Type of the weights.

    Raises:
        ConvertError: The file is unreadable or has missing, unknown, mis-shaped or non-finite tensors; all are listed.
        ValueError: If ``num_heads`` or ``num_tokens`` do not fit.
    """
    state = read_checkpoint(path)
    shape = ReleasedShape.read(state, source=path)
    with torch.device("meta"):
        model = shape.build(num_heads=num_heads, num_tokens=num_tokens)
    require(gpt_layout(model), state, source=path, ignored=IGNORED)
    ready: dict[str, Tensor] = {}
    for key in model.state_dict():
        value = torch.cat([state[name] for name in official_names(key)])
        value = half_planes(value, model.num_heads) if _QKV.search(key) else value
        ready[key] = value.to(dtype, copy=True)
    model.load_state_dict(ready, assign=True)
    return model.eval()
