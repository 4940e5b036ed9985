"""Trained parts as a starting point of another run, as `layton.pretrained` has them for the tokenizer.

    transformer: {class_path: generation.pretrained.laytongen_transformer, init_args: {folder: runs/a/transformer}}

For a text encoder see `generation.text.encoders.text_encoder`.
"""

from __future__ import annotations

from generation.caption_judge import CaptionJudge
from generation.judge import Judge
from generation.model.layout import LayoutShape
from generation.model.shapes import Dropout
from generation.model.transformer import LaytonGenTransformer
from generation.planner import LayoutPlanner


def laytongen_transformer(
    folder: str, layout: LayoutShape | None = None, dropout: Dropout | None = None
) -> LaytonGenTransformer:
    """A saved `LaytonGenTransformer` that goes on learning.

    Args:
        folder: What its ``save_pretrained`` wrote.
        layout: What it shall learn to be told of where objects stand; at first it goes on as without. None leaves it
            what it is.
        dropout: While it goes on learning; None leaves it what it was. Rewards and ``contrast`` want none at all:
            ``{token: 0, residual: 0, ffn: 0}``.

    Raises:
        ValueError: If the folder holds something else, a quantized model, which cannot learn, or one that is told
            other layouts already.
    """
    transformer = LaytonGenTransformer.from_pretrained(folder)
    if transformer.config.get("int8"):
        raise ValueError(f"{folder} holds an int8 model, which cannot learn")
    if layout is not None:
        transformer.learn_layouts(layout)
    if dropout is not None:
        transformer.set_dropout(dropout)
    return transformer.train()


def judge(folder: str) -> Judge:
    """The network of a saved `generation.caption_judge.CaptionJudge`, to go on learning.

    Args:
        folder: What its ``save_pretrained`` wrote.

    Raises:
        ValueError: If the folder holds something else.
    """
    return CaptionJudge.from_pretrained(folder).judge.requires_grad_(True).train()


def planner(folder: str) -> LayoutPlanner:
    """A saved `generation.planner.LayoutPlanner` that goes on learning.

    Args:
        folder: What its ``save_pretrained`` wrote.

    Raises:
        ValueError: If the folder holds something else.
    """
    return LayoutPlanner.from_pretrained(folder).train()
