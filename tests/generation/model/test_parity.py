"""The released GPT code's outputs, recorded at small width (``tests/fixtures/parity/gpt.md``)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from generation.convert import convert_gpt
from generation.model.rope import rotate
from generation.model.transformer import LaytonGenTransformer
from generation.sampling.codes import GREEDY
from generation.sampling.decoding import generate_codes
from generation.sampling.guidance import Guidance
from layton.cli import main
from layton.convert import ConvertError

FOLDER = Path(os.environ.get("LAYTON_PARITY", Path(__file__).parents[2] / "fixtures" / "parity"))
WEIGHTS = FOLDER / "gpt_weights.safetensors"
HEADS, TOKENS = 4, 16


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(FOLDER / "gpt_io.safetensors")


@pytest.fixture(scope="module")
def model() -> LaytonGenTransformer:
    return convert_gpt(WEIGHTS, num_heads=HEADS, num_tokens=TOKENS)


def test_logits_are_those_of_the_released_code(model: LaytonGenTransformer, recorded: dict[str, Tensor]) -> None:
    wanted = recorded["logits_cfg1"]
    with torch.no_grad():
        logits = model(recorded["greedy_codes_cfg1"], recorded["caption_embeddings"], recorded["caption_mask"])
    assert float((logits - wanted).abs().max() / wanted.abs().max()) < 1e-4
    assert float((logits - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("scale", [1, 2])
def test_greedy_codes_are_those_of_the_released_code(
    model: LaytonGenTransformer, recorded: dict[str, Tensor], scale: int
) -> None:
    made = generate_codes(
        model,
        recorded["caption_embeddings"],
        recorded["caption_mask"],
        sampling=GREEDY,
        guidance=Guidance(float(scale)),
    )
    assert torch.equal(made, recorded[f"greedy_codes_cfg{scale}"])
    for row in range(3):  # each caption alone, without its padding
        real = recorded["caption_mask"][row].bool()
        alone = generate_codes(
            model, recorded["caption_embeddings"][row : row + 1, real], sampling=GREEDY, guidance=Guidance(float(scale))
        )
        assert torch.equal(alone[0], made[row])


def test_the_rotary_quirk_and_the_masks_are_needed(model: LaytonGenTransformer, recorded: dict[str, Tensor]) -> None:
    wanted, codes = recorded["logits_cfg1"], recorded["greedy_codes_cfg1"]
    assert model.caption is not None
    assert model.caption.rotary == "zero"
    with torch.no_grad():
        unmasked = model(codes, recorded["caption_embeddings"])
    assert float((unmasked - wanted).norm() / wanted.norm()) > 1e-2


def test_the_command_line_converts(
    model: LaytonGenTransformer, recorded: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    arguments = ["--num_heads", str(HEADS), "--num-tokens", str(TOKENS)]
    assert main(["convert", "gpt", str(WEIGHTS), "--out", str(out), *arguments]) == 0
    assert str(out) in capsys.readouterr().out
    loaded = LaytonGenTransformer.from_pretrained(out)
    inputs = recorded["greedy_codes_cfg1"], recorded["caption_embeddings"], recorded["caption_mask"]
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), model(*inputs))
    assert main(["convert", "gpt", str(WEIGHTS), "--out", str(out)]) == 2  # it is there already


def test_convert_sees_that_a_file_is_a_gpt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(WEIGHTS), "--out", str(tmp_path / "auto")]) == 0
    assert LaytonGenTransformer.from_pretrained(tmp_path / "auto").num_heads == 2  # 64 wide, as released ones are
    broken = load_file(WEIGHTS)
    del broken["layers.1.feed_forward.w3.weight"]
    broken["layers.0.attention.wo.weight"] = torch.full((128, 128), torch.nan)
    broken["extra"] = torch.zeros(1)
    save_file(broken, tmp_path / "broken.safetensors")
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "broken.safetensors"), "--out", str(tmp_path / "none")]) == 1
    told = capsys.readouterr().err
    for problem in ("missing layers.1.feed_forward.w3.weight", "not finite layers.0.attention.wo", "unknown extra"):
        assert problem in told
    assert not (tmp_path / "none").exists()


def test_class_conditional_files_are_read_too(tmp_path: Path) -> None:
    state = {name: value for name, value in load_file(WEIGHTS).items() if not name.startswith("cls_embedding.")}
    state["cls_embedding.embedding_table.weight"] = torch.randn(11, 128)
    state["freqs_cis"] = torch.zeros(3)
    torch.save({"model": state}, tmp_path / "c2i.pt")
    model = convert_gpt(tmp_path / "c2i.pt", num_heads=HEADS, num_tokens=TOKENS)
    assert model.config["num_classes"] == 10
    assert model(torch.zeros(2, TOKENS, dtype=torch.int64), torch.tensor([0, 10])).shape == (2, TOKENS, 512)
    table = model.rotations(1)  # LlamaGen's precompute_freqs_cis_2d puts zeros at cls_token_num = 1 positions
    assert not table.cos[0].any() and not table.sin[0].any() and bool((table.cos[1] == 1).all())
    key = model.blocks[0].attention.qkv(torch.randn(1, 1, 128))[..., 128:256].unflatten(-1, (HEADS, -1))
    assert not rotate(key, table.at(0, 1)).any()  # the class token's key is zero
    torch.save({"model": {"quantize": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(ConvertError, match="not a LlamaGen GPT"):
        convert_gpt(tmp_path / "other.pt")
