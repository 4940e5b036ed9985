"""Bad batches change nothing, are counted, and stop a run when they persist."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from toy import ToyPart, ToyTask, toy_data

from layton.callbacks import EMA, SafeCheckpoint
from layton.quantizers import CosineVQ, EuclideanVQ
from layton.tasks.guard import NonFiniteError, batch_keys


class Watch(Callback):
    """State at the end of every step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, task: Any, *args: Any) -> None:
        ema = next(c for c in trainer.callbacks if isinstance(c, EMA))
        state = {name: tensor.clone() for name, tensor in task.state_dict().items()}
        state |= {f"average.{i}": t.clone() for i, t in enumerate(ema.state_dict()["average"]["shadow_params"])}
        for index, entry in trainer.optimizers[0].state_dict()["state"].items():
            state |= {f"{index}.{name}": value.clone() for name, value in entry.items()}
        self.states.append(state)


def train(folder: Path, *, bad: list[int], steps: int = 5, task: ToyTask | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    task = task or ToyTask(part=ToyPart(), optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1))
    watch = Watch()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMA(decay=0.9), SafeCheckpoint(every_n_train_steps=1, keep=1), watch],
        **settings,
    )
    try:
        trainer.fit(task, toy_data(bad=bad))
        error = None
    except NonFiniteError as raised:
        error = raised
    return task, watch, trainer, error


def test_one_bad_batch_changes_nothing_and_training_goes_on(tmp_path: Path) -> None:
    task, watch, trainer, error = train(tmp_path, bad=[3], gradient_clip_val=1.0)
    assert error is None and task.skipped_steps == 1
    position = task.seen.index("train/3") // 2
    assert 0 < position < 4  # a good step before it and one after it
    before, after = watch.states[position - 1], watch.states[position]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = watch.states[position + 1]
    assert not torch.equal(moved["part.layers.0.weight"], after["part.layers.0.weight"])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in moved.values())
    assert float(trainer.callback_metrics["train/skipped_steps"]) == 1.0


def test_too_many_in_a_row_stop_the_run_and_name_the_batches(tmp_path: Path) -> None:
    task, _, _, error = train(tmp_path, bad=list(range(10)), steps=9)
    assert error is not None and len(task.losses) == 3
    assert "3 steps in a row" in str(error)
    assert all(key in str(error) for key in task.seen)
    saved = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    for path in saved:
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


class Quantized(ToyTask):
    """The package's codebook has a buffer that is told to have gradients."""

    def __init__(self) -> None:
        super().__init__(ToyPart(), partial(torch.optim.AdamW, lr=1e-2))
        self.quantizer = CosineVQ(vocab_size=8, code_dim=3, start_points=0)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.quantizer(self.part(batch["image"]))
        return super().training_step(batch, batch_idx)


def test_a_bad_step_is_skipped_beside_a_codebook_too(tmp_path: Path) -> None:
    task, _, _, error = train(tmp_path, bad=[3], task=Quantized())
    assert error is None and task.skipped_steps == 1
    assert all(copy.grad_fn is None for _, copy in task._guard._buffers)  # or they would grow with every step
    assert any(buffer.requires_grad for buffer, _ in task._guard._buffers)


class Moved(torch.nn.Module):
    """Codes that learn, and of which dead ones are moved besides."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = torch.nn.Parameter(torch.zeros(3))
        self.changes_in_forward = [self.codes]

    def forward(self) -> None:
        self.codes.data += 1


class Moving(ToyTask):
    def __init__(self) -> None:
        super().__init__(ToyPart(), partial(torch.optim.AdamW, lr=1e-2))
        self.moved = Moved()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.moved()
        return super().training_step(batch, batch_idx)


def test_parameters_that_a_forward_pass_writes_stay_as_they_were(tmp_path: Path) -> None:
    task, watch, _, error = train(tmp_path, bad=[3], task=Moving())
    assert error is None and task.skipped_steps == 1
    codes = [float(state["moved.codes"][0]) for state in watch.states]
    position = task.seen.index("train/3") // 2
    assert codes[position] == codes[position - 1] and codes[position + 1] == codes[position] + 1
    quantizer = EuclideanVQ(vocab_size=8, code_dim=3)
    named = [parameter for part in quantizer.modules() for parameter in getattr(part, "changes_in_forward", ())]
    assert [parameter.shape for parameter in named] == [(1, 8, 3)]


class BadGradient(ToyTask):
    """A finite loss with an infinite gradient, at the third step."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step == 2:
            weight = next(self.part.parameters())
            loss = loss + (weight - weight.detach()).abs().sum().add(1e-30).sqrt().mul(torch.inf).nan_to_num(0.0) * 0
            loss = loss + (weight - weight.detach()).square().sum().sqrt()  # d sqrt(0) is infinite, times zero is NaN
        return loss


def test_a_finite_loss_with_bad_gradients_is_seen_too(tmp_path: Path) -> None:
    bad = BadGradient(part=ToyPart(), optimizer=partial(torch.optim.AdamW, lr=1e-2))
    task, watch, _, error = train(tmp_path, bad=[], task=bad)
    assert error is None and task.skipped_steps == 1
    assert all(torch.equal(watch.states[1][name], watch.states[2][name]) for name in watch.states[1])


@pytest.mark.parametrize("fused", [True, False])
def test_a_scaler_that_begins_too_high_costs_steps_and_no_run(tmp_path: Path, fused: bool) -> None:
    task = ToyTask(part=ToyPart(), optimizer=partial(torch.optim.AdamW, lr=1e-2, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    _, watch, _, error = train(tmp_path, bad=[], steps=6, task=task, plugins=[plugin])
    assert error is None and 1 <= task.skipped_steps <= 3 and scaler.get_scale() == 2.0 ** (18 - task.skipped_steps)
    assert not torch.equal(watch.states[0]["part.layers.0.weight"], watch.states[-1]["part.layers.0.weight"])


def test_bad_steps_are_not_averaged_over_accumulated_batches(tmp_path: Path) -> None:
    task, _, trainer, error = train(tmp_path, bad=[3], steps=2, accumulate_grad_batches=2)
    assert error is None and trainer.global_step == 2
    assert task.skipped_steps == (1 if "train/3" in task.seen[:8] else 0)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in task.parameters())


@pytest.mark.parametrize(
    ("batch", "keys"), [({"key": ["a", "b"]}, ["a", "b"]), ({"key": "a"}, ["a"]), ({}, []), (torch.zeros(2), [])]
)
def test_batch_keys(batch: Any, keys: list[str]) -> None:
    assert batch_keys(batch) == keys
