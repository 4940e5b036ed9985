"""Stage 1 on an SDXL-shaped pipeline, at several latents for each token: the paper's arrangement."""

from __future__ import annotations

from pathlib import Path

import torch
from command_tools import tiny_tokenizer
from small_pipelines import sdxl

from layton.data.sources import ScenesSource
from layton.ldm.cache import CachedLatents
from layton.tasks.decoder import DecoderTask


def test_stage_1_trains_on_sdxl_at_a_multiple_of_the_tokenizers_size(tmp_path: Path) -> None:
    pipe = sdxl()
    pipe.save_pretrained(tmp_path / "sdxl")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tok")
    task = DecoderTask(str(tmp_path / "sdxl"), str(tmp_path / "tok"), optimizer=torch.optim.AdamW)
    assert not task.ladd.null_embeds.any(), "SDXL's empty caption is zeros"
    source = ScenesSource(split="train", length=2, size=2 * tokenizer.image_size)
    cached = CachedLatents(
        source,
        autoencoder=str(tmp_path / "sdxl/vae"),
        tokenizer=str(tmp_path / "tok"),
        folder=str(tmp_path / "cache"),
    )
    samples = [cached.sample(index, seed=0) for index in range(2)]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("latent", "codes")}
    x_0, embeddings, _ = task._inputs(batch)
    assert embeddings.shape[-2:] == tokenizer.grid and x_0.shape[-1] > embeddings.shape[-1]
    loss = task._diffusion(x_0, embeddings, torch.Generator().manual_seed(0))
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in task.ladd.controlnet.parameters())
