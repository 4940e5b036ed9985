"""`layton reconstruct` and `layton demo`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_tools import Run, tree
from PIL import Image

from layton.data.images import load_image, to_tensor
from layton.metrics.image import psnr
from layton.tokenizer import LaytonTokenizer


@pytest.fixture
def without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra "eval" is not installed."""
    monkeypatch.setitem(sys.modules, "timm", None)


def test_figures_are_those_of_the_pictures(run: Run, tokenizer: Path, photos: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    written = run("reconstruct", photos, "--out", out, "--tokenizer", tokenizer, "--json", report, "--policy", "resize")
    figures = json.loads(report.read_text())
    assert [row["image"] for row in figures["images"]] == ["a.png", "b.jpg", "c.webp", "z.PNG", "sub/a.png"]
    assert sorted(row["file"] for row in figures["images"]) == sorted(tree(out))
    assert figures["protocol"]["decoder"] == "light"
    assert figures["protocol"]["feature_weights_sha256"]
    assert f"mean of 5: {figures['mean']['psnr']:.2f} dB" in written
    square = load_image(photos / "b.jpg").resize((32, 32), Image.Resampling.BICUBIC)
    (back,) = (model := LaytonTokenizer.from_pretrained(tokenizer)).decode_images(model.encode_images([square]))
    expected = psnr(to_tensor(back)[None], to_tensor(square)[None]).item()
    assert figures["images"][1]["psnr"] == pytest.approx(expected, abs=1e-4)
    assert set(figures["mean"]) == {"psnr", "ssim", "epd"}


@pytest.mark.usefixtures("without_timm")
def test_without_the_extra_epd_is_said_to_be_absent(run: Run, tokenizer: Path, photos: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--out", tmp_path / "out", "--tokenizer", tokenizer, "--json", report]
    assert "no EPD: timm is not installed" in run("reconstruct", photos / "a.png", *options)
    assert set(json.loads(report.read_text())["mean"]) == {"psnr", "ssim"}


@pytest.mark.parametrize(("policy", "size"), [("crop", (50, 50)), ("pad", (50, 70)), ("resize", (50, 70))])
@pytest.mark.usefixtures("without_timm")
def test_pictures_show_the_original_at_its_size(
    run: Run, tokenizer: Path, photos: Path, tmp_path: Path, policy: str, size: tuple[int, int]
) -> None:
    out = tmp_path / "out"
    run("reconstruct", photos / "b.jpg", "--out", out, "--tokenizer", tokenizer, "--policy", policy)
    picture = np.asarray(Image.open(out / "b.png"))
    left = picture[-size[1] :, : size[0]]
    original = np.asarray(load_image(photos / "b.jpg"))
    assert np.array_equal(left, original if policy != "crop" else original[10:60])


@pytest.mark.usefixtures("without_timm")
def test_failures_leave_nothing(fails: Run, tokenizer: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "text.jpg").write_text("no image")
    before = tree(tmp_path)
    options = ["--out", tmp_path / "out", "--tokenizer", tokenizer]
    assert "text.jpg" in fails("reconstruct", photos, *options, "--json", tmp_path / "report.json")
    assert "trained for 1 steps" in fails("reconstruct", photos, *options, "--steps", 2)
    (tmp_path / "file").write_text("")
    assert "is no folder" in fails(
        "reconstruct", photos / "a.png", "--out", tmp_path / "file", "--tokenizer", tokenizer
    )
    (tmp_path / "file").unlink()
    assert tree(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_timm")
def test_demo_with_every_part(run: Run, both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layton.commands.demo.IMAGES_PER_TASK", 1)
    monkeypatch.setattr("layton.ldm.drawing.DEFAULT_STEPS", 2)
    monkeypatch.setattr("layton.decoders.DiffusionDecoder.default_steps", 2)
    out = tmp_path / "demo"
    written = run("demo", "--out", out, "--tokenizer", both)
    assert sorted(tree(out)) == ["generations.png", "reconstructions.png", "report.json"]
    report = json.loads((out / "report.json").read_text())
    samples = {"256x256", "64x64", "200x200", "1024x1024", "480x240", "160x320"}
    for decoder in ("light", "diffusion"):
        assert set(report["reconstructions"][decoder]["images"]) == samples
        protocol = report["reconstructions"][decoder]["protocol"]
        assert (protocol["split"], len(protocol["weights"])) == ("test", 16)
        assert protocol["condition_scale"] == (None if decoder == "light" else 1.0)
        assert protocol["decoder_sampling"].get("temperature") == (None if decoder == "light" else 1.0)
        assert f"reconstructed with {decoder}" in written
    assert report["generations"]["of"] == 6
    assert report["generations"]["protocol"]["steps"] == 2


@pytest.mark.usefixtures("without_timm")
def test_demo_with_one_decoder_alone(run: Run, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    assert "nothing drawn from text" in run("demo", "--out", out, "--tokenizer", tokenizer)
    assert sorted(tree(out)) == ["reconstructions.png", "report.json"]


def test_demo_without_weights_says_so(fails: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in fails("demo", "--out", tmp_path / "demo", "--tokenizer", tmp_path / "empty")
    assert not (tmp_path / "demo").exists()


def test_a_damaged_tokenizer_is_told_in_one_line(fails: Run, tokenizer: Path, photos: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tokenizer, copy)
    weights = copy / "encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    fails("encode", photos, "--out", tmp_path / "codes", "--tokenizer", copy)
    torch.save({}, weights)
    fails("encode", photos, "--out", tmp_path / "codes", "--tokenizer", copy)
    (copy / "config.json").write_text("[")
    fails("encode", photos, "--out", tmp_path / "codes", "--tokenizer", copy)
