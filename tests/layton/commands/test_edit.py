"""``layton edit`` on files: what is kept is kept, what is wrong is told in one line and writes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import small_pipelines as tiny
import torch
from PIL import Image

from distill.adapters import LoraSettings, networks_for
from distill.few_step import FewStepSampling
from distill.models import denoiser_from_pipeline
from layton.cli import main
from layton.distillation.distilled import network_of, save_distilled
from layton.ldm.teacher import open_pipeline

SIDE = 2 * tiny.SIZE


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, a student of pictures, one of noise, a picture twice as wide as high and a mask of its right half."""
    folder = tmp_path_factory.mktemp("edit")
    tiny.stable_diffusion("v_prediction").save_pretrained(folder / "teacher")
    for start in ("image", "noise"):
        denoiser = denoiser_from_pipeline(open_pipeline(folder / "teacher"))
        student = networks_for(denoiser, LoraSettings(2, 2.0, ("to_q", "to_v", "conv1"))).student
        generator = torch.Generator().manual_seed(0)
        for name, parameter in network_of(student).named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, generator=generator)
        sampling = FewStepSampling(times=((999.0,),), prediction="v", start=start)
        save_distilled(student, folder / start, sampling)
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, 2 * SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    mask = np.zeros((SIDE, 2 * SIDE), dtype=np.uint8)
    mask[:, SIDE:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def run(root: Path, out: Path, *words: str, student: str = "image") -> int:
    where = ["--pipeline", str(root / "teacher"), "--student", str(root / student)]
    return main(["edit", str(root / "picture.png"), "a blue star", "--out", str(out), *where, *words])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def size(path: Path) -> tuple[int, int]:
    height, width, _ = pixels(path).shape
    return width, height


def test_an_edit_is_a_picture_of_the_same_kept_part(root: Path, tmp_path: Path) -> None:
    assert run(root, tmp_path / "a.png", "--policy", "resize", "--threshold", "0") == 0
    assert size(tmp_path / "a.png") == (2 * SIDE, SIDE)
    assert run(root, tmp_path / "b.png") == 0
    assert size(tmp_path / "b.png") == (SIDE, SIDE)  # of a crop what was kept
    assert run(root, tmp_path / "c.png", "--seed", "3") == 0
    assert np.array_equal(pixels(tmp_path / "b.png"), pixels(tmp_path / "c.png"))  # nothing is drawn by chance


def test_a_mask_is_painted_and_the_rest_kept(root: Path, tmp_path: Path) -> None:
    mask = str(root / "mask.png")
    assert run(root, tmp_path / "deep" / "a.png", "--mask", mask) == 0
    result, original = pixels(tmp_path / "deep" / "a.png"), pixels(root / "picture.png")[:, SIDE // 2 : -SIDE // 2]
    assert np.array_equal(result[:, : SIDE // 2], original[:, : SIDE // 2])
    assert (result[:, SIDE // 2 :] != original[:, SIDE // 2 :]).mean() > 0.5


def test_what_a_large_picture_keeps_is_its_own_pixels(root: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (6 * SIDE, 4 * SIDE, 3), dtype=np.uint8)
    mask = np.zeros((6 * SIDE, 4 * SIDE), dtype=np.uint8)
    mask[: 3 * SIDE] = 255
    for name, array in (("large", noise), ("half", mask)):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    words = ["--pipeline", str(root / "teacher"), "--student", str(root / "image"), "--policy", "pad"]
    words += ["--mask", str(tmp_path / "half.png"), "--out", str(tmp_path / "a.png")]
    assert main(["edit", str(tmp_path / "large.png"), "a blue star", *words]) == 0
    result = pixels(tmp_path / "a.png")
    assert result.shape == noise.shape
    assert np.array_equal(result[4 * SIDE :], noise[4 * SIDE :])
    assert (result[: 2 * SIDE] != noise[: 2 * SIDE]).mean() > 0.5


@pytest.mark.parametrize(("policy", "wanted"), [("crop", (8, 8)), ("pad", (16, 8)), ("resize", (16, 8))])
def test_enlarging(root: Path, tmp_path: Path, policy: str, wanted: tuple[int, int]) -> None:
    Image.new("RGB", (8, 4), (200, 30, 30)).save(tmp_path / "small.png")
    words = ["--pipeline", str(root / "teacher"), "--student", str(root / "image"), "--policy", policy]
    words += ["--enlarge", "2", "--out", str(tmp_path / "a.png")]
    assert main(["edit", str(tmp_path / "small.png"), "a blue star", *words]) == 0
    assert size(tmp_path / "a.png") == wanted


def test_a_student_of_noise_is_told_what_the_picture_shows(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, tmp_path / "a.png", student="noise") == 2
    assert "--shows" in capsys.readouterr().err
    assert run(root, tmp_path / "a.png", "--shows", "a red star", student="noise") == 0
    assert run(root, tmp_path / "b.png", "--shows", "a red star", "--seed", "3", student="noise") == 0
    assert not np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mask", "mask.png", "--enlarge", "2"], "give one of them"),
        (["--enlarge", "1"], "must be >= 2"),
        (["--enlarge", "3"], "must divide the 16 pixels"),
        (["--enlarge", "2"], "at most 8, got 32 x 16"),
        (["--mask", "small.png"], "8 x 8 pixels, the picture 32 x 16"),
        (["--mask", "black.png"], "nothing in it is white"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    Image.new("L", (8, 8), 255).save(root / "small.png")
    Image.new("L", (2 * SIDE, SIDE)).save(root / "black.png")
    given = [str(root / word) if word.endswith(".png") else word for word in words]
    assert run(root, tmp_path / "a.png", *given) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_only_png_is_written(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, tmp_path / "a.jpg") == 2
    assert "must be a PNG file" in capsys.readouterr().err
