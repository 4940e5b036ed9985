"""`layton distill METHOD` on whole tiny pipelines: what it exports is what it trained, and runs resume exactly."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_pipelines as tiny
import torch
import yaml
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

import layton.distillation
from distill.few_step import FewStepSampling
from distill.models import denoiser_from_pipeline
from distill.stacked import StackedUNet2DConditionModel
from distill.timesteps import timesteps
from layton.cli import main
from layton.commands.distill import _told, fit_arguments, picture_size
from layton.distillation import few_step_schedulers
from layton.distillation.distilled import load_distilled, load_sampling, pipeline_arguments
from layton.distillation.instaflow import InstaFlowPipeline
from layton.errors import UsageError
from layton.ldm.conditions import PromptEncoder
from layton.ldm.drawing import TextToImage
from layton.ldm.teacher import open_pipeline
from layton.ldm.text import build_text_encoder, build_tokenizer, tell_places
from layton.run.training import load_task
from layton.tasks.distill import DistillTask

CONFIGS = Path(__file__).parents[3] / "configs"
TEACHER = "--model.init_args.pipeline=elsewhere"
T = torch.tensor([999, 259])
SOLVER = {"name": "euler", "num_steps": 2, "guidance_scale": 1.0}
CASES = [("lcm", "sd"), ("lcm", "sdxl"), ("mlcm", "sd-v"), ("mlcm", "sdxl"), ("scott", "sd-v"), ("scott", "sdxl")]
CASES += [("lcm", "sd3"), ("mlcm", "flux")]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def folder_of(kind: str, where: Path) -> Path:
    tiny.build(kind).save_pretrained(where / "teacher")
    return where / "teacher"


def scenes(split: str, length: int) -> list[dict[str, Any]]:
    options = {"split": split, "length": length, "size": 2 * tiny.SIZE}
    return [{"class_path": "layton.data.sources.ScenesSource", "init_args": options}]


def distill(method: str, folder: Path, *more: str, steps: int = 2) -> int:
    data = [] if any(word.startswith("--prompts") for word in more) else ["--data.init_args.batch_size=2"]
    if method in ("lcm", "scott"):
        data += [f"--data.init_args.{role}={json.dumps(scenes(role, 6))}" for role in ("train", "validation")]
        data += ["--data.init_args.cache=cache"]
    elif data:
        data += ["--trainer.limit_val_batches=1", "--data.init_args.eval_batch_size=3"]
    options = [
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.num_sanity_val_steps=0",
        "--model.init_args.reference_steps=2",
        "--model.init_args.optimizer.init_args.lr=0.01",
    ]
    return main(
        ["--debug", "distill", method, "--pipeline", str(folder), f"--max_steps={steps}", *data, *options, *more]
    )


def outputs(task: DistillTask, pipe: DiffusionPipeline) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the trained network, of the pipeline's, and of the bare teacher."""
    condition = PromptEncoder(pipe, latent_size=(8, 8))(["two red stars", "a cross"])
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        networks = (task.student, denoiser_from_pipeline(pipe), task.teacher)
        return tuple(network(x_t, T, condition) for network in networks)


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step={step:08d}.ckpt"


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_the_exported_lora_is_what_was_trained(tmp_path: Path, method: str, kind: str) -> None:
    folder = folder_of(kind, tmp_path)
    own_size = ["--model.init_args.latent_size=8"] if kind == "flux" else []  # its default makes 1024 pixels
    assert distill(method, folder, "--run_dir=run", *own_size) == 0
    run = tmp_path / "run"
    assert {path.name for path in (run / "export").iterdir()} == {"few_step.json", "pytorch_lora_weights.safetensors"}
    assert list((run / "grids").glob("*.png")) and list((run / "checkpoints").glob("best-*.ckpt"))
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(run / "export")
    task = load_task(checkpoint(run, 2))
    assert isinstance(task, DistillTask)
    trained, loaded, teacher = outputs(task, pipe)
    torch.testing.assert_close(loaded, trained, atol=1e-5, rtol=0)
    assert (trained - teacher).abs().max() > 1e-3
    assert load_sampling(run / "export") == task.sampling
    assert task.sampling.guidance == (3.5 if kind == "flux" else None)  # what FLUX was told, and is to be told again
    assert task.sampling.prediction == {"sd-v": "v", "sd3": "flow", "flux": "flow"}.get(kind, "eps")
    load_distilled(DiffusionPipeline.from_pretrained(folder), run / "export")  # its scheduler exists


@pytest.mark.parametrize(("kind", "more", "side"), [("sd", 0, 16), ("sdxl", 0, 16), ("sd3", 0, 16), ("flux", 8, 16)])
def test_scenes_have_the_size_that_the_pipeline_is_for(tmp_path: Path, kind: str, more: int, side: int) -> None:
    words = ["--pipeline", str(folder_of(kind, tmp_path))]
    words += [f"--model.init_args.latent_size={more}"] if more else []
    found = fit_arguments(CONFIGS / "distill" / "one_step_tasks.yaml", words)
    rendered = [word.count(f'"size": {side}') for word in found if "SceneCases" in word]
    assert rendered == [6, 4]  # both sides of every task
    for method in ("lcm", "scott", "progressive"):
        found = fit_arguments(CONFIGS / "distill" / f"{method}.yaml", words)
        for role in ("train", "validation"):
            (given,) = [word for word in found if word.startswith(f"--data.init_args.{role}=")]
            (source,) = json.loads(given.partition("=")[2])
            assert source["init_args"]["size"] == side, (method, role)
    assert not any('"size"' in word for word in fit_arguments(CONFIGS / "distill" / "mlcm.yaml", words[:2]))
    own = [*words, "--data", str(CONFIGS / "data" / "scenes_pipeline_latents.yaml")]
    assert not any("ScenesSource" in word for word in fit_arguments(CONFIGS / "distill" / "lcm.yaml", own))


@pytest.mark.filterwarnings("ignore:.*encoder's vocabulary")
def test_pictures_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of("sd", tmp_path)
    (tmp_path / "mine").mkdir()
    for number in range(10):  # keys by whose last digit they are train, validation or test
        Image.new("RGB", (40, 30), (20 * number, 90, 160)).save(tmp_path / "mine" / f"{number}.png")
        (tmp_path / "mine" / f"{number}.txt").write_text(f"a sign with a {number}")
    words = ["--max_steps=1", "--trainer.enable_progress_bar=false", "--data.init_args.cache=cache", "--run_dir=run"]
    words += ["--data.init_args.batch_size=2", "--model.init_args.reference_steps=2", "--trainer.accelerator=cpu"]
    assert main(["--debug", "distill", "lcm", "--pipeline", str(folder), "--images", "mine", *words]) == 0
    assert (tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors").is_file()
    assert "Scenes" not in capsys.readouterr().err
    assert sorted(json.loads(next(tmp_path.glob("cache/*/train-*/cache.json")).read_text())["tensors"]) == ["latent"]
    fit_arguments(CONFIGS / "distill" / "lcm.yaml", ["--pipeline", str(folder)])
    assert "--images PLACE" in capsys.readouterr().err
    shards = fit_arguments(CONFIGS / "distill" / "scott.yaml", ["--pipeline", str(folder), "--images", "a/*.tar"])
    assert any('"shards": "a/*.tar"' in word and '"size": 16' in word for word in shards)
    for wrong in (["--prompts", "x.txt"], ["--data", "y.yaml"]):
        with pytest.raises(UsageError, match="--images is for"):
            fit_arguments(CONFIGS / "distill" / "lcm.yaml", ["--pipeline", str(folder), "--images", "mine", *wrong])
    with pytest.raises(UsageError, match="mlcm was asked"):
        fit_arguments(CONFIGS / "distill" / "mlcm.yaml", ["--pipeline", str(folder), "--images", "mine"])


def task_pairs(folder: Path, split: str, length: int) -> list[dict[str, Any]]:
    def side(name: str) -> dict[str, Any]:
        options = {"task": "edit", "side": name, "split": split, "length": length, "size": 2 * tiny.SIZE}
        return {"class_path": "layton.distillation.task_sources.SceneCases", "init_args": options}

    where = {"autoencoder": str(folder / "vae"), "folder": f"cache/{split}"}
    pairs = {"before": side("before"), "after": side("after"), **where}
    return [{"class_path": "layton.distillation.task_pairs.TaskPairs", "init_args": pairs}]


def test_a_student_that_changes_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of("sd-v", tmp_path)
    data = [f"--data.init_args.{role}={json.dumps(task_pairs(folder, role, 4))}" for role in ("train", "validation")]
    assert distill("one_step_tasks", folder, "--run_dir=run", "--data.init_args.weights=[1]", *data) == 0
    assert load_sampling(tmp_path / "run" / "export").start == "image"
    assert main(["export", str(checkpoint(tmp_path / "run", 2)), "--out", "again"]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", "newest"]) == 0  # of a run's folder the newest one
    assert checkpoint(tmp_path / "run", 2).name in capsys.readouterr().err
    assert load_sampling(tmp_path / "again").start == "image"
    Image.new("RGB", (16, 16), (90, 30, 160)).save("a.png")
    words = ["--pipeline", str(folder), "--student", "run/export"]
    assert main(["edit", "a.png", "a red star", "--out", "b.png", *words]) == 0
    assert (tmp_path / "b.png").is_file()
    capsys.readouterr()
    assert main(["edit", "a.png", "a red dog", "--out", "c.png", *words]) == 0
    assert "layton: not in its vocabulary: dog\n" in capsys.readouterr().err
    words = ["one_step_tasks", "--pipeline", str(folder), "--max_steps=5", "--print_config"]
    assert main(["distill", *words, "--data", str(CONFIGS / "data" / "picture_pairs.yaml")]) == 0
    told = capsys.readouterr().out
    assert "weights: null" in told and "epoch_length: null" in told and "total_steps: 5" in told
    named = ["--pipeline", str(folder), "--prompts", str(tmp_path / "b.png")]
    assert main(["distill", "one_step_tasks", *named]) == 2
    assert "learns from pictures" in capsys.readouterr().err


def test_pipelines_that_hear_places_are_told_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = tiny.build("sd")
    tokenizer = build_tokenizer(["a red star"])
    tell_places(tokenizer, build_text_encoder(tokenizer, width=8, depth=1))
    pipeline.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher" / "tokenizer")
    for method in ("lcm", "mlcm", "reflow"):
        found = fit_arguments(CONFIGS / "distill" / f"{method}.yaml", ["--pipeline", str(tmp_path / "teacher")])
        (given,) = [word for word in found if word.startswith("--data.init_args.train=")]
        assert given.count('"places": 1.0') == 1
        assert "runs/text_to_image" not in given  # led to the given folder as well
        assert "this pipeline hears places" in capsys.readouterr().err


def test_networks_that_hear_their_guidance_are_not_guided_once_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of("flux", tmp_path)
    runs = [CONFIGS / "distill" / f"{name}.yaml" for name in ("lcm", "mlcm", "scott", "reflow")]
    found = [" ".join(fit_arguments(run, ["--pipeline", str(folder)])) for run in runs]
    assert "no classifier-free guidance goes on top" in capsys.readouterr().err
    assert '"guidance_range": [1.0, 1.0]' in found[0] and '"guidance_range": [1.0, 1.0]' in found[2]
    assert '"guidance_scale": 1.0' in found[1] and all("reference_guidance=1.0" in words for words in found)
    assert found[3].count('"guidance_scale": 1.0') == 2  # of the method and of the pairs
    (tmp_path / "p.txt").write_text("a red star\n")
    told = " ".join(fit_arguments(runs[3], ["--pipeline", str(folder), "--prompts", str(tmp_path / "p.txt")]))
    assert told.count('"guidance_scale": 1.0') == 2 and '"guidance_scale": 5.0' not in told
    plain = tiny.build("sd")
    plain.save_pretrained(tmp_path / "sd")
    assert not any("guidance" in word for word in fit_arguments(runs[0], ["--pipeline", str(tmp_path / "sd")]))


def test_flux_is_distilled_at_the_times_of_its_pipeline() -> None:
    pipe = tiny.build("flux")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    times = timesteps(denoiser_from_pipeline(pipe, latent_size=(128, 128)).schedule, 4, "trailing")
    assert times.round().tolist() == [1000.0, 905.0, 760.0, 513.0]


def test_a_rank_that_is_asked_for_is_the_rank() -> None:
    hipa = CONFIGS / "distill" / "hipa.yaml"
    share, rank = "--model.init_args.adapter_share", "--model.init_args.adapter.rank=16"
    assert f"{share}=null" in fit_arguments(hipa, [rank])
    assert not any(word.startswith(share) for word in fit_arguments(hipa, []))
    assert f"{share}=null" not in fit_arguments(hipa, [rank, f"{share}=0.1"])
    alpha = "--model.init_args.adapter.alpha"
    assert f"{alpha}=16" in fit_arguments(hipa, [rank])  # whose scale was one
    assert f"{alpha}=16" not in fit_arguments(hipa, [rank, f"{alpha}=4"])
    assert not any(word.startswith(alpha) for word in fit_arguments(CONFIGS / "distill" / "lcm.yaml", [rank]))


def test_sizes_of_the_real_shapes(tmp_path: Path) -> None:
    for part, config in (("vae", {"block_out_channels": [128, 256, 512, 512]}), ("transformer", {"in_channels": 64})):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    assert picture_size(tmp_path) == 1024  # FLUX
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"sample_size": 64}))
    assert (picture_size(tmp_path), picture_size(tmp_path, latent_size="32")) == (512, 256)
    assert picture_size(tmp_path / "nowhere") is None


def test_full_fine_tuning_exports_a_network(tmp_path: Path) -> None:
    folder = folder_of("sd", tmp_path)
    assert distill("lcm", folder, "--run_dir=run", "--model.init_args.adapter=null") == 0
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.unet = type(pipe.unet).from_pretrained(tmp_path / "run" / "export").eval()
    task = load_task(checkpoint(tmp_path / "run", 2))
    trained, loaded, teacher = outputs(task, pipe)  # type: ignore[arg-type]
    torch.testing.assert_close(loaded, trained, atol=1e-5, rtol=0)
    assert (trained - teacher).abs().max() > 1e-3


def test_teachers_that_cannot_be_read_are_refused_at_once(tmp_path: Path) -> None:
    pipe = tiny.build("sd")
    pipe.register_modules(scheduler=pipe.scheduler.from_config(pipe.scheduler.config, rescale_betas_zero_snr=True))
    pipe.save_pretrained(tmp_path / "zero")
    with pytest.raises(ValueError, match="zero terminal signal-to-noise"):
        distill("lcm", tmp_path / "zero", "--run_dir=zero_run")
    pipe = tiny.build("sd")
    pipe.unet = pipe.unet.from_config(pipe.unet.config, time_cond_proj_dim=16)
    pipe.save_pretrained(tmp_path / "told")
    with pytest.raises(ValueError, match="told its guidance scale"):
        distill("mlcm", tmp_path / "told", "--run_dir=told_run")


def test_a_flow_on_its_own_clock_and_its_stacked_one_step_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's InstaFlow: what either half exports is sampled alike by diffusers and by InstaFlowPipeline."""
    folder = folder_of("sd", tmp_path)
    pairs = ["--data.init_args.train=" + json.dumps([pairs_of(folder)]), "--data.init_args.batch_size=2"]
    method = "--model.init_args.method.init_args."
    with pytest.raises(ValueError, match=r"pairs made with solver .*euler.* the run says .*dpmpp_2m"):
        distill("reflow", folder, *pairs, "--run_dir=other")
    rule = [f"{method}solver.{name}={value}" for name, value in SOLVER.items()]
    pairs += rule
    own_clock = [f"{method}reading=reinterpret", f"{method}toward_image=false", f"{method}step_counts=[1,2]"]
    assert distill("reflow", folder, *pairs, *own_clock, "--run_dir=reflow") == 0
    flow = tmp_path / "reflow" / "export" / "pipeline"
    released = InstaFlowPipeline.from_pretrained(flow)
    plain = DiffusionPipeline.from_pretrained(flow)  # diffusers alone draws from the folder, too
    assert_same_pictures(plain, FewStepSampling(((1000.0, 500.0),), prediction="flow"), 2, released)
    loaders = (
        open_pipeline,
        InstaFlowPipeline.from_pretrained,
        partial(TextToImage.load, num_steps=2, guidance_scale=1),
    )
    for load in loaders:  # as in a process that has not imported what the folder names
        with monkeypatch.context() as fresh:
            fresh.setattr(layton.distillation, "few_step_schedulers", few_step_schedulers)  # comes back afterwards
            fresh.delitem(sys.modules, few_step_schedulers.__name__)
            load(flow)
    assert denoiser_from_pipeline(released.pipe).prediction_type == "flow"
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert_same_pictures(pipe, load_distilled(pipe, tmp_path / "reflow" / "export"), 2, released)

    again = ["--data.init_args.train=" + json.dumps([pairs_of(flow)]), "--data.init_args.batch_size=2", *rule]
    assert distill("one_step", flow, *again, "--model.init_args.stacked=true", "--run_dir=one") == 0
    sampling = load_distilled(released.pipe, tmp_path / "one" / "export")
    assert isinstance(released.pipe.unet, StackedUNet2DConditionModel)
    assert sampling.times == ((1000.0,),)
    assert_same_pictures(released.pipe, sampling, 1, released)
    released.pipe.save_pretrained(tmp_path / "whole")
    assert_same_pictures(DiffusionPipeline.from_pretrained(tmp_path / "whole"), sampling, 1, released)
    task = load_task(checkpoint(tmp_path / "one", 2))
    assert isinstance(task, DistillTask)
    # 2 steps of 2 pairs, forward and backward through both halves
    assert task.budget.total == 2 * 2 * 3 * 2


@pytest.mark.parametrize("short", [(), ("--pipeline", "teacher"), ("--prompts", "p.txt")], ids=str)
def test_what_is_said_of_the_teacher_reaches_its_pairs(tmp_path: Path, short: tuple[str, ...]) -> None:
    folder_of("sd", tmp_path)
    (tmp_path / "p.txt").write_text("a red star\n")
    task = "--model.init_args."
    words = [f"{task}negative_prompt=grey", f"{task}latent_size", "12", f"{task}method.init_args.solver.num_steps=7"]
    found = fit_arguments(CONFIGS / "distill" / "hipa.yaml", [*short, *words])
    (train,) = (word for word in found if word.startswith("--data.init_args.train="))
    settings = json.loads(train.partition("=")[2])[0]["init_args"]
    assert (settings["negative_prompt"], settings["latent_size"]) == ("grey", 12)
    assert settings["solver"] == {"name": "dpmpp_2m", "num_steps": 7, "guidance_scale": 5.0}


def pairs_of(folder: Path) -> dict[str, Any]:
    prompts = {"class_path": "layton.data.prompts.SceneCaptions", "init_args": {"split": "train", "length": 4}}
    options = {"pipeline": str(folder), "folder": f"pairs_{folder.name}", "solver": SOLVER, "num_pairs": 4}
    return {"class_path": "layton.distillation.pair_data.TeacherPairs", "init_args": {**options, "prompts": prompts}}


def assert_same_pictures(
    pipe: DiffusionPipeline, sampling: FewStepSampling, steps: int, flow: InstaFlowPipeline
) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    pipe.set_progress_bar_config(disable=True)
    found = pipe("a star", latents=noise, output_type="latent", **pipeline_arguments(sampling, steps)).images
    wanted = flow("a star", latents=noise, num_inference_steps=steps, output_type="latent").images
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["lcm", "scott"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, method: str) -> None:
    folder = folder_of("sd", tmp_path)
    small = ["--model.init_args.preview_steps=[1]", "--model.init_args.adapter.rank=4"]
    more = [*small, "--model.init_args.method.init_args.target_decay=0.9"]
    assert distill(method, folder, *more, "--run_dir=whole", steps=4) == 0
    assert distill(method, folder, *more, "--run_dir=parts", steps=2) == 0
    assert distill(method, folder, *more, "--run_dir=parts", "--resume=auto", steps=4) == 0
    whole, parts = (torch.load(checkpoint(tmp_path / run, 4), weights_only=True) for run in ("whole", "parts"))
    for name in ("state_dict", "optimizer_states", "distill_forwards", "global_step"):
        assert_same(whole[name], parts[name], name)
    assert len(whole["optimizer_states"]) == (2 if method == "scott" else 1)


def assert_same(left: Any, right: Any, name: str) -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), name
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), name
        for key in left:
            assert_same(left[key], right[key], f"{name}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), name
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{name}.{index}")
    else:
        assert left == right, name


def test_prompt_files_train(tmp_path: Path) -> None:
    folder = folder_of("sd", tmp_path)
    (tmp_path / "mine.txt").write_text("\n".join(f"{n} red stars" for n in range(10)))
    more = ["--run_dir=run", "--data.init_args.batch_size=2", "--prompts", "mine.txt"]
    assert distill("mlcm", folder, *more, steps=1) == 0
    assert (tmp_path / "run" / "export" / "few_step.json").is_file()


def test_pairs_are_as_many_as_asked_for_and_not_made_for_a_folder_in_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of("sd", tmp_path)
    for words in (["--pipeline", str(folder)], [], ["--pipeline", str(folder), "--prompts", "mine.txt"]):
        (tmp_path / "mine.txt").write_text("a star")
        found = fit_arguments(CONFIGS / "distill" / "reflow.yaml", [*words, "--pairs", "7"])
        (train,) = [word for word in found if word.startswith("--data.init_args.train=")]
        assert json.loads(train.partition("=")[2])[0]["init_args"]["num_pairs"] == 7
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    checkpoint(tmp_path / "run", 1).touch()
    assert main(["distill", "reflow", "--pipeline", str(folder), "--pairs=4", "--run_dir=run"]) == 2
    assert "continue with --resume auto" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_wrong_usage_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "model_index.json").write_text("{}")
    (tmp_path / "mine.txt").write_text("a star")
    cases = {
        "no method 'lcn'; there are": ["lcn"],
        "needs a method; there are": [],
        "--pairs must be a number": ["reflow", TEACHER, "--pairs", "many"],
        "takes no pairs that": ["lcm", TEACHER, "--pairs", "3"],
        "no pipeline folder at absent": ["lcm", "--pipeline", "absent"],
        "is no diffusers pipeline folder": ["lcm", "--pipeline=empty"],
        "--pipeline needs a value": ["mlcm", "--pipeline"],
        "no prompts file at absent.txt": ["mlcm", "--pipeline", "mini", "--prompts", "absent.txt"],
        "lcm learns from pictures": ["lcm", "--model.init_args.pipeline=mini", "--prompts", "mine.txt"],
    }
    for message, words in cases.items():
        assert main(["distill", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(["distill", "lcm", "--help"]) == 0
    words = capsys.readouterr().out.replace(",", " ").replace(".", " ").split()
    assert {"lcm", "mlcm", "scott", "--pipeline"} <= set(words)


@pytest.mark.parametrize("path", sorted((CONFIGS / "distill").glob("*.yaml")), ids=lambda path: path.stem)
def test_run_files_parse(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(path), "--print_config"]) == 0
    assert "class_path: layton.tasks.distill.DistillTask" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((CONFIGS / "distill").glob("*.yaml")), ids=lambda path: path.stem)
def test_another_pipeline_takes_the_place_of_the_run_files_own_everywhere(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = yaml.safe_load(path.read_text())
    own = run["model"]["init_args"]["pipeline"]
    (tmp_path / "model_index.json").write_text("{}")
    assert main(["distill", path.stem, "--pipeline", str(tmp_path), "--print_config"]) == 0
    told = capsys.readouterr().out
    assert own not in told
    assert told.count(str(tmp_path)) == json.dumps(run).count(own)


def test_more_pairs_have_more_captions() -> None:
    run = yaml.safe_load((CONFIGS / "distill" / "hipa.yaml").read_text())
    value = run["data"]["init_args"]["train"]
    before = value[0]["init_args"]["prompts"]["init_args"]["length"]
    for count in (8, before + 1):
        (told,) = _told(value, [f"--pairs={count}"])
        assert told["init_args"]["num_pairs"] == count
        assert told["init_args"]["prompts"]["init_args"]["length"] == max(before, count)
