"""N + M steps equal N steps, a stop, a resume, and M steps, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from toy import ToyPart, ToyTask, assert_same, toy_data

from layton.callbacks import EMA, SafeCheckpoint, newest_good_checkpoint

STEPS = 13  # 5 batches an epoch: ends inside the third


@dataclass(frozen=True)
class Outcome:
    keys: list[str]
    losses: list[float]
    checkpoint: dict[str, Any]


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step >= self.step:
            trainer.should_stop = True


def train(
    folder: Path,
    *,
    stop: int = STEPS,
    workers: int = 0,
    resume: bool = False,
    saving: SafeCheckpoint | None = None,
    steps: int = STEPS,
    cycle: int | None = None,
    **settings: Any,
) -> Outcome:
    torch.manual_seed(0)
    task = ToyTask(
        part=ToyPart(),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.7)
        if cycle is None
        else partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-2, total_steps=cycle),
    )
    checkpoints = folder / "checkpoints"
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMA(decay=0.9), saving or SafeCheckpoint(every_n_train_steps=100), StopAt(stop)],
        **settings,
    )
    if not resume:
        torch.rand(7)  # whatever was drawn before must not matter
    path = newest_good_checkpoint(checkpoints) if resume else None
    trainer.fit(task, toy_data(workers=workers), ckpt_path=path)
    newest = newest_good_checkpoint(checkpoints)
    assert newest is not None
    return Outcome(task.seen, task.losses, torch.load(newest, weights_only=True))


def assert_equal_runs(whole: Outcome, parts: list[Outcome]) -> None:
    assert [key for part in parts for key in part.keys] == whole.keys
    assert [loss for part in parts for loss in part.losses] == whole.losses
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "layton_generators", "global_step", "epoch"):
        assert_same(whole.checkpoint[name], parts[-1].checkpoint[name], name)
    averages = [
        next(v for k, v in c.checkpoint["callbacks"].items() if k.startswith("EMA")) for c in (whole, parts[-1])
    ]
    assert_same(*averages, "EMA")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 6, 10, 12])
def test_resumed_run_equals_uninterrupted_run(whole: Outcome, tmp_path: Path, stop: int) -> None:
    first = train(tmp_path, stop=stop)
    assert len(first.losses) == stop
    assert_equal_runs(whole, [first, train(tmp_path, resume=True)])


def test_resume_after_a_resume(whole: Outcome, tmp_path: Path) -> None:
    parts = [train(tmp_path, stop=stop, resume=stop > 2) for stop in (2, 5, 8, STEPS)]
    assert_equal_runs(whole, parts)


@pytest.mark.parametrize("workers", [(2, 2), (1, 0)])
def test_resume_with_worker_processes(whole: Outcome, tmp_path: Path, workers: tuple[int, int]) -> None:
    first = train(tmp_path, stop=7, workers=workers[0])
    assert_equal_runs(whole, [first, train(tmp_path, resume=True, workers=workers[1])])


def test_no_file_is_saved_amid_the_batches_of_a_step(tmp_path: Path) -> None:
    def run(*, resume: bool = False) -> Outcome:
        always = SafeCheckpoint(every_minutes=1e-9, keep=-1)  # due at every batch
        return train(tmp_path, stop=4, resume=resume, saving=always, accumulate_grad_batches=2)

    def files() -> list[Path]:
        return sorted((tmp_path / "checkpoints").glob("*.ckpt"))

    whole = run()
    assert len(files()) == 4  # one for each step
    for step in (3, 1):
        for later in files()[step:]:
            later.unlink()
        assert_same(whole.checkpoint["state_dict"], run(resume=True).checkpoint["state_dict"], "state_dict")


def test_a_run_goes_on_with_a_longer_cycle_of_the_learning_rate(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="made for 3 steps, the run has 5"):
        train(tmp_path / "short", steps=5, cycle=3)
    first = train(tmp_path / "a", stop=3, steps=3, cycle=3)
    again = train(tmp_path / "a", steps=5, cycle=5, resume=True)
    rate = again.checkpoint["lr_schedulers"][0]["_last_lr"]
    assert first.checkpoint["lr_schedulers"][0]["_last_lr"] != rate
    assert rate == train(tmp_path / "b", steps=5, cycle=5).checkpoint["lr_schedulers"][0]["_last_lr"]


def test_the_run_really_uses_all_sources_of_chance(whole: Outcome, tmp_path: Path) -> None:
    """A changed weight average, order or seed would be seen: guards against comparing constants."""
    assert len(set(whole.losses)) == STEPS
    assert sorted(whole.keys[:10]) == sorted(whole.keys[10:20]) and whole.keys[:10] != whole.keys[10:20]
    other = train(tmp_path, val_check_interval=2)
    assert other.losses == whole.losses  # validating more often changes nothing in training
