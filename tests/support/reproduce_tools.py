"""A tiny teacher, and the committed configs made tiny."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import small_pipelines as tiny
import torch
import yaml
from diffusers import StableDiffusionPipeline

from layton.decoders import DiffusionDecoder
from layton.encoder import ViTEncoder
from layton.ladd import LADD
from layton.ldm.autoencoder import Autoencoder, build_autoencoder
from layton.ldm.pipeline import build_scheduler
from layton.ldm.unet import build_unet
from layton.quantizers import CosineVQ
from layton.tokenizer import LaytonTokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
TINY_SCALE: dict[str, Any] = {
    "budget": 700, "train_scenes": 6, "images": 6, "per_task": 1, "images_per_prompt": 1,
    "seeds": [0, 1], "resamples": 2
}  # fmt: skip


def save_teacher(folder: Path) -> Path:
    """Like the embedded model in kind: 8x8 latents of 32-pixel images, which is what the feature network needs."""
    parts = dict(tiny.build("sd").components)
    coder = build_autoencoder(latent_channels=4, block_out_channels=(8, 8, 8), norm_num_groups=4, sample_size=32)
    StableDiffusionPipeline(**{**parts, "vae": coder}, requires_safety_checker=False).save_pretrained(folder)
    return folder


def tiny_configs(root: Path, claim: str, *, rank: int = 2, batch_size: int = 2, **scale: Any) -> Path:
    """The committed configs below ``root/configs``, with small adapters and batches, and a tiny quick scale."""
    folder = root / "configs" / "reproduce" / claim
    shutil.copytree(CONFIGS / "reproduce" / claim, folder)
    shared = [Path(shutil.copy(path, folder.parent)) for path in (CONFIGS / "reproduce").glob("*.yaml")]
    (quick,) = (path for path in shared if path.name == "quick.yaml")
    overlay = yaml.safe_load(quick.read_text())
    overlay["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False}
    quick.write_text(yaml.safe_dump(overlay))
    for path in [*folder.glob("*.yaml"), *(path for path in shared if path != quick)]:
        run = yaml.safe_load(path.read_text().replace("crop: 8", "crop: 4"))  # of four latents
        if "model" in run and "data" not in run:  # laid over another
            if run["model"]["init_args"].get("critic"):
                run["model"]["init_args"]["critic"] |= {"lora": {"rank": rank}}
        elif "model" in run:
            options = run["model"]["init_args"]
            if options.get("adapter"):
                options["adapter"] |= {"rank": rank, "targets": ["to_q", "to_v"]}
            run["data"]["init_args"] |= {"batch_size": batch_size, "eval_batch_size": batch_size}
            for row in run["data"]["init_args"]["validation"]:
                row["init_args"] |= {"length": 2} if "length" in row["init_args"] else {}
        else:
            run["quick"] = TINY_SCALE | scale
        path.write_text(yaml.safe_dump(run))
    return folder


def save_tokenizer(root: Path) -> Path:
    """A tokenizer for 64-pixel images with a latent diffusion model and a stage-1 decoder."""
    torch.manual_seed(0)
    unet = build_unet(latent_channels=4, latent_size=4, block_out_channels=(16, 16), text_width=16)
    unet.save_pretrained(root / "ldm/unet")
    coder = build_autoencoder(latent_channels=4, block_out_channels=(8,) * 5, norm_num_groups=4)
    coder.save_pretrained(root / "ldm/vae")
    build_scheduler().save_pretrained(root / "ldm/scheduler")
    (root / "ldm/model_index.json").write_text("{}")
    ladd = LADD.from_pipeline(root / "ldm", code_dim=4, embedding_channels=(8,))
    encoder = ViTEncoder(code_dim=4, width=16, depth=1, num_heads=2, stem_width=8)
    quantizer = CosineVQ(vocab_size=32, code_dim=4, start_points=0)
    decoders = {"diffusion": DiffusionDecoder(ladd, Autoencoder(coder))}
    LaytonTokenizer(encoder, quantizer, decoders, image_size=64).save_pretrained(root)
    return root
