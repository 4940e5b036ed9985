"""The command line, called in process with a toy run."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import small_pipelines as tiny
import torch
from lightning.pytorch.strategies import DDPStrategy
from toy import ToyPart, ToyTask, write_run

import layton.cli
import layton.run.files
from layton.callbacks import CheckpointError, SafeCheckpointIO, newest_good_checkpoint
from layton.cli import _one_line, main
from layton.folder import load_tensors
from layton.ldm.conditions import PromptEncoder
from layton.lock import lock_folder
from layton.quiet import warnings_in_a_line
from layton.run.short_options import said_in_full
from layton.run.training import _quiet, _several_devices, _strategy_of, load_task
from layton.sharding import FullySharded


def fit(run: Path, *args: str) -> int:
    return main(["fit", "--config", str(run), "--run_dir", str(run.parent / "run"), *args], allow=["toy"])


def test_a_run_leaves_all_its_files_and_the_averaged_weights(tmp_path: Path) -> None:
    run, folder = write_run(tmp_path), tmp_path / "run"
    assert fit(run) == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {".lock", "config.yaml", "checkpoints", "export", "grids", "logs"}
    assert sorted(path.name for path in (folder / "grids").iterdir()) == [f"step={step:08d}.png" for step in (3, 6, 7)]
    checkpoint = torch.load(folder / "checkpoints" / "step=00000007.ckpt", weights_only=True)
    average = next(state for name, state in checkpoint["callbacks"].items() if name.startswith("EMA"))
    named = dict(zip(average["names"], average["average"]["shadow_params"], strict=True))
    exported = load_tensors(folder / "export" / "part.safetensors")
    assert exported.keys() == {name.removeprefix("part.") for name in named}
    for name, tensor in exported.items():
        assert torch.equal(tensor, named[f"part.{name}"])
        assert not torch.equal(tensor, checkpoint["state_dict"][f"part.{name}"])


def test_a_second_run_in_one_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path)
    with lock_folder(tmp_path / "run"):
        assert fit(run) == 1
    assert f"pid {os.getpid()} on" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}


def test_resume_auto_never_and_continue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert fit(run, "--resume", "auto", "--trainer.max_steps=2") == 0  # nothing there: starts
    assert [path.name for path in checkpoints.glob("*.ckpt")] == ["step=00000002.ckpt"]
    assert fit(run) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert fit(run, "--resume", "auto", "--trainer.max_steps=4") == 0
    assert torch.load(checkpoints / "step=00000004.ckpt", weights_only=True)["global_step"] == 4
    assert fit(run, "--resume", str(tmp_path / "absent.ckpt")) == 2
    capsys.readouterr()
    assert fit(run, "--resume", str(checkpoints / "step=00000002.ckpt"), "--trainer.max_steps=3") == 0  # a new branch
    assert "goes on from step=00000002.ckpt; 1 later checkpoints are *.left" in capsys.readouterr().err
    assert [path.name for path in sorted(checkpoints.glob("*.left"))] == [
        "step=00000004.ckpt.json.left",
        "step=00000004.ckpt.left",
    ]
    found = newest_good_checkpoint(checkpoints)
    assert found is not None and found.name == "step=00000003.ckpt"
    assert fit(run, "--resume", "auto", "--trainer.max_steps=4") == 0
    for note in checkpoints.glob("*.ckpt.json"):
        note.rename(note.with_suffix(".away"))
    capsys.readouterr()
    assert fit(run, "--resume", "auto") == 2  # not from the beginning, over what is there
    assert "none that is whole" in capsys.readouterr().err
    for note in checkpoints.glob("*.ckpt.away"):
        note.rename(note.with_suffix(".json"))
    arguments = ["--config", str(run), "--run_dir", str(tmp_path / "run"), "--ckpt_path", "auto"]
    capsys.readouterr()
    assert main(["validate", *arguments], allow=["toy"]) == 0
    assert "fresh weights" not in capsys.readouterr().err
    assert main(["validate", *arguments[:4]], allow=["toy"]) == 0
    assert "figures of fresh weights: --ckpt_path auto" in capsys.readouterr().err
    assert main(["validate", *arguments, "--data.validation", "null"], allow=["toy"]) == 2
    assert "the data has no validation samples" in capsys.readouterr().err


def test_settings_that_cannot_be_continued_leave_the_run_as_it_was(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    assert fit(run, "--trainer.max_steps=2") == 0
    written = (tmp_path / "run" / "config.yaml").read_bytes()
    wider = ["--resume", "auto", "--trainer.max_steps=4", "--model.init_args.part.init_args.width=9"]
    assert fit(run, *wider) == 1
    assert (tmp_path / "run" / "config.yaml").read_bytes() == written
    with pytest.warns(UserWarning, match=r"saved with, 0\.01, not at 0\.5"):
        more = ["--resume", "auto", "--trainer.max_steps=3", "--model.init_args.optimizer.init_args.lr=0.5"]
        assert fit(run, *more) == 0
    assert fit(run, "--resume", "auto", "--trainer.max_steps=4") == 0
    assert b"max_steps: 4" in (tmp_path / "run" / "config.yaml").read_bytes()
    own = ["--config", str(tmp_path / "run" / "config.yaml"), "--resume", "auto", "--trainer.max_steps=5"]
    assert main(["fit", *own], allow=["toy"]) == 0  # goes on in its folder
    assert (tmp_path / "run" / "checkpoints" / "step=00000005.ckpt").is_file()


def test_settings_win_over_files_wherever_they_stand(tmp_path: Path) -> None:
    words = ["--trainer.max_steps", "1", "--config", str(write_run(tmp_path)), "--run_dir", str(tmp_path / "run")]
    assert main(["fit", *words], allow=["toy"]) == 0
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt")] == ["step=00000001.ckpt"]


def test_a_task_comes_back_from_its_checkpoint_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    assert fit(run, "--model.init_args.part.init_args.width=6") == 0
    path = tmp_path / "run" / "checkpoints" / "step=00000007.ckpt"
    trained, averaged = (load_task(path, averaged=choice, allow=["toy"]) for choice in (False, True))
    saved = torch.load(path, weights_only=True)["state_dict"]
    exported = load_tensors(tmp_path / "run" / "export" / "part.safetensors")
    assert saved["part.layers.0.weight"].shape[0] == 6
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trained.state_dict().items())
    assert all(torch.equal(averaged.get_parameter(f"part.{name}"), tensor) for name, tensor in exported.items())
    with pytest.raises(CheckpointError, match=r"toy\.ToyTask"):
        load_task(path)
    bare = torch.load(path, weights_only=True)
    del bare["callbacks"], bare["hyper_parameters"]  # as Lightning saves weights only
    SafeCheckpointIO().save_checkpoint(bare, tmp_path / "bare.ckpt")
    found = load_task(tmp_path / "bare.ckpt", ToyTask(ToyPart(6), optimizer=torch.optim.SGD))
    assert all(torch.equal(tensor, saved[name]) for name, tensor in found.state_dict().items())
    given = ToyTask(ToyPart(6), optimizer=torch.optim.SGD)  # as of a run that the command line did not make
    assert load_task(path, given) is given
    assert all(torch.equal(tensor, averaged.state_dict()[name]) for name, tensor in given.state_dict().items())
    for moved, told in (("layton.nowhere.Task", "does not have"), ("layton.lock.lock_folder", "not a LaytonTask")):
        older = torch.load(path, weights_only=True)
        older["hyper_parameters"]["_class_path"] = moved
        SafeCheckpointIO().save_checkpoint(older, tmp_path / "older.ckpt")
        with pytest.raises(CheckpointError, match=told):
            load_task(tmp_path / "older.ckpt", allow=["toy"])


def test_later_files_win_and_the_written_configuration_replays(tmp_path: Path) -> None:
    smoke = Path(__file__).parents[3] / "configs" / "overlay" / "smoke.yaml"
    assert fit(write_run(tmp_path), "--config", str(smoke)) == 0
    written = tmp_path / "run" / "config.yaml"
    first = tmp_path / "run" / "checkpoints" / "step=00000002.ckpt"
    again = tmp_path / "again"
    assert main(["fit", "--config", str(written), "--run_dir", str(again)], allow=["toy"]) == 0
    states = [torch.load(p, weights_only=True)["state_dict"] for p in (first, again / "checkpoints" / first.name)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("flags", [["--trainer.precision=bf16-mixed"], ["--trainer.accumulate_grad_batches=2"]])
def test_trainer_flags(tmp_path: Path, flags: list[str]) -> None:
    assert fit(write_run(tmp_path), "--trainer.max_steps=3", *flags) == 0
    assert (tmp_path / "run" / "export" / "part.safetensors").is_file()


@pytest.mark.parametrize(
    "wrong", [["--trainer.max_step=3"], ["--model.init_args.part.init_args.widht=3"], ["--trainer.max_steps=many"]]
)
def test_wrong_usage_is_exit_2(tmp_path: Path, wrong: list[str]) -> None:
    assert fit(write_run(tmp_path), *wrong) == 2
    assert not (tmp_path / "run").exists()


def test_what_fails_in_a_loaders_worker_is_one_line() -> None:
    error = RuntimeError(
        "Caught TooManyBadImagesError in DataLoader worker process 1.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in y\nlayton.data.bad.TooManyBadImagesError: 1 broken images, 0 allowed\n'
    )
    assert _one_line(error) == "1 broken images, 0 allowed"
    part = (
        "Does not validate against any of the Union subtypes\nSubtypes: [A, B]\nErrors:\n  - no such\n    folder: x\n"
        "  - Expected a <class 'NoneType'>\nGiven value type: N\nGiven value: N(a=1)"
    )
    assert _one_line(ValueError(part)) == "no such folder: x"
    assert _one_line(ValueError(part.partition("  - Expected")[0])) == "no such folder: x"
    assert _one_line(RuntimeError("Caught cold:\nstay in bed")) == "Caught cold: stay in bed"


def test_help_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "fit" in capsys.readouterr().out
    assert main(["fitt"]) == 2
    assert main([]) == 2
    assert main(["info", "--help"]) == 0
    assert "run files" in capsys.readouterr().out
    assert main(["info", "--nonsense", "1"]) == 2
    assert main(["distill", "no-such-method"]) == 2
    assert "no-such-method" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("generate x --num-images 3", "(here it is --images_per_prompt)"),
        ("reproduce mlcm --images 3", "(here it is --count)"),
        ("evaluate sceneval --cfg_scale 3", "(here it is --guidance_scale)"),
        ("generate --bogus x", "unrecognized arguments: --bogus; `layton generate --help`"),
        ("tokenize scenes --out o --cuont 3", "did you mean --count?"),
        ("tokenize scenes --out o --count many", "--count: expected int. Got value: many"),
        ("evaluate sceneval --kind painter", "--kind: expected one of ['laytongen', 'diffusion']. Got value: painter"),
        ("fit --confg x.yaml", "did you mean --config?"),
        ("fit --config nowhere.yaml", "--config: File does not exist"),
        ("distill lcm --pipelin mini", "no option --pipelin (did you mean --pipeline?)"),
        ("distill lcm", "no teacher at runs/text_to_image/export: name one by --pipeline"),
        ("distill lcm --lr 1", "no option --lr (here it is --model.init_args.optimizer.init_args.lr); `layton distill"),
        (
            "fit --learning-rate 1",
            "--learning-rate 1 (here it is --model.init_args.optimizer.init_args.lr); `layton fit",
        ),
        ("fit --images nowhere", "--images nowhere: no such file or folder"),
        ("fit --batch_size", "--batch_size needs a value"),
        ("fit --data /tmp", "--data takes a data file, and /tmp is a folder: --images takes one of images"),
    ],
)
def test_wrong_words_are_told_in_one_line(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_short_words_are_said_in_full(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    run, overlay = tmp_path / "run.yaml", tmp_path / "overlay.yaml"
    run.write_text("model: {init_args: {lr_scheduler: {class_path: torch.optim.lr_scheduler.OneCycleLR}}}")
    overlay.write_text("trainer: {max_steps: 4}")
    words = ["--config", str(run), "--config", str(overlay), "--batch-size", "2", "--seed=3", "--max_steps", "9"]
    assert said_in_full(words) == [
        *words[:4],
        "--data.init_args.batch_size=2",
        "--seed_everything=3",
        "--trainer.max_steps=9",
        "--model.init_args.lr_scheduler.init_args.total_steps=9",
    ]
    overlay.write_text("model: {init_args: {lr_scheduler: null}}")
    assert said_in_full(words)[-1] == "--trainer.max_steps=9"
    data, folder, *roles = said_in_full(["--images", str(tmp_path)])
    assert (data, folder) == ("--data", "configs/data/folder_256.yaml")
    assert [role.partition("=")[0] for role in roles] == [
        f"--data.init_args.{n}" for n in ("train", "validation", "test")
    ]
    source = {
        "class_path": "layton.data.folder.ImageFolderSource",
        "init_args": {"folder": str(tmp_path), "split": "test"},
    }
    assert json.loads(roles[2].partition("=")[2]) == [source]
    assert said_in_full(["--images", str(tmp_path), "--data=x.yaml"]) == ["--data=x.yaml", *roles]


@pytest.mark.parametrize("model", ["null", "{init_args: null}", "{init_args: {lr_scheduler: x.Y}}", "3"])
def test_run_files_without_a_schedule_have_no_cycle(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {model}")
    assert said_in_full(["--config", str(run), "--max_steps", "9"])[2:] == ["--trainer.max_steps=9"]


def test_strategies_by_their_short_names() -> None:
    assert isinstance(_strategy_of({"strategy": "fsdp"}), FullySharded)
    assert isinstance(_strategy_of({"devices": 2, "accelerator": "cpu"}), DDPStrategy)
    assert _strategy_of({"devices": 2, "strategy": "ddp"}) == "ddp"
    assert _strategy_of({"devices": 1, "accelerator": "cpu"}) == "auto"


def test_help_of_training_is_a_screenful(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("fit", "validate", "test"):
        assert main([command, "--help"]) == 0
        told = capsys.readouterr().out
        assert told.startswith(f"usage: layton {command} --config RUN.yaml")
        assert told.count("\n") < 30
    assert main(["fit", "--help", "all"]) == 0
    assert "--trainer.val_check_interval" in capsys.readouterr().out


def test_info_of_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "info.json"
    assert main(["info", "--json", str(figures)]) == 0
    (mini,) = json.loads(figures.read_text())["models"]
    parts = {part["place"]: part for part in mini["parts"]}
    assert parts["decoders/consistency"]["steps"] == [1, 2, 3]
    assert [place for place, part in parts.items() if part["default"]] == ["decoders/consistency"]
    assert parts["quantizer"]["parameters"] == 16_384 * 8
    assert Path(mini["card"]).is_file()
    assert "UNet2DConditionModel" in capsys.readouterr().out
    assert main(["info", "nowhere"]) == 1
    damaged = tmp_path / "part"
    damaged.mkdir()
    (damaged / "model.safetensors").write_bytes(b"not tensors")
    assert main(["info", str(damaged)]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_warnings_are_lines_without_code(capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.formatwarning
    with warnings_in_a_line():
        ours = warnings.formatwarning("two\n  lines", UserWarning, str(layton.cli.__file__), 3, "code")
        other = warnings.formatwarning("theirs", FutureWarning, "/lib/torch/x.py", 7)
    assert ours == "layton: two lines\n" and other == "FutureWarning: theirs (/lib/torch/x.py:7)\n"
    assert warnings.formatwarning is before


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from layton.cli import main; main(['--help']);"
        "bad = {'torch', 'lightning', 'jsonargparse', 'numpy', 'diffusers'} & set(sys.modules); sys.exit(len(bad))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)  # noqa: S603
    assert done.returncode == 0


def test_info_counts_the_parameters_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layton.run.files, "ALLOWED_MODULES", (*layton.run.files.ALLOWED_MODULES, "toy"))
    report = tmp_path / "info.json"
    assert main(["info", "--config", str(write_run(tmp_path)), "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    run = found["run"]
    assert run["parts"][0]["parameters"] == run["trainable"] == 3 * 4 * 9 + 4 + 4 * 3 + 3
    assert run["steps"] == 7 and found["models"] == []
    changed = ["--changes", "trainer.max_steps=9"]
    assert main(["info", "--config", str(tmp_path / "toy.yaml"), *changed, "--json", str(report)]) == 0
    assert json.loads(report.read_text())["run"]["steps"] == 9
    assert main(["info", "--data", "nowhere.yaml"]) == main(["info", *changed]) == 2


def test_info_counts_the_work_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layton.run.files, "ALLOWED_MODULES", (*layton.run.files.ALLOWED_MODULES, "toy"))
    report, whole = tmp_path / "info.json", write_run(tmp_path).read_text()
    start, end = whole.index("data:"), whole.index("trainer:")
    path = tmp_path / "own.yaml"
    elsewhere = "train: {class_path: generation.data.source.TokenShards, init_args: {folder: nowhere}}"
    path.write_text(whole.replace("train: {class_path: toy.ToySource}", elsewhere))  # without --data it is not built
    assert main(["info", "--config", str(path), "--json", str(report)]) == 0
    assert json.loads(report.read_text())["run"]["step"] is None
    found = []
    for batch in (2, 4):
        data = tmp_path / f"data{batch}.yaml"
        text = whole[start:end].replace("data:\n", "").replace("\n  ", "\n").removeprefix("  ")
        data.write_text(text.replace("batch_size: 2", f"batch_size: {batch}"))
        assert main(["info", "--config", str(path), "--data", str(data), "--json", str(report)]) == 0
        run = json.loads(report.read_text())["run"]
        # 4 x 4 pixels; both convolutions forward, both their weights, and the input of the second
        assert run["step"]["teraflops"] * 1e12 == batch * 16 * 2 * (2 * 3 * 4 * 9 + 3 * 4 * 3)
        assert run["total_teraflops"] == pytest.approx(7 * run["step"]["teraflops"])
        found.append(run["step"]["activations_megabytes"])
    assert 0 < found[0] < found[1] <= 2 * found[0]


def test_captions_that_are_cut_are_told_once_in_a_run() -> None:
    told = io.StringIO()
    handler = logging.StreamHandler(told)
    logging.getLogger("diffusers").addHandler(handler)
    encode = PromptEncoder(tiny.build("sd"), latent_size=(8, 8))
    check = "import logging, layton.quiet as q\nwith q.cut_captions_told_once(): print(*(h.filters for h in "
    check += "logging.getLogger('diffusers').handlers))"  # also before anything of diffusers is imported
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)  # noqa: S603
    assert "_CutOnce" in found.stdout
    long = ["a red star " * 40, "a blue ring " * 40]
    try:
        with _quiet():
            for _ in range(3):
                encode(long)
        assert told.getvalue().count("\n") == 1 and "are cut (told once)" in told.getvalue()
        encode(long)
        assert "blue ring" in told.getvalue()
    finally:
        logging.getLogger("diffusers").removeHandler(handler)


@pytest.mark.parametrize(
    ("options", "several"),
    [
        ({"devices": 1}, False),
        ({"devices": 2}, True),
        ({"devices": "2"}, True),
        ({"devices": "0,3"}, True),
        ({"devices": [3]}, False),
        ({"devices": "auto", "accelerator": "cpu"}, False),
        ({"devices": 1, "num_nodes": 2}, True),
    ],
)
def test_several_devices_are_known(options: dict[str, Any], several: bool) -> None:
    assert _several_devices(options) is several
