"""`layton evaluate reconstruction` and `layton evaluate sceneval`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from command_tools import Run, tree
from diffusers import DiffusionPipeline
from transformers import CLIPTextModel

from distill.adapters import LoraSettings, networks_for
from distill.few_step import FewStepSampling
from distill.models import denoiser_from_pipeline
from layton.data.sources import ScenesSource
from layton.distillation.distilled import save_distilled
from layton.metrics.image import psnr, round_to_uint8
from layton.scenes import render, sample_scene, split_seeds
from layton.sceneval import make_prompts, write_prompts
from layton.sceneval.objects import compare, objects_kept
from layton.tokenizer import LaytonTokenizer


@pytest.fixture(autouse=True)
def without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """EPD has its own tests; without it these are quick."""
    monkeypatch.setitem(sys.modules, "timm", None)


def test_tokenizer_on_scenes(run: Run, tokenizer: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--data", "scenes", "--count", 5, "--size", 32, "--batch-size", 2, "--objects", 2]
    written = run("evaluate", "reconstruction", *options, "--tokenizer", tokenizer, "--json", report)
    figures = json.loads(report.read_text())
    source = ScenesSource(split="test", length=5, size=32)
    images = torch.stack([source.sample(index, seed=0)["image"] for index in range(5)])
    results = round_to_uint8(LaytonTokenizer.from_pretrained(tokenizer).reconstruct(images))
    assert figures["model"]["psnr"]["mean"] == pytest.approx(psnr(results, images).mean().item(), abs=1e-3)
    assert set(figures["references"]) == {"palette", "pca"}
    assert figures["codebook"]["vocab_size"] == 64
    assert figures["protocol"]["num_images"] == 5
    assert (figures["protocol"]["dataset"], figures["protocol"]["decoder"]) == ("scenes", "light")
    assert figures["objects"]["scenes"] == 2
    for word in ("palette", "pca", "model against palette", "objects:", "no epd"):
        assert word in written


def test_codebook_over_scenes_and_a_folder_together(run: Run, tokenizer: Path, photos: Path, tmp_path: Path) -> None:
    report = tmp_path / "codebook.json"
    options = ["--split", "train", "--tokenizer", tokenizer, "--batch-size", 2, "--json", report]
    figures = []
    for data in (["scenes"], [photos], ["scenes", photos]):
        number = ["--count", 5] if "scenes" in data else []
        assert "perplexity" in run("evaluate", "codebook", "--data", *data, *options, *number)
        figures.append(json.loads(report.read_text()))
    scenes, stored, both = figures
    model = LaytonTokenizer.from_pretrained(tokenizer)
    source = ScenesSource(split="train", length=5, size=model.image_size)
    codes = model.encode(torch.stack([source.sample(index, seed=0)["image"] for index in range(5)]))
    assert scenes["used_codes"] == len(codes.unique()) and scenes["num_codes"] == codes.numel()
    assert both["num_codes"] == scenes["num_codes"] + stored["num_codes"] > stored["num_codes"]
    assert both["protocol"]["data"] == scenes["protocol"]["data"] | stored["protocol"]["data"]


def test_autoencoder_alone_on_a_folder(run: Run, fails: Run, pipeline: Path, photos: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--data", photos, "--split", "train", "--size", 32]
    run("evaluate", "reconstruction", *options, "--autoencoder", pipeline, "--json", report)
    figures = json.loads(report.read_text())
    assert figures["codebook"] is None
    assert 1 <= figures["protocol"]["num_images"] < 5
    assert "16 unquantised numbers" in figures["protocol"]["references"]["pca"]  # 4 channels at f8
    assert "no AutoencoderKL" in fails("evaluate", "reconstruction", *options, "--autoencoder", photos)
    assert "nothing: no such" in fails("evaluate", "reconstruction", "--data", "nothing", "--autoencoder", pipeline)


def test_the_evaluation_stops_at_a_broken_image(fails: Run, tokenizer: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "2.jpg").write_bytes(b"")
    options = ["--data", photos, "--split", "train", "--size", 32, "--tokenizer", tokenizer]
    report = tmp_path / "report.json"
    assert "the file is empty" in fails("evaluate", "reconstruction", *options, "--json", report)
    assert not report.exists()


def test_objects_are_kept_by_a_perfect_and_lost_by_an_empty_reconstruction() -> None:
    perfect = objects_kept(lambda images: images, 6, split="test", size=128, batch_size=4)
    assert (perfect.kept, perfect.kept_alone, perfect.originals) == (1.0, 1.0, 1.0)
    empty = objects_kept(torch.zeros_like, 6, split="test", size=128, batch_size=4)
    assert (empty.kept, empty.originals) == (0.0, 1.0)


def test_every_object_counts() -> None:
    seed = next(seed for seed in split_seeds("test", 100) if len(sample_scene(seed).objects) == 4)
    scene = sample_scene(seed)
    assert compare(scene, render(scene, 128)) == (0, 0)
    fewer = type(scene)(scene.task, scene.objects[:-1], scene.background, scene.seed)
    assert compare(scene, render(fewer, 128)) == (1, 0)
    assert compare(fewer, render(scene, 128)) == (0, 1)


def test_sceneval_of_a_pipeline(run: Run, pipeline: Path, tmp_path: Path) -> None:
    reports = []
    for batch_size in (5, 2):
        out, report = tmp_path / f"out{batch_size}", tmp_path / f"{batch_size}.json"
        options = ["--per-task", 1, "--images-per-prompt", 2, "--steps", 2, "--guidance-scale", 2.0]
        options += ["--batch-size", batch_size, "--out", out, "--json", report, "--seed", 3]
        assert "overall" in run("evaluate", "sceneval", "--kind", "diffusion", "--model", pipeline, *options)
        reports.append(json.loads(report.read_text()))
    assert reports[0] == reports[1]
    assert (reports[0]["prompts"], reports[0]["images"]) == (6, 12)
    assert reports[0]["run"]["num_inference_steps"] == 2
    assert len(reports[0]["run"]["prompts_sha256"]) == 64
    files = tree(tmp_path / "out5")
    assert "00005/samples/0001.png" in files
    assert files["00000/samples/0000.png"] != files["00000/samples/0001.png"]


def test_sceneval_of_a_folder_with_a_text_encoder_in_half_precision(run: Run, pipeline: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(pipeline, half)
    CLIPTextModel.from_pretrained(half / "text_encoder").half().save_pretrained(half / "text_encoder")
    assert json.loads((half / "text_encoder" / "config.json").read_text())["dtype"] == "float16"
    options = ["--per-task", 1, "--images-per-prompt", 1, "--steps", 1]
    assert "overall" in run("evaluate", "sceneval", "--kind", "diffusion", "--model", half, *options)


def test_sceneval_of_a_distilled_student(run: Run, fails: Run, pipeline: Path, tmp_path: Path) -> None:
    teacher = denoiser_from_pipeline(DiffusionPipeline.from_pretrained(pipeline))
    student = networks_for(teacher, LoraSettings(rank=2)).student
    times = ((999.0,), (999.0, 499.0))
    save_distilled(student, tmp_path / "export", FewStepSampling(times, prediction=teacher.prediction_type))
    options = ["--kind", "diffusion", "--model", pipeline, "--student", tmp_path / "export"]
    options += ["--per-task", 1, "--images-per-prompt", 1]
    assert "overall" in run("evaluate", "sceneval", *options, "--json", tmp_path / "report.json")
    settings = json.loads((tmp_path / "report.json").read_text())["run"]
    assert (settings["num_inference_steps"], settings["student"]) == (2, str(tmp_path / "export"))
    assert settings["scheduler"] == "FewStepLCMScheduler"
    shutil.copytree(tmp_path / "export", tmp_path / "tokenizer" / "few_step")  # beside a tokenizer's ldm/
    beside = [*options[:4], "--student", tmp_path / "tokenizer", *options[6:]]
    assert "overall" in run("evaluate", "sceneval", *beside)
    assert "neither a folder nor an embedded model" in fails("evaluate", "sceneval", *options[:5], "nowhere")
    assert "trained for 1, 2 steps, not for 3" in fails("evaluate", "sceneval", *options, "--steps", 3)
    assert "guidance of its own" in fails("evaluate", "sceneval", *options, "--guidance-scale", 2, status=2)


def test_sceneval_with_a_prompts_file_and_refusals(run: Run, fails: Run, both: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    write_prompts(prompts, make_prompts(1)[:1])
    options = ["--kind", "diffusion", "--model", both, "--prompts", prompts, "--images-per-prompt", 1, "--steps", 1]
    assert "single_object" in run("evaluate", "sceneval", *options)
    fails("evaluate", "sceneval", *options, "--out", prompts.parent, status=2)
    assert "guidance" in fails("evaluate", "sceneval", *options, "--guidance-scale", -1, status=2)
    prompts.write_text("{}\n")
    assert "line 1" in fails("evaluate", "sceneval", *options)
    assert "model_index.json" in fails("evaluate", "sceneval", "--kind", "diffusion", "--model", tmp_path, status=2)


def test_all_of_a_folder_is_a_share_too(run: Run, fails: Run, tokenizer: Path, photos: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--data", photos, "--size", 32, "--tokenizer", tokenizer, "--json", report]
    run("evaluate", "reconstruction", *options, "--split", "all")
    everything = json.loads(report.read_text())["protocol"]
    assert (everything["num_images"], everything["split"]) == (5, "all")
    run("evaluate", "reconstruction", *options, "--split", "train")
    assert json.loads(report.read_text())["protocol"]["num_images"] < 5
    wrong = ["--data", "scenes", "--split", "all", "--tokenizer", tokenizer]
    assert "endless" in fails("evaluate", "reconstruction", *wrong)
