"""The published arrangement by its run files, on an SDXL-shaped pipeline: many latents for each token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_tools import tiny_tokenizer
from small_pipelines import sdxl

from layton.cli import main
from layton.control import load_unet
from layton.decoders import ConsistencyDecoder
from layton.ladd import LADD

CONFIGS = Path(__file__).parents[3] / "configs"
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


def test_published_run_files_train_decoders_of_larger_pictures_than_are_encoded(world: Path) -> None:
    stage_1 = fit("decoder")
    ladd = LADD.from_pretrained(stage_1, unet=load_unet(world / "models/sdxl/unet"))
    assert not ladd.null_embeds.any(), "SDXL's empty caption is zeros"
    ratio = 64 / ladd.pixels_per_latent / 4  # latents along a side for each of 4 tokens
    told = f"--model.init_args.latents_per_token={ratio:g}"
    fit("distill", told)
    own = ["perceptual.init_args.otherwise=mini", "crop=8"]
    stage_2 = fit("pixels", told, *(f"--model.init_args.pixels.init_args.{word}" for word in own))
    decoder = ConsistencyDecoder.from_pretrained(stage_2, ldm=world / "models/sdxl", base=stage_1)
    tokenizer = tiny_tokenizer()
    codes = torch.zeros(1, tokenizer.num_tokens, dtype=torch.long)
    pictures = decoder.decode(tokenizer.quantizer.codes_to_embeddings(codes, tokenizer.grid))
    assert pictures.shape == (1, 3, 64, 64), "twice the 32 pixels that are encoded"
