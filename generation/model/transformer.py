"""LaytonGen's transformer: caption or class, then 256 image tokens, each predicted from all before it.

Legend: B images, L prefix tokens (1 for a class), N image tokens, V vocabulary, D width, T = L + N - 1 tokens that are
fed. The last prefix token predicts code 0, code i predicts code i + 1 (LlamaGen, arXiv 2406.06525).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from generation.model.blocks import Block
from generation.model.layout import UNTOLD, LayoutControl, LayoutShape
from generation.model.prefix import CaptionPrefix, ClassPrefix
from generation.model.rope import CaptionRotary, Rotation, rotation_table
from generation.model.shapes import SIZES, CaptionShape, Dropout, Factors, swiglu_width
from generation.model.vocabulary import FactoredVocabulary, FullVocabulary
from layton.folder import WEIGHTS_NAME, JsonValue, class_name, load_config, load_tensors, require_match, save_pretrained

if TYPE_CHECKING:
    from generation.model.compiled import CompiledStep


class LaytonGenTransformer(nn.Module):
    """Llama-style transformer over the codes of an image.

    Either ``caption`` or ``num_classes`` says what is generated from.

    Args:
        width: D.
        depth: Number of blocks.
        num_heads: Attention heads; must divide the width into multiples of 4.
        hidden: Width inside SwiGLU; None for LlamaGen's rule, two thirds of 4 D rounded up to a multiple of 256.
        caption: Shape of captions.
        num_classes: Number of classes of a class-conditional model.
        vocab_size: V.
        num_tokens: N, a square number.
        factors: Tied token layers of low rank; None for a full embedding and a full head.
        layout: What it may also be told of where objects stand; None for nothing.
        dropout: While training.
        zero_head: Start with all logits 0 (LlamaGen); otherwise the head starts like all other layers, N(0, 0.02).
        class_rotary: Rotary factors at the place of the class token (`generation.model.rope`); captions carry theirs.
        rope_base: Wave-length base of the rotary positions.

    Attributes:
        gradient_checkpointing: Whether training recomputes each block in the backward pass instead of keeping it.
        compiled_step: What decodes one code; None until `generation.model.compiled.compile_decoding`.

    Raises:
        ValueError: If sizes do not fit, or both or none of ``caption`` and ``num_classes`` are given.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_heads: int,
        hidden: int | None = None,
        caption: CaptionShape | None = None,
        num_classes: int | None = None,
        vocab_size: int = 16384,
        num_tokens: int = 256,
        factors: Factors | None = None,
        layout: LayoutShape | None = None,
        dropout: Dropout | None = None,
        zero_head: bool = True,
        class_rotary: CaptionRotary = "identity",
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__()
        if (caption is None) == (num_classes is None):
            raise ValueError(f"give one of caption and num_classes, got {caption} and {num_classes}")
        if min(width, depth, num_heads, vocab_size, num_tokens) < 1:
            raise ValueError(f"sizes must be positive, got {(width, depth, num_heads, vocab_size, num_tokens)}")
        self.width, self.num_heads, self.rope_base = width, num_heads, rope_base
        self._prefix_rotary = class_rotary if caption is None else caption.rotary
        self.vocab_size, self.num_tokens = vocab_size, num_tokens
        self.caption = caption
        self.gradient_checkpointing = False
        self.compiled_step: CompiledStep | None = None
        self.config: dict[str, JsonValue] = {
            "width": width,
            "depth": depth,
            "num_heads": num_heads,
            "hidden": hidden,
            "caption": None if caption is None else asdict(caption),
            "num_classes": num_classes,
            "vocab_size": vocab_size,
            "num_tokens": num_tokens,
            "factors": None if factors is None else asdict(factors),
            "zero_head": zero_head,
            "class_rotary": class_rotary,
            "rope_base": rope_base,
        }
        self.prefix: CaptionPrefix | ClassPrefix
        self.prefix = CaptionPrefix(caption, width) if caption is not None else ClassPrefix(num_classes or 0, width)
        self.vocabulary: FullVocabulary | FactoredVocabulary
        self.vocabulary = (
            FullVocabulary(vocab_size, width) if factors is None else FactoredVocabulary(vocab_size, width, factors)
        )
        inner = hidden or swiglu_width(width)
        self.blocks = nn.ModuleList(Block(width, num_heads, inner) for _ in range(depth))
        self.set_dropout(dropout or Dropout())
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.rotations(1)  # checks the grid and the heads
        self.apply(_init)
        if zero_head:
            self.vocabulary.zero_head()
        self.layout_control: LayoutControl | None = None
        if layout is not None:
            self.learn_layouts(layout)

    def set_dropout(self, dropout: Dropout) -> None:
        """Have elements dropped at these rates while it learns from now on."""
        self.dropout, self.config["dropout"] = dropout, asdict(dropout)
        for block in self.blocks:
            block.residual_dropout, block.ffn_dropout = dropout.residual, dropout.ffn  # type: ignore[assignment]

    def learn_layouts(self, layout: LayoutShape) -> None:
        """Make room for being told where objects stand, which changes nothing at first.

        Raises:
            ValueError: If it is told layouts of another shape already.
        """
        if self.layout_control is not None:
            if self.layout_control.shape != layout:
                raise ValueError(f"the transformer is told layouts of {self.layout_control.shape}, not of {layout}")
            return
        self.layout_control = LayoutControl(layout, self.num_tokens, self.width)
        self.layout_control.apply(_init)
        self.layout_control.start_silent()
        self.config["layout"] = cast("dict[str, JsonValue]", asdict(layout))

    @classmethod
    def from_size(
        cls,
        size: str,
        *,
        caption: CaptionShape | None = None,
        num_classes: int | None = None,
        vocab_size: int = 16384,
        num_tokens: int = 256,
        dropout: Dropout | None = None,
        zero_head: bool = True,
    ) -> Self:
        """A model of a named size: tiny, mini, small, B, L, XL, XXL or 3B (`generation.model.shapes.SIZES`).

        Raises:
            ValueError: If there is no such size.
        """
        if size not in SIZES:
            raise ValueError(f"there is no size {size!r}; there are {', '.join(SIZES)}")
        shape = SIZES[size]
        return cls(
            width=shape.width,
            depth=shape.depth,
            num_heads=shape.num_heads,
            hidden=shape.hidden,
            caption=caption,
            num_classes=num_classes,
            vocab_size=vocab_size,
            num_tokens=num_tokens,
            factors=shape.factors,
            dropout=dropout,
            zero_head=zero_head,
        )

    def forward(
        self,
        codes: Tensor,
        condition: Tensor,
        mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        layout: Tensor | None = None,
    ) -> Tensor:
        """Logits of every code, given the condition and all codes before it (teacher forcing).

        Args:
            codes: (B, N) int64; the last code is not looked at. Fewer than N columns give logits for those.
            condition: Text features (B, L, dim), padded on the left, or labels (B,).
            mask: (B, L), true where a caption token is real; None when all are.
            positions: (B, N) int64 places of the codes on the image grid, row-major, for codes that are a part of an
                image; None when they are its first N.
            layout: (B, M, F) int64 where objects stand (`generation.model.layout`); None when nothing is told of it.

        Returns:
            (B, N, V).

        Raises:
            ValueError: If a layout is given to a model that knows none, or does not fit.
        """
        return self.vocabulary.logits(self.hidden(codes, condition, mask, positions=positions, layout=layout))

    def hidden(
        self,
        codes: Tensor,
        condition: Tensor,
        mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        layout: Tensor | None = None,
    ) -> Tensor:
        """What the logits of `forward` are made of, (B, N, D), from the same arguments."""
        kind = self.norm.weight.dtype  # under autocast the residual stream stays in the weights' own precision
        prefix = self.prefix(condition).to(kind)
        length = prefix.shape[1]
        x = torch.cat([prefix, self.vocabulary.embed(codes[:, :-1]).to(kind)], dim=1)
        control = self.control(layout, len(codes))
        if control is not None:
            rows = torch.arange(len(codes), device=x.device)[:, None]
            chosen = control[:, : codes.shape[1]] if positions is None else control[rows, positions]
            x = torch.cat([x[:, : length - 1], x[:, length - 1 :] + chosen.to(kind)], dim=1)
        if self.training:
            x = F.dropout(x, self.dropout.token)
        bias = attention_bias(mask, queries=x.shape[1], keys=x.shape[1], device=x.device, dtype=x.dtype)
        table = self.rotations(length, device=x.device)
        if positions is None:
            rotation = table.at(0, x.shape[1])
        else:
            caption = torch.arange(length, device=x.device).expand(len(x), length)
            rotation = table.pick(torch.cat([caption, length + positions[:, :-1]], dim=1))
        return self.run(x, rotation, bias)[:, length - 1 :]

    def control(self, layout: Tensor | None, rows: int) -> Tensor | None:
        """What is added where each code is predicted, (B, N, D); None when nothing is told.

        Raises:
            ValueError: If a layout is given to a model that knows none, or does not fit.
        """
        if layout is None:
            return None
        if self.layout_control is None:
            raise ValueError("the transformer was not trained with layouts, one is given")
        self.layout_control.shape.check(layout, rows)
        control: Tensor = self.layout_control(layout)
        return control

    def run(self, x: Tensor, rotation: Rotation, bias: Tensor | None) -> Tensor:
        """All blocks and the last norm: (B, T, D) -> (B, T, D)."""
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, rotation, bias, use_reentrant=False) if recompute else block(x, rotation, bias)
        return self.norm(x)

    def rotations(self, prefix_length: int, *, device: torch.device | str | None = None) -> Rotation:
        """Rotary factors of a prefix and the image grid."""
        return rotation_table(
            prefix_length,
            self.num_tokens,
            self.width // self.num_heads,
            base=self.rope_base,
            caption=self._prefix_rotary,
            device=device,
        )

    def drop_condition(self, condition: Tensor, dropped: Tensor) -> Tensor:
        """Replace conditions by "none" where ``dropped`` (B,) is true; for training with classifier-free guidance."""
        return self.prefix.drop(condition, dropped)

    def null_condition(self, condition: Tensor) -> Tensor:
        """The condition "none", shaped like ``condition``: features (B, L, dim) or labels (B,)."""
        return self.prefix.unconditional(condition)

    def drop_layout(self, layout: Tensor, dropped: Tensor) -> Tensor:
        """Layouts (B, M, F) that are not given where ``dropped`` (B,) is true."""
        return torch.where(dropped[:, None, None], UNTOLD, layout)

    def set_codebook(self, codebook: Tensor) -> None:
        """Give a model with factored tokens the tokenizer's codebook (V, d).

        Raises:
            ValueError: If the model has no place for it, or the shape is another.
        """
        if not isinstance(self.vocabulary, FactoredVocabulary):
            raise ValueError("only a model with factors holds a codebook, this one has a full embedding")
        self.vocabulary.set_codebook(codebook)

    def save_pretrained(self, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``; ``dtype`` is what weights are stored as.

        Raises:
            ValueError: If int8 weights should be stored as another type.
        """
        if self.config.get("int8") and dtype not in (None, torch.float32):
            raise ValueError(f"an int8 model is saved as it is: give no dtype, got {dtype}")
        save_pretrained(self, self.config, folder, dtype=dtype)

    @classmethod
    def from_pretrained(cls, folder: Path | str, *, dtype: torch.dtype = torch.float32) -> Self:
        """Load what `save_pretrained` wrote, in eval mode.

        Args:
            folder: Where it is.
            dtype: Type of the weights in memory; of a model that was saved quantized, only float32.

        Raises:
            ValueError: If the folder holds something else, or tensors are missing, unknown or mis-shaped.
        """
        config = load_config(Path(folder), expected_class=class_name(cls))
        del config["class"]
        int8 = bool(config.pop("int8", False))
        if int8 and dtype != torch.float32:
            raise ValueError(f"{folder} holds an int8 model, which computes in float32: it cannot be {dtype}")
        try:
            with torch.device("meta"):  # no random numbers and no second copy of the weights
                model = cls(**_arguments(config))
        except TypeError as error:
            raise ValueError(f"{folder}: config does not fit {cls.__name__}: {error}") from error
        if int8:
            from generation.model.quantization import replace_linears

            replace_linears(model)
        tensors = load_tensors(Path(folder) / WEIGHTS_NAME)
        require_match(model.state_dict(), tensors, source=folder, target=cls.__name__)
        kinds = {name: dtype if value.is_floating_point() else value.dtype for name, value in tensors.items()}
        ready = {name: value.to(kinds[name], copy=True) for name, value in tensors.items()}
        model.load_state_dict(ready, assign=True)
        return model.eval()


def attention_bias(
    mask: Tensor | None, *, queries: int, keys: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor | None:
    """What is added to attention scores so that tokens see only real tokens before them, and themselves.

    Args:
        mask: (B, L), true for real caption tokens; None when all are.
        queries: How many of the last ``keys`` tokens ask.
        keys: Tokens that there are, caption first.
        device: Where.
        dtype: Of the result.

    Returns:
        (B or 1, 1, queries, keys) with 0 and -inf; None when one token asks and sees all. Padding sees itself, so
        that no softmax is over nothing.
    """
    if mask is None and queries == 1:
        return None
    place = torch.arange(keys, device=device)
    asking = place[keys - queries :, None]
    seen = (place <= asking)[None]
    if mask is not None:
        real = F.pad(mask.to(device=device, dtype=torch.bool), (0, keys - mask.shape[1]), value=True)
        seen = (seen & real[:, None]) | (place == asking)
    return torch.zeros(seen.shape, device=device, dtype=dtype).masked_fill(~seen, float("-inf"))[:, None]


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def _arguments(config: Mapping[str, JsonValue]) -> dict[str, Any]:
    nested = {"caption": CaptionShape, "factors": Factors, "dropout": Dropout, "layout": LayoutShape}
    return {
        name: nested[name](**cast("dict[str, Any]", value)) if name in nested and value is not None else value
        for name, value in config.items()
    }
