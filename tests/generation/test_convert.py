"""Released GPT files into complete generators."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from laytongen_parts import CODES, LENGTH, TOKENS, WIDTH, tiny_text_encoder, tiny_tokenizer
from safetensors.torch import save_file

from generation.convert import convert_gpt, gpt_layout
from generation.generator import load_generator
from generation.model.shapes import CaptionShape
from generation.model.transformer import LaytonGenTransformer
from generation.pipeline import LaytonGenPipeline
from generation.text.encoders import TransformersTextEncoder
from layton.cli import main
from layton.convert.layout import Layout


def layout(*, captions: bool = True, codes: int = CODES) -> Layout:
    with torch.device("meta"):
        model = LaytonGenTransformer(
            width=64,
            depth=1,
            num_heads=1,
            hidden=32,
            caption=CaptionShape(WIDTH, LENGTH, rotary="zero") if captions else None,
            num_classes=None if captions else 5,
            vocab_size=codes,
            num_tokens=TOKENS,
        )
    return gpt_layout(model)


def write_gpt(path: Path, names: Layout) -> str:
    """A file in the released layout with random weights."""
    generator = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(slot.file_shape, generator=generator) / 8 for name, slot in names.items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT, and the tokenizer and the text encoder that it was trained with."""
    root = tmp_path_factory.mktemp("released")
    write_gpt(root / "gpt.safetensors", layout())
    tiny_tokenizer().save_pretrained(root / "tokenizer")
    tiny_text_encoder().save_pretrained(root / "words")
    return root


def test_a_complete_generator_that_generate_loads(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, tokenizer = tmp_path / "model", str(place / "tokenizer")
    words = ["convert", "gpt", str(place / "gpt.safetensors"), "--out", str(out), "--tokenizer", tokenizer]
    assert main([*words, "--text-encoder", str(place / "words")]) == 0
    assert f'layton generate "PROMPT" --model {out} --tokenizer {tokenizer}' in capsys.readouterr().out
    loaded = load_generator(out)
    plain, encoder = tiny_text_encoder(), cast(TransformersTextEncoder, loaded.text_encoder)
    assert encoder.cleaning == "deepfloyd" and encoder.fingerprint() != plain.fingerprint()
    assert all(value.equal(plain.state_dict()[name]) for name, value in encoder.state_dict().items())
    assert (loaded.card.sampling.temperature, loaded.card.sampling.top_k) == (0.1, CODES)
    assert loaded.transformer.num_tokens == TOKENS  # the tokenizer's, without being told
    weights = convert_gpt(place / "gpt.safetensors", num_tokens=TOKENS).state_dict()
    assert all(value.equal(weights[name]) for name, value in loaded.transformer.state_dict().items())
    pictures = ["--tokenizer", tokenizer, "--out", str(tmp_path / "pictures"), "--images-per-prompt", "2"]
    assert main(["generate", "a red circle", "--model", str(out), *pictures]) == 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    with pytest.raises(ValueError, match="another tokenizer"):
        LaytonGenPipeline.from_pretrained(out, tokenizer=tiny_tokenizer(seed=1))


def test_what_is_missing_is_said_in_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt, tokenizer, encoder = str(place / "gpt.safetensors"), str(place / "tokenizer"), str(place / "words")
    sizes = ["--num-tokens", str(TOKENS)]
    for given, lacking in (
        ([], "--tokenizer and --text-encoder"),
        (["--tokenizer", tokenizer], "--text-encoder"),
        (["--text-encoder", encoder], "--tokenizer"),
    ):
        out = tmp_path / f"alone{len(lacking)}"
        assert main(["convert", "gpt", gpt, "--out", str(out), *sizes, *given]) == 0
        assert capsys.readouterr().out.splitlines()[-1].endswith(f"`layton generate` needs {lacking} too")
        assert LaytonGenTransformer.from_pretrained(out).vocab_size == CODES


def test_parts_that_do_not_fit_are_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ["--tokenizer", str(place / "tokenizer"), "--text-encoder", str(place / "words")]
    more = write_gpt(tmp_path / "more.safetensors", layout(codes=2 * CODES))
    classes = write_gpt(tmp_path / "classes.safetensors", layout(captions=False))
    for checkpoint, options, told in (
        (more, [], f"writes {TOKENS} of {2 * CODES} codes, the tokenizer has {TOKENS} of {CODES}"),
        (str(place / "gpt.safetensors"), ["--num-tokens", "64"], f"writes 64 of {CODES} codes"),
        (classes, [], "class-conditional"),
    ):
        assert main(["convert", "gpt", checkpoint, "--out", str(tmp_path / "out"), *parts, *options]) == 1
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()
    assert main(["convert", "gpt", classes, "--out", str(tmp_path / "out"), "--num-tokens", str(TOKENS)]) == 0
    assert "class-conditional" in capsys.readouterr().out.splitlines()[-1]
