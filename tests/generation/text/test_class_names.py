"""Class-conditional generation: names of classes are prompts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from laytongen_parts import CODES, TOKENS, WIDTH, tiny_tokenizer
from torch.optim import AdamW

from generation.model.shapes import CaptionShape, Dropout, Factors
from generation.model.transformer import LaytonGenTransformer
from generation.pipeline import LaytonGenPipeline
from generation.tasks.laytongen import LaytonGenTask
from generation.text.class_names import ClassNames, class_names

NAMES = ["tench", "great white shark"]


def test_a_model_of_classes_learns_saves_and_draws(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "classes.txt").write_text("tench\n\ngreat white shark\n", encoding="utf-8")
    torch.manual_seed(0)
    transformer = LaytonGenTransformer(
        width=32,
        depth=2,
        num_heads=2,
        hidden=64,
        caption=CaptionShape(WIDTH, 1, null="learned"),
        vocab_size=CODES,
        num_tokens=TOKENS,
        factors=Factors(4, 4),
        dropout=Dropout(0.0, 0.0, 0.0),
    )
    task = LaytonGenTask(
        transformer,
        class_names(str(tmp_path / "classes.txt"), WIDTH),
        optimizer=lambda parameters: AdamW(parameters, lr=1e-2),
        tokenizer=str(tmp_path / "tokenizer"),
    ).train()
    codes = torch.stack([torch.full((TOKENS,), 3), torch.full((TOKENS,), 40)])
    batch = {"codes": codes, "caption": NAMES, "key": ["a", "b"]}
    optimizer = AdamW(task.trainable_parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        task.training_step(batch, 0).backward()
        optimizer.step()
    task.eval().export(tmp_path / "export")
    pipe = LaytonGenPipeline.from_pretrained(tmp_path / "export", tokenizer=tmp_path / "tokenizer")
    drawn = pipe(NAMES, temperature=0.0, output_type="codes").codes
    assert drawn.equal(codes)
    assert pipe(NAMES[1], temperature=0.0, guidance_scale=3.0, output_type="codes").codes.equal(codes[1:])
    assert pipe("", temperature=1.0, output_type="codes").codes.shape == (1, TOKENS)
    with pytest.raises(ValueError, match="'goldfish' is none of the 2 classes, such as 'tench'"):
        pipe("goldfish")


def test_a_table_survives_the_disk_and_has_a_fingerprint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    table = ClassNames(NAMES, 8)
    table.save_pretrained(tmp_path)
    again = ClassNames.from_pretrained(tmp_path)
    assert again.fingerprint() == table.fingerprint() != ClassNames(NAMES[::-1], 8).fingerprint()
    assert torch.equal(again.encode(NAMES).features, table.encode(NAMES).features)
    assert not again.trainable and again.encode([""]).features.abs().max() == 0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"got \[\]"),
        (["crane", "tench", "crane"], "'crane' more than once"),
        (["a", ""], "need names"),
        ("ab", "need names"),
    ],
)
def test_what_is_no_list_of_classes_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassNames(names, 8)


def test_files_of_names_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "none.txt"))):
        class_names(str(tmp_path / "none.txt"), 8)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "bytes.txt"))):
        class_names(str(tmp_path / "bytes.txt"), 8)


def test_a_file_with_a_byte_order_mark_names_the_same_classes(tmp_path: Path) -> None:
    (tmp_path / "marked.txt").write_bytes("\ufefftench\n\n goldfish \n".encode())
    assert class_names(str(tmp_path / "marked.txt"), 8).names == ("tench", "goldfish")
