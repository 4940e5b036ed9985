"""The published arrangement by its run files, on an SDXL-shaped pipeline: many latents for each token."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from command_tools import tiny_tokenizer
from small_pipelines import sdxl

from layton.cli import main
from layton.control import load_unet
from layton.data.sources import ScenesSource
from layton.ladd import LADD
from layton.ldm.cache import CachedLatents
from layton.tasks.decoder import DecoderTask
from layton.tokenizer import LaytonTokenizer

ROOT = Path(__file__).parents[3]
CONFIGS, TOOL = ROOT / "configs", ROOT / "tools" / "assemble.py"
DATA = """
class_path: layton.data.module.ImageDataModule
init_args:
  batch_size: 2
  train:
    - &cached
      class_path: layton.ldm.cache.CachedLatents
      init_args:
        source: {class_path: layton.data.sources.ScenesSource, init_args: {split: train, length: 4, size: 64}}
        autoencoder: models/sdxl/vae
        tokenizer: models/layton
        folder: runs/cache
        images: read
  validation: [*cached]
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the run files look: SDXL and a tokenizer of half the size of the images."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sdxl().save_pretrained("models/sdxl")
    tiny_tokenizer().save_pretrained("models/layton")
    Path("data.yaml").write_text(DATA)
    return tmp_path


def fit(name: str, *words: str) -> Path:
    """Two steps of a published run file."""
    run = [
        "fit",
        "--config",
        str(CONFIGS / "layton" / f"{name}.yaml"),
        "--data",
        "data.yaml",
        "--run_dir",
        f"runs/{name}",
    ]
    short = [
        "--trainer.max_steps=2",
        "--trainer.limit_val_batches=0",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
    ]
    assert main([*run, *short, "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1", *words]) == 0
    return Path("runs") / name / "export" / "decoder"


@pytest.mark.slow
def test_published_run_files_make_larger_pictures_than_are_encoded(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_1 = fit("decoder")
    ladd = LADD.from_pretrained(stage_1, unet=load_unet(world / "models/sdxl/unet"))
    assert not ladd.null_embeds.any(), "SDXL's empty caption is zeros"
    ratio = 64 / ladd.pixels_per_latent / 4  # latents along a side for each of 4 tokens
    told = f"--model.init_args.latents_per_token={ratio:g}"
    fit("distill", told)
    own = ["perceptual.init_args.otherwise=mini", "crop=8"]
    stage_2 = fit("pixels", told, *(f"--model.init_args.pixels.init_args.{word}" for word in own))
    words = ["--tokenizer", "models/layton", "--ldm", "models/sdxl", "--decoder", str(stage_1), "--out", "assembled"]
    words += ["--consistency", str(stage_2), "--latents_per_token", f"{ratio:g}"]
    monkeypatch.setattr(sys, "argv", [str(TOOL), *words])
    runpy.run_path(str(TOOL), run_name="__main__")
    tokenizer = LaytonTokenizer.from_pretrained("assembled")
    assert (tokenizer.image_size, tokenizer.default_decoder) == (32, "consistency")
    codes = tokenizer.encode(torch.zeros(1, 3, 64, 64))
    assert codes.shape == (1, 16)
    for name in ("consistency", "diffusion"):
        assert tokenizer.decode(codes, decoder=name).shape == (1, 3, 64, 64), "twice the 32 pixels that are encoded"


def test_stage_1_learns_on_sdxl_from_codes_of_smaller_pictures(world: Path) -> None:
    task = DecoderTask("models/sdxl", "models/layton", optimizer=torch.optim.AdamW, gradient_checkpointing=True)
    source = ScenesSource(split="train", length=2, size=64)
    cached = CachedLatents(source, autoencoder="models/sdxl/vae", tokenizer="models/layton", folder="runs/cache")
    samples = [cached.sample(index, seed=0) for index in range(2)]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("latent", "codes")}
    x_0, embeddings, _ = task._inputs(batch)
    assert embeddings.shape[-2:] == (4, 4) and x_0.shape[-1] > 4
    task._diffusion(x_0, embeddings, torch.Generator().manual_seed(0)).backward()
    assert any(p.grad is not None and p.grad.any() for p in task.ladd.controlnet.parameters())
