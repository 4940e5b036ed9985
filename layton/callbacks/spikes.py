"""Loss spikes: a step whose loss stands far out of the recent ones is reported with its samples, or skipped."""

from __future__ import annotations

import math
import statistics
import warnings
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from layton.tasks.base import LaytonTask
from layton.tasks.guard import batch_keys

_SIGMA = 1.4826  # of a normal distribution, over its median absolute deviation


class LossSpikes(Callback):
    """Warns of steps whose loss is `factor` times the recent median or more, with the keys of their samples.

    The step must also stand `deviations` robust standard deviations above that median, so that losses which scatter
    widely, or lie around zero, raise no false alarm. Counted as ``train/loss_spikes``. After `persist` spikes in a row
    it is no spike but a new level (a loss term that has been switched on): what was recent is forgotten. The command
    line adds this callback, reporting only, to every run that has none.

    Args:
        factor: A spike is at least this many times the median.
        deviations: And at least this many robust standard deviations above it.
        window: Losses that count as recent.
        warm_up: Losses needed before anything is called a spike.
        persist: Spikes in a row that make a new level.
        skip: Leave weights, optimizer, averages and buffers as they were at a spike, as at a loss that is not finite.
            Needs automatic optimization.

    Attributes:
        spikes: Steps reported so far (kept over resumes).

    Raises:
        ValueError: A value out of range.
    """

    def __init__(
        self,
        factor: float = 5.0,
        deviations: float = 10.0,
        window: int = 100,
        warm_up: int = 20,
        persist: int = 3,
        skip: bool = False,
    ) -> None:
        if factor <= 1 or deviations < 0 or not 2 <= warm_up <= window or persist < 1:
            raise ValueError(
                f"out of range: factor {factor}, deviations {deviations}, window {window}, warm_up {warm_up}, "
                f"persist {persist}"
            )
        self.factor, self.deviations = factor, deviations
        self.warm_up, self.persist, self.skip = warm_up, persist, skip
        self.spikes = 0
        self._recent: deque[float] = deque(maxlen=window)
        self._in_a_row = 0
        self._found: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Recent losses and counters: a resumed run reports and skips what an uninterrupted one does."""
        return {"recent": list(self._recent), "spikes": self.spikes, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self._recent.clear()
        self._recent.extend(state_dict["recent"])
        self.spikes, self._in_a_row = int(state_dict["spikes"]), int(state_dict["in_a_row"])

    def is_spike(self, loss: float) -> bool:
        """Whether this loss stands out of the recent ones."""
        if len(self._recent) < self.warm_up:
            return False
        median = statistics.median(self._recent)
        spread = _SIGMA * statistics.median(abs(value - median) for value in self._recent)
        return loss - median > max((self.factor - 1) * abs(median), self.deviations * spread)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the loss while the step can still be skipped."""
        if not pl_module.automatic_optimization:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # of 16-mixed, by which losses are magnified
        scale = 1.0 if scaler is None else scaler.get_scale()
        value = float(loss.detach()) * trainer.accumulate_grad_batches / scale
        if self._look(value) and self.skip and isinstance(pl_module, LaytonTask):
            pl_module.reject_step(f"loss spike {value:.4g}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report, log, and with manual optimization look at the logged loss."""
        if not pl_module.automatic_optimization and "train/loss" in trainer.callback_metrics:
            self._look(float(trainer.callback_metrics["train/loss"]))
        if self._found is not None:
            done = "skipped" if self.skip and pl_module.automatic_optimization else "not skipped"
            warnings.warn(
                f"loss spike before step {trainer.global_step}: {self._found:.4g}, recent median "
                f"{statistics.median(self._recent):.4g}; {done}; batch keys {batch_keys(batch)}",
                stacklevel=2,
            )
        if self._in_a_row >= self.persist:
            self._recent.clear()
            self._in_a_row = 0
        self._found = None
        pl_module.log("train/loss_spikes", float(self.spikes))

    def _look(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return False  # StepGuard's
        if not self.is_spike(loss):
            self._recent.append(loss)
            self._in_a_row = 0
            return False
        self.spikes += 1
        self._in_a_row += 1
        self._found = loss
        return True
