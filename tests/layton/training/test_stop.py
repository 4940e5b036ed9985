"""Signals and time limits end a run with its last step saved, and the resumed run equals the uninterrupted one."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from toy import ToyPart, ToyTask, assert_same, toy_data, write_run

from layton.callbacks import EMA, ExportWeights, GracefulStop, SafeCheckpoint, TimeLimit, newest_good_checkpoint
from layton.callbacks.stop import InterruptedRun
from layton.cli import main

STEPS = 8  # 5 batches an epoch, validation after each epoch


class Signal(Callback):
    """Sends a signal to this process at one moment of the run."""

    def __init__(self, number: int, hook: str, step: int) -> None:
        self.number, self.hook, self.step = number, hook, step

    def _maybe(self, hook: str, trainer: Trainer) -> None:
        if hook == self.hook and trainer.global_step == self.step and not trainer.sanity_checking:
            os.kill(os.getpid(), self.number)

    def on_train_start(self, trainer: Trainer, task: Any) -> None:
        self._maybe("train_start", trainer)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self._maybe("batch", trainer)

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self._maybe("validation", trainer)


def train(folder: Path, extra: list[Callback]) -> tuple[ToyTask, int | None]:
    task = ToyTask(
        part=ToyPart(),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.7),
    )
    stop = GracefulStop()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=STEPS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMA(decay=0.9), SafeCheckpoint(every_n_train_steps=100), stop, *extra],
    )
    torch.manual_seed(0)
    for parameter in task.parameters():
        torch.nn.init.normal_(parameter)
    trainer.fit(task, toy_data(), ckpt_path=newest_good_checkpoint(folder / "checkpoints"))
    return task, stop.signal_number


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    train(folder, [])
    return torch.load(folder / "checkpoints" / f"step={STEPS:08d}.ckpt", weights_only=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("hook", "step", "saved"),
    [("train_start", 0, 1), ("batch", 2, 3), ("batch", 4, 5), ("validation", 5, 5), ("batch", 5, 6)],
)
def test_a_signal_saves_the_step_and_the_run_resumes_exactly(
    whole: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: int,
    hook: str,
    step: int,
    saved: int,
) -> None:
    before = signal.getsignal(number)
    try:
        _, seen = train(tmp_path, [Signal(number, hook, step)])
        assert seen == number
    except InterruptedRun as stopped:
        assert hook == "validation" and stopped.code == 128 + number
    assert signal.getsignal(number) is before
    (file,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert file.name == f"step={saved:08d}.ckpt"
    assert f"layton: saved {file}; --resume auto goes on from there" in capsys.readouterr().err
    train(tmp_path, [])
    resumed = torch.load(tmp_path / "checkpoints" / f"step={STEPS:08d}.ckpt", weights_only=True)
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "layton_generators", "epoch"):
        assert_same(whole[name], resumed[name], name)


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, sent = GracefulStop(), []
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number, signal.getsignal(number))))
    try:
        stop._handle(signal.SIGTERM, None)
        stop._handle(signal.SIGTERM, None)  # the same again, by a job's manager
        assert sent == []
        monkeypatch.setattr("layton.callbacks.stop._ONE_SIGNAL", 0.0)
        stop._handle(signal.SIGTERM, None)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert sent == [(os.getpid(), signal.SIGTERM, signal.SIG_DFL)]


def test_the_command_line_exits_with_the_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import toy

    def send(task: ToyTask, batch: Any, batch_idx: int) -> torch.Tensor:
        if task.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return task._loss(batch)

    monkeypatch.setattr(toy.ToyTask, "training_step", send)
    arguments = ["--config", str(write_run(tmp_path)), "--run_dir", str(tmp_path / "run")]
    assert main(["fit", *arguments], allow=["toy"]) == 143
    assert newest_good_checkpoint(tmp_path / "run" / "checkpoints").name == "step=00000002.ckpt"
    assert not (tmp_path / "run" / "export").exists()


class Slow(Callback):
    def on_train_batch_start(self, *args: Any) -> None:
        time.sleep(0.05)


@pytest.mark.parametrize("own", [True, False])
def test_time_limits_save_before_they_stop(tmp_path: Path, own: bool) -> None:
    from lightning.pytorch.callbacks import Timer

    limit = TimeLimit(minutes=0.1 / 60) if own else Timer(duration={"seconds": 0.1}, interval="step")
    task, _ = train(tmp_path, [Slow(), limit])
    assert 1 <= len(task.losses) < STEPS
    saved = newest_good_checkpoint(tmp_path / "checkpoints")
    assert saved is not None and saved.name == f"step={len(task.losses):08d}.ckpt"


def test_a_run_that_ran_out_of_time_is_not_exported(tmp_path: Path) -> None:
    limit = TimeLimit(minutes=0.1 / 60)
    train(tmp_path / "short", [Slow(), limit, ExportWeights()])
    assert limit.ended and not (tmp_path / "short" / "export").exists()
    train(tmp_path / "whole", [TimeLimit(minutes=10), ExportWeights()])
    assert (tmp_path / "whole" / "export").is_dir()


class StopAfter(Callback):
    """Ends the run with an epoch, as `EarlyStopping` on a measure of training does."""

    def on_train_epoch_end(self, trainer: Trainer, task: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 2


def test_a_run_that_ends_long_after_its_validation_goes_on_from_its_end(tmp_path: Path) -> None:
    def run(*extra: Callback) -> Trainer:
        saving = SafeCheckpoint(every_n_train_steps=1000)
        trainer = Trainer(
            default_root_dir=tmp_path, accelerator="cpu", max_epochs=4, check_val_every_n_epoch=2, logger=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[saving, *extra],
        )  # fmt: skip
        task = ToyTask(part=ToyPart(), optimizer=partial(torch.optim.AdamW, lr=1e-2))
        trainer.fit(task, toy_data(), ckpt_path=newest_good_checkpoint(tmp_path / "checkpoints"))
        return trainer

    assert run(StopAfter()).global_step == 15  # the third epoch, no validation since the second
    (file,) = (tmp_path / "checkpoints").glob("*.ckpt")
    progress = torch.load(file, weights_only=True)["loops"]["fit_loop"]["epoch_progress"]["current"]
    assert progress["processed"] == 3
    assert run().global_step == 20


def test_ranks_that_do_not_agree_stop_before_they_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_another(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*items, {name: 5 if name == "step" else value for name, value in items[0].items()}]

    monkeypatch.setattr("layton.tasks.base.all_gather_items", with_another)
    with pytest.raises(ValueError, match="ranks do not agree on where the run is"):
        train(tmp_path, [])
