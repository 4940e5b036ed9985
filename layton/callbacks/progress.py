"""Progress as plain lines, for logs and pipes; a terminal gets Lightning's bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor


class LineProgress(ProgressBar):
    """Prints one line every few steps: step, epoch, samples per second, losses, learning rate.

    Args:
        every_n_steps: optimizer steps between two lines.

    Raises:
        ValueError: every_n_steps below 1.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be >= 1, got {every_n_steps}")
        super().__init__()
        self.every_n_steps = every_n_steps
        self._enabled = True
        self._samples = 0
        self._since = 0.0
        self._printed_step = 0

    def disable(self) -> None:
        """Silence, as Lightning asks of ranks other than 0."""
        self._enabled = False

    def enable(self) -> None:
        """Speak again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = time.monotonic()
        self._samples = 0
        self._printed_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count samples, print when it is time."""
        self._samples += batch_size(batch) * trainer.world_size
        step = trainer.global_step
        told = self._printed_step == step  # in an earlier batch of the same step
        ends = step == trainer.max_steps  # told now, or what follows, an export say, counts as a part of the last step
        if not told and (step - self._printed_step >= self.every_n_steps or step == 1 or ends):
            self._print_step(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last step."""
        if trainer.global_step > self._printed_step:
            self._print_step(trainer)

    def _print_step(self, trainer: Trainer) -> None:
        seconds = max(time.monotonic() - self._since, 1e-9)
        rates = [f"{group['lr']:.2e}" for optimizer in trainer.optimizers for group in optimizer.param_groups[:1]]
        total = f"/{trainer.max_steps}" if trainer.max_steps != -1 else ""
        self._print(
            f"step {trainer.global_step}{total}  epoch {trainer.current_epoch}  {self._samples / seconds:.1f} img/s  "
            f"{_metrics(trainer, 'train/')}  lr {','.join(rates)}"
        )
        self._printed_step, self._samples, self._since = trainer.global_step, 0, time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the validation metrics; validation time does not count in samples per second."""
        if not trainer.sanity_checking:
            self._print(f"step {trainer.global_step}  validation  {_metrics(trainer, 'val/')}")
        self._since, self._samples = time.monotonic(), 0

    def _print(self, line: str) -> None:
        if self._enabled:
            sys.stdout.write(f"{time.strftime('%H:%M:%S')}  {line}\n")
            sys.stdout.flush()


def batch_size(batch: Any) -> int:
    """Length B of the first tensor of a batch, or of its first list of texts where it has none; 0 without both."""
    return _length(batch, Tensor) or _length(batch, str)


def _length(batch: Any, kind: type) -> int:
    if isinstance(batch, Tensor):
        return batch.shape[0] if kind is Tensor and batch.ndim else 0
    if isinstance(batch, Mapping):
        return next((size for value in batch.values() if (size := _length(value, kind))), 0)
    if not isinstance(batch, list | tuple):
        return 0
    if batch and all(isinstance(value, str) for value in batch):
        return len(batch) if kind is str else 0
    return next((size for value in batch if (size := _length(value, kind))), 0)


def _metrics(trainer: Trainer, prefix: str) -> str:
    metrics = trainer.callback_metrics.items()
    named = {name.removeprefix(prefix): float(value) for name, value in metrics if name.startswith(prefix)}
    if named.get("skipped_steps") == 0.0:
        del named["skipped_steps"]
    return "  ".join(f"{name} {value:.4g}" for name, value in sorted(named.items(), key=lambda item: item[0] != "loss"))
