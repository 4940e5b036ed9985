"""Every stage of the embedded world through the real command, tiny: each run's export feeds the next one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from layton.cli import main
from layton.control import LoraSettings, load_unet
from layton.data.sources import ScenesSource
from layton.encoder import ViTEncoder
from layton.ladd import LADD
from layton.ldm.autoencoder import Autoencoder, build_autoencoder
from layton.ldm.cache import load_code_parts
from layton.pixel_decoder import PixelDecoder
from layton.quantizers import CosineVQ
from layton.run.training import load_task
from layton.tasks.decoder import DecoderTask
from layton.tasks.text_to_image import TextToImageTask, draw
from layton.tasks.tokenizer import TokenizerTask
from layton.tokenizer import LaytonTokenizer

STEPS = 2
SIZE = 64


def source(split: str, length: int) -> dict[str, Any]:
    return {
        "class_path": "layton.data.sources.ScenesSource",
        "init_args": {"split": split, "length": length, "size": SIZE},
    }


def cached(split: str, length: int, name: str, *, codes: bool) -> dict[str, Any]:
    arguments = {"source": source(split, length), "autoencoder": "ae/export", "folder": f"cache/{name}"}
    if codes:
        arguments["tokenizer"] = "tok/export"
    return {"class_path": "layton.ldm.cache.CachedLatents", "init_args": arguments}


def run_file(model: dict[str, Any], train: dict[str, Any], validation: dict[str, Any]) -> dict[str, Any]:
    model["init_args"]["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
    return {
        "seed_everything": 0,
        "trainer": {
            "max_steps": STEPS,
            "accelerator": "cpu",
            "val_check_interval": STEPS,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "layton.callbacks.EMA", "init_args": {"decay": 0.9}},
                {"class_path": "layton.callbacks.PictureGrid", "init_args": {"every_n_steps": STEPS}},
            ],
        },
        "model": model,
        "data": {
            "class_path": "layton.data.module.ImageDataModule",
            "init_args": {"batch_size": 2, "train": [train], "validation": [validation]},
        },
    }


def fit(folder: Path, name: str, run: dict[str, Any]) -> Path:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(run))
    assert main(["--debug", "fit", "--config", str(folder / f"{name}.yaml"), "--run_dir", str(folder / name)]) == 0
    assert list((folder / name / "grids").glob("*.png"))
    return folder / name / "export"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


def save_tiny_autoencoder(folder: Path) -> None:
    torch.manual_seed(0)
    model = build_autoencoder(latent_channels=4, block_out_channels=(8, 8, 8), norm_num_groups=4)
    model.save_pretrained(folder / "ae" / "export")


def save_tiny_tokenizer(folder: Path) -> None:
    torch.manual_seed(0)
    encoder = ViTEncoder(code_dim=4, width=16, depth=1, num_heads=2, stem_width=8)
    quantizer = CosineVQ(vocab_size=32, code_dim=4, start_points=0)
    encoder.save_pretrained(folder / "tok/export/encoder")
    quantizer.save_pretrained(folder / "tok/export/quantizer")
    PixelDecoder(4, 16, 1, 2, fine_width=8, num_fine_blocks=1).save_pretrained(folder / "tok/export/decoder")
    LaytonTokenizer.write_index(folder / "tok/export", encoder, quantizer, image_size=SIZE)


def test_autoencoder_run_exports_a_diffusers_autoencoder(tmp_path: Path) -> None:
    save_tiny_autoencoder(tmp_path)
    model = {
        "class_path": "layton.tasks.autoencoder.AutoencoderTask",
        "init_args": {
            "autoencoder": {
                "class_path": "layton.ldm.autoencoder.Autoencoder",
                "init_args": {"pretrained": "ae/export"},
            }
        },
    }
    run = run_file(model, source("train", 8), source("validation", 4))
    run["trainer"]["max_steps"] = 8
    export = fit(tmp_path, "autoencoder", run)
    images = torch.stack([ScenesSource(split="train", length=8, size=SIZE)[i]["image"] for i in range(8)])
    latents = Autoencoder.from_pretrained(export).eval().encode(images).detach()
    assert latents.shape == (8, 4, SIZE // 4, SIZE // 4)
    assert 0.5 < float(latents.std()) < 2
    (checkpoint,) = (tmp_path / "autoencoder" / "checkpoints").glob("*.ckpt")
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "again")]) == 0  # without the run's data
    again = Autoencoder.from_pretrained(tmp_path / "again").eval().encode(images).detach()
    torch.testing.assert_close(again, latents)


def test_decoder_only_tuning_keeps_old_latents_valid(tmp_path: Path) -> None:
    save_tiny_autoencoder(tmp_path)
    before = Autoencoder.from_pretrained(tmp_path / "ae/export").eval()
    part = {"class_path": "layton.ldm.autoencoder.Autoencoder", "init_args": {"pretrained": "ae/export"}}
    model = {
        "class_path": "layton.tasks.autoencoder.AutoencoderTask",
        "init_args": {"autoencoder": part, "decoder_only": True},
    }
    export = fit(tmp_path, "autoencoder", run_file(model, source("train", 8), source("validation", 4)))
    after = Autoencoder.from_pretrained(export).eval()
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = before.encode(images)
    assert torch.equal(latents, after.encode(images))
    assert not torch.equal(before.decode(latents), after.decode(latents))


def test_tokenizer_run_exports_parts_that_encode(tmp_path: Path) -> None:
    model = {
        "class_path": "layton.tasks.tokenizer.TokenizerTask",
        "init_args": {
            "encoder": {
                "class_path": "layton.encoder.ViTEncoder",
                "init_args": {"code_dim": 4, "width": 16, "depth": 1, "num_heads": 2, "stem_width": 8},
            },
            "quantizer": {
                "class_path": "layton.quantizers.CosineVQ",
                "init_args": {"vocab_size": 32, "code_dim": 4, "start_points": 0},
            },
            "decoder": {
                "class_path": "layton.pixel_decoder.PixelDecoder",
                "init_args": {"code_dim": 4, "width": 16, "depth": 1, "num_heads": 2, "fine_width": 8},
            },
            "perceptual": {
                "class_path": "layton.losses.perceptual.PerceptualLoss",
                "init_args": {"weights": "mini", "crop": 32},
            },
        },
    }
    export = fit(tmp_path, "tokenizer", run_file(model, source("train", 8), source("validation", 4)))
    encoder, quantizer = load_code_parts(export)
    codes = quantizer.encode(encoder(torch.zeros(1, 3, SIZE, SIZE)))
    assert codes.shape == (1, 16)
    light = PixelDecoder.from_pretrained(export / "decoder")
    picture = light(quantizer.codes_to_embeddings(codes, (4, 4)))
    assert picture.shape == (1, 3, SIZE, SIZE)
    whole = LaytonTokenizer.from_pretrained(export)  # the export is a tokenizer, for the size that it was trained on
    assert (whole.image_size, whole.num_tokens) == (SIZE, 16)
    assert torch.equal(whole.encode(torch.zeros(1, 3, SIZE, SIZE)), codes)
    assert torch.equal(whole.decode(codes), picture.clamp(-1, 1))
    newest = max((tmp_path / "tokenizer" / "checkpoints").glob("*.ckpt"))
    assert load_task(newest).image_size == SIZE


def tune(tmp_path: Path, *, frozen: bool) -> Path:
    save_tiny_tokenizer(tmp_path)
    torch.manual_seed(1)
    PixelDecoder(code_dim=4, width=16, depth=1, num_heads=2, fine_width=8).save_pretrained(
        tmp_path / "tok/export/decoder"
    )

    def part(name: str, function: str, *, frozen: bool) -> dict[str, Any]:
        arguments = {"folder": f"tok/export/{name}", "frozen": frozen}
        return {"class_path": f"layton.pretrained.{function}", "init_args": arguments}

    model = {
        "class_path": "layton.tasks.tokenizer.TokenizerTask",
        "init_args": {
            "encoder": part("encoder", "vit_encoder", frozen=frozen),
            "quantizer": part("quantizer", "quantizer", frozen=frozen),
            "decoder": part("decoder", "pixel_decoder", frozen=False),
            "perceptual": {"class_path": "layton.losses.published.PublishedPerceptualLoss"},
        },
    }
    return fit(tmp_path, "tuned", run_file(model, source("train", 8), source("validation", 4)))


def test_decoder_only_tuning_keeps_old_tokens_valid(tmp_path: Path) -> None:
    export = tune(tmp_path, frozen=True)
    images = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = []
    for folder in (tmp_path / "tok/export", export):
        encoder, quantizer = load_code_parts(folder)
        codes.append(quantizer.encode(encoder(images)))
    assert torch.equal(*codes)
    before, after = (
        PixelDecoder.from_pretrained(f / "decoder").state_dict() for f in (tmp_path / "tok/export", export)
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_codebook_that_goes_on_from_an_export_learns(tmp_path: Path) -> None:
    export = tune(tmp_path, frozen=False)  # saved parts load in evaluation mode, where a codebook stands still
    before, after = (load_code_parts(folder)[1].codebook for folder in (tmp_path / "tok/export", export))
    assert not torch.equal(before, after)


def test_adversarial_stage_0_trains_the_judge_before_it_counts(tmp_path: Path) -> None:
    tiny = {"code_dim": 4, "width": 16, "depth": 1, "num_heads": 2}
    model = {
        "class_path": "layton.tasks.tokenizer.AdversarialTokenizerTask",
        "init_args": {
            "encoder": {"class_path": "layton.encoder.ViTEncoder", "init_args": {**tiny, "stem_width": 8}},
            "quantizer": {
                "class_path": "layton.quantizers.CosineVQ",
                "init_args": {"vocab_size": 32, "code_dim": 4, "start_points": 0},
            },
            "decoder": {"class_path": "layton.pixel_decoder.PixelDecoder", "init_args": {**tiny, "fine_width": 8}},
            "discriminator": {
                "class_path": "layton.losses.adversarial.PatchDiscriminator",
                "init_args": {"width": 8, "num_layers": 2},
            },
            "discriminator_optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}},
            "start_step": 1,
            "lead_steps": 1,
        },
    }
    run = run_file(model, source("train", 8), source("validation", 4))
    steps = {"every_n_train_steps": 2, "keep": -1}
    run["trainer"] |= {"max_steps": 5, "val_check_interval": 1, "accumulate_grad_batches": 2, "log_every_n_steps": 1}
    run["trainer"]["callbacks"].append({"class_path": "layton.callbacks.SafeCheckpoint", "init_args": steps})
    fit(tmp_path, "adversarial", run)
    newest = torch.load(tmp_path / "adversarial/checkpoints/step=00000005.ckpt", weights_only=True)
    assert newest["lr_schedulers"][0]["last_epoch"] == 5  # it follows steps of the tokenizer
    assert newest["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == 10  # of two batches each
    assert newest["tokenizer_image_size"] == SIZE
    assert LaytonTokenizer.from_pretrained(tmp_path / "adversarial/export").image_size == SIZE
    saved = {int(path.stem.removeprefix("step=")) for path in (tmp_path / "adversarial" / "checkpoints").glob("*.ckpt")}
    assert saved == {2, 4, 5}  # steps of the tokenizer: the judge's are not counted
    logged = (tmp_path / "adversarial/logs/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/adversarial", "train/usage", "train/perplexity"} <= set(logged)


def test_text_to_image_run_then_stage_1_on_its_export(tmp_path: Path) -> None:
    save_tiny_autoencoder(tmp_path)
    save_tiny_tokenizer(tmp_path)
    text_to_image = {
        "class_path": "layton.tasks.text_to_image.TextToImageTask",
        "init_args": {
            "autoencoder": "ae/export",
            "block_out_channels": [16, 16],
            "text_width": 16,
            "text_depth": 1,
            "preview_steps": 2,
        },
    }
    run = run_file(
        text_to_image, cached("train", 8, "train", codes=False), cached("validation", 4, "validation", codes=False)
    )
    ldm = fit(tmp_path, "t2i", run)
    assert {path.name for path in ldm.iterdir()} >= {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    optimizer = run["model"]["init_args"]["optimizer"]
    further = {"autoencoder": "ae/export", "pretrained": str(ldm), "logit_normal": [0.8, 0.9], "preview_steps": 2}
    run["model"]["init_args"] = {**further, "optimizer": optimizer}
    after = fit(tmp_path, "t2i_on", run)
    weights = [load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (ldm, after)]
    assert {k: v.shape for k, v in weights[0].items()} == {k: v.shape for k, v in weights[1].items()}
    change = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    assert 0 < change < 0.1  # went on from there, not anew
    adaptors = {"rank": 2, "alpha": 2.0, "targets": ["to_q", "conv1"]}
    run["model"]["init_args"] |= {"lora": adaptors, "places": True}
    adapted = fit(tmp_path, "t2i_lora", run)
    folded = load_file(adapted / "unet" / "diffusion_pytorch_model.safetensors")
    moved = {name for name in folded if not torch.equal(folded[name], weights[0][name])}
    assert moved and all("to_q" in name or "conv1" in name for name in moved)
    # Its adaptors, taken back out, leave what was there before
    factors = load_file(adapted / "lora" / "pytorch_lora_weights.safetensors")
    for name in moved:
        down, up = (factors[f"unet.{name.removesuffix('.weight')}.lora_{half}.weight"] for half in "AB")
        update = (up.flatten(1) @ down.flatten(1)).view_as(folded[name])
        torch.testing.assert_close(folded[name] - update, weights[0][name], rtol=0, atol=1e-6)
    run["model"]["init_args"] |= {"start": str(adapted), "place_weight": 0.5, "object_weight": 4.0}
    on = load_file(fit(tmp_path, "t2i_on_lora", run) / "lora" / "pytorch_lora_weights.safetensors")
    assert on.keys() == factors.keys()  # the teacher of places is left behind
    change = max(float((on[name] - factors[name]).abs().max()) for name in on)
    assert 0 < change < 0.1
    with pytest.raises(ValueError, match=r"holds adaptors of .*alpha=2.0.*, the run trains .*alpha=4.0"):
        TextToImageTask(
            "ae/export",
            optimizer=torch.optim.AdamW,
            pretrained=str(ldm),
            lora=LoraSettings(rank=2, alpha=4.0, targets=("to_q", "conv1")),
            start=str(adapted),
        )
    decoder = {
        "class_path": "layton.tasks.decoder.DecoderTask",
        "init_args": {
            "ldm": str(ldm),
            "tokenizer": "tok/export",
            "embedding_channels": [8],
            "preview_steps": 2,
        },
    }
    run = run_file(
        decoder, cached("train", 8, "train_codes", codes=True), cached("validation", 4, "val_codes", codes=True)
    )
    _, other = load_code_parts("tok/export")
    other.set_codebook(other.codebook.flip(0))
    shutil.copytree("tok/export/encoder", "tok/other/encoder")
    other.save_pretrained("tok/other/quantizer")
    decoder["init_args"]["tokenizer"] = "tok/other"
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(run))
    assert main(["fit", "--config", "other.yaml", "--run_dir", "other"]) == 1  # codes of another codebook
    decoder["init_args"]["tokenizer"] = "tok/export"
    export = fit(tmp_path, "stage1", run)
    saved = load_file(export / "decoder" / "model.safetensors")
    following = DecoderTask(
        str(ldm),
        "tok/export",
        optimizer=torch.optim.AdamW,
        embedding_channels=(8,),
        lora=LoraSettings(rank=2, targets=("to_q", "conv1")),
        start=str(export / "decoder"),
    )
    state = following.ladd.branch_state_dict()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    assert {name.partition(".")[0] for name in state.keys() - saved.keys()} == {"lora"}
    decoder["init_args"] |= {"reader": "tok/export/decoder", "start": str(export / "decoder")}
    told = fit(tmp_path, "told", run) / "decoder"
    assert any("features" in name for name in load_file(told / "model.safetensors").keys() - saved.keys())
    assert LADD.from_pretrained(told, unet=load_unet(ldm / "unet"), reader="tok/export/decoder").reader is not None
    del decoder["init_args"]["reader"], decoder["init_args"]["start"]
    decoder["init_args"]["train_tokenizer"] = True
    with pytest.raises(ValueError, match=r"does not say of what size"):
        DecoderTask(str(ldm), "tok/other", optimizer=torch.optim.AdamW, train_tokenizer=True)
    decoder["init_args"]["tokenizer"] = "tok/export"
    export = fit(tmp_path, "joint", run_file(decoder, source("train", 8), source("validation", 4)))
    learnt = (("encoder", "model.safetensors"), ("quantizer", "model.safetensors"))
    for part in learnt:  # jointly: the diffusion loss reaches the encoder, and the codebook follows its features
        before, after = (load_file(folder.joinpath(*part)) for folder in (tmp_path / "tok/export", export))
        assert any(not torch.equal(before[name], after[name]) for name in before), part
    whole = LaytonTokenizer.from_pretrained(export)  # it encodes, images of any size as those that were trained on
    assert whole.num_tokens == 16 and whole.encode(torch.zeros(1, 3, 2 * SIZE, SIZE)).shape == (1, 16)
    for name in ("stage1", "joint"):  # what the LDM's folder has is not in checkpoints, and yet there when they load
        newest = max((tmp_path / name / "checkpoints").glob("*.ckpt"))
        kept = {key for key in torch.load(newest, weights_only=True)["state_dict"] if key.startswith("ladd.")}
        task = load_task(newest)
        assert isinstance(task, DecoderTask)
        assert {f"ladd.{name}" for name, _ in task.ladd.named_parameters()} - kept == {
            f"ladd.{name}" for name, p in task.ladd.named_parameters() if not p.requires_grad
        }
        saved = load_file(tmp_path / name / "export" / "decoder" / "model.safetensors")
        assert all(torch.equal(value, saved[key]) for key, value in task.ladd.branch_state_dict().items())
    unet = ldm / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: value + 0.1 for key, value in load_file(unet).items()}, unet, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="other frozen weights than the folders"):
        load_task(newest)


def test_times_are_stratified_and_a_shift_draws_noisier_ones() -> None:
    x_0 = torch.zeros(1000, 1, 1, 1)
    even = draw(x_0, torch.Generator().manual_seed(0))[0].sort().values
    assert (even - torch.arange(1000)).abs().max() <= 1 and int(even.max()) <= 999
    shifted = draw(x_0, torch.Generator().manual_seed(0), shift=3.0)[0].sort().values
    u = torch.arange(1000) / 1000
    torch.testing.assert_close(shifted.float(), 1000 * 3 * u / (1 + 2 * u), rtol=0, atol=4.0)
    with pytest.raises(ValueError, match="time_shift"):
        TextToImageTask("anywhere", optimizer=torch.optim.AdamW, time_shift=0.0)


def test_times_can_be_logit_normal() -> None:
    times = draw(torch.zeros(4000, 1, 1, 1), torch.Generator().manual_seed(0), logit_normal=(0.8, 0.9))[0] / 1000
    logits = torch.logit(times.double().clamp(1e-3, 1 - 1e-3))
    assert float(logits.mean()) == pytest.approx(0.8, abs=0.02) and float(logits.std()) == pytest.approx(0.9, abs=0.02)
    with pytest.raises(ValueError, match="logit_normal"):
        TextToImageTask("anywhere", optimizer=torch.optim.AdamW, time_shift=2.0, logit_normal=(0.8, 0.9))


def test_tokenizer_overfits_one_batch() -> None:
    torch.manual_seed(0)
    task = TokenizerTask(
        ViTEncoder(code_dim=4, width=32, depth=1, num_heads=2, stem_width=16),
        CosineVQ(vocab_size=64, code_dim=4, start_points=0, dead_share=0.0),
        PixelDecoder(code_dim=4, width=32, depth=1, num_heads=2, fine_width=16, num_fine_blocks=1),
        optimizer=torch.optim.AdamW,
    )
    from layton.data.sources import ScenesSource

    scenes = ScenesSource(split="train", length=2, size=SIZE)
    batch = {"image": torch.stack([scenes[0]["image"], scenes[1]["image"]]), "caption": ["", ""], "key": ["a", "b"]}
    optimizer = torch.optim.AdamW(task.trainable_parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        output = task.quantizer(task.encoder(batch["image"]))
        loss = (task.decoder(output.embeddings) - batch["image"]).square().mean() + output.loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
