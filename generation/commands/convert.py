"""``layton convert gpt``: released GPT checkpoints into model folders."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from layton.errors import UsageError

_SHOWN_PROBLEMS = 10


def convert_gpt(
    checkpoint: Path,
    *,
    out: Path,
    num_heads: int | None = None,
    num_tokens: int = 256,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> int:
    """Convert a LaCTokGen-T or LlamaGen GPT checkpoint into a folder for `LaytonGenTransformer.from_pretrained`.

    Sizes are read off the tensors. Every tensor of the file must be known, and every tensor needed must be there with
    its shape; else nothing is written and the first problems are listed.

    Args:
        checkpoint: a .pth, .pt or .safetensors file; nothing in it is executed.
        out: folder to write; must not exist.
        num_heads: attention heads; those of the released model of that width if not given.
        num_tokens: image tokens: 256 for 256 pixels, 576 for 384, 1024 for 512.
        dtype: of the weights on disk.
    """
    import torch

    from generation.convert import convert_gpt as convert
    from layton.commands.staging import staged
    from layton.convert import ConvertError

    if out.exists():
        raise UsageError(f"{out} exists already")
    kind: torch.dtype = getattr(torch, dtype)
    try:
        model = convert(checkpoint, num_heads=num_heads, num_tokens=num_tokens, dtype=kind)
    except ConvertError as error:
        shown = [f"  {problem}" for problem in error.problems[:_SHOWN_PROBLEMS]]
        more = len(error.problems) - len(shown)
        lines = [f"layton: {str(error).splitlines()[0]}", *shown, *([f"  and {more} more"] if more else [])]
        sys.stderr.write("\n".join(lines) + "\n")
        return 1
    with staged(out) as folder:
        model.save_pretrained(folder, dtype=kind)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sys.stdout.write(f"{parameters / 1e6:.0f}M parameters, {model.vocab_size} codes\n{out}\n")
    return 0
