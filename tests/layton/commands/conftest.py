"""Real files to work on: a tiny tokenizer and a tiny text-to-image pipeline with random weights, images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from command_tools import SIZE, Run, tiny_tokenizer
from PIL import Image

from layton.cli import main
from layton.ldm.autoencoder import build_autoencoder
from layton.ldm.text import TextConditioner, build_text_encoder, build_tokenizer
from layton.ldm.unet import build_unet
from layton.scenes import render, sample_scene

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary diffusers text-to-image folder, 32 pixels, with random weights."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(1)
    words = build_tokenizer()
    text = TextConditioner(words, build_text_encoder(words, width=16, depth=1, num_heads=2))
    made = StableDiffusionPipeline(
        vae=build_autoencoder(latent_channels=4, block_out_channels=(8, 8, 8, 8), sample_size=SIZE),
        text_encoder=text.text_encoder,
        tokenizer=text.tokenizer,
        unet=build_unet(latent_channels=4, latent_size=4, block_out_channels=(16, 16), text_width=16),
        scheduler=DDIMScheduler(clip_sample=False, **SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("pipeline") / "ldm"
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder with the light decoder alone."""
    folder = tmp_path_factory.mktemp("tokenizer") / "light"
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Path:
    """A tokenizer folder with light and diffusion decoders and the pipeline in ``ldm/``."""
    folder = tmp_path_factory.mktemp("tokenizer") / "both"
    tiny_tokenizer(ldm=pipeline).save_pretrained(folder)
    shutil.copytree(pipeline, folder / "ldm")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five files of several sizes, shapes, colour modes and formats, one of them in a folder below."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    files = [("a.png", (64, 64), "RGB"), ("b.jpg", (50, 70), "RGB"), ("c.webp", (90, 31), "RGB")]
    files += [("sub/a.png", (40, 40), "L"), ("z.PNG", (33, 47), "RGBA")]
    for number, (name, size, mode) in enumerate(files):
        scene = Image.fromarray(render(sample_scene(number), 128))
        scene.resize(size).convert(mode).save(folder / name)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that must end with a given status; returns what it wrote to standard output, or error."""

    def call(*words: object, status: int = 0) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == status, capsys.readouterr().err
        written = capsys.readouterr()
        return written.out if status == 0 else written.err

    return call


@pytest.fixture
def fails(run: Run) -> Run:
    """Run a command that must fail with one line; returns the line."""

    def call(*words: object, status: int = 1) -> str:
        error = run(*words, status=status)
        assert error.startswith("layton: ")
        assert error.count("\n") == 1
        return error

    return call
