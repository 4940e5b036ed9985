"""Loss spikes are named within their step, or skipped; steady losses, of whatever scatter, raise no alarm (R10)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from toy import ToyPart, ToyTask, assert_same, toy_data

from layton.callbacks import EMA, LossSpikes, SafeCheckpoint, newest_good_checkpoint


class SpikyTask(ToyTask):
    """Ten times the loss at one step."""

    spike_at = 30

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 10 if self.batch_count == self.spike_at else loss

    @property
    def batch_count(self) -> int:
        return len(self.losses) - 1 + self.offset

    offset = 0


class Weights(Callback):
    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, task: Any, *args: Any) -> None:
        self.after.append({name: tensor.clone() for name, tensor in task.state_dict().items()})


def test_losses_that_are_magnified_for_half_precision_are_told_as_they_are(tmp_path: Path) -> None:
    task = SpikyTask(part=ToyPart(), optimizer=partial(torch.optim.SGD, lr=0.0))
    scaling = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    trainer = Trainer(
        default_root_dir=tmp_path, max_steps=32, logger=False, limit_val_batches=0, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, plugins=[scaling], callbacks=[LossSpikes()],
    )  # fmt: skip
    with pytest.warns(UserWarning, match="loss spike before step 31") as told:
        trainer.fit(task, toy_data())
    (spike,) = (str(each.message) for each in told if "loss spike" in str(each.message))
    assert float(spike.split(": ")[1].split(",")[0]) == pytest.approx(10 * task.losses[29], rel=0.5)


def train(folder: Path, *, skip: bool, steps: int = 40, offset: int = 0, seed: int = 0) -> tuple[Any, Weights, Any]:
    torch.manual_seed(seed)
    task = SpikyTask(part=ToyPart(), optimizer=partial(torch.optim.AdamW, lr=1e-3))
    task.offset = offset
    watch = Weights()
    spikes = LossSpikes(skip=skip)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMA(decay=0.9), SafeCheckpoint(every_n_train_steps=10), watch, spikes],
    )
    trainer.fit(task, toy_data(), ckpt_path=newest_good_checkpoint(folder / "checkpoints"))
    return task, watch, spikes


def test_a_spike_is_named_in_its_step_and_changes_weights_unless_skipped(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="loss spike before step 31") as caught:
        task, watch, spikes = train(tmp_path / "report", skip=False)
    keys = task.seen[60:62]
    messages = [str(warning.message) for warning in caught if "loss spike" in str(warning.message)]
    assert len(messages) == 1 and all(key in messages[0] for key in keys)
    assert spikes.spikes == 1 and task.skipped_steps == 0
    assert not torch.equal(watch.after[29]["part.layers.0.weight"], watch.after[30]["part.layers.0.weight"])
    with pytest.warns(UserWarning, match="; skipped; batch keys"):
        task, watch, spikes = train(tmp_path / "skip", skip=True)
    assert spikes.spikes == 1 and task.skipped_steps == 1
    assert all(torch.equal(watch.after[29][name], watch.after[30][name]) for name in watch.after[29])
    assert not torch.equal(watch.after[30]["part.layers.0.weight"], watch.after[31]["part.layers.0.weight"])


def test_what_is_skipped_is_the_same_after_a_resume(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="loss spike"):
        _, whole, _ = train(tmp_path / "whole", skip=True)
    train(tmp_path / "parts", skip=True, steps=25)
    with pytest.warns(UserWarning, match="loss spike"):
        task, rest, spikes = train(tmp_path / "parts", skip=True, offset=25)
    assert spikes.spikes == 1 and task.skipped_steps == 1
    assert_same(whole.after[-1], rest.after[-1])


@pytest.mark.parametrize("spread", [0.01, 0.2, 0.4])
@pytest.mark.parametrize("level", [1.0, 0.0, -2.0])
def test_no_false_alarm_in_500_steady_losses(spread: float, level: float) -> None:
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(500, generator=generator) * spread
    losses = noise.exp() * level if level else noise
    spikes = LossSpikes()
    assert not any(spikes._look(loss) for loss in losses.tolist())


def test_a_new_level_is_taken_for_one_after_a_few_steps() -> None:
    with pytest.raises(ValueError, match="factor 1"):
        LossSpikes(factor=1.0)
    spikes = LossSpikes(persist=2)
    assert not any(spikes._look(1.0 + 0.01 * (i % 3)) for i in range(50))
    assert spikes._look(20.0) and not spikes._look(float("nan"))
