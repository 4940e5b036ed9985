"""Ending a run early without losing work: signals and a wall-clock limit."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from layton.callbacks.checkpoint import SafeCheckpoint

_ONE_SIGNAL = 3.0  # seconds within which one SIGTERM after another is the same


class InterruptedRun(SystemExit):
    """A signal ended the run during validation, after a checkpoint; its code is 128 + the signal's number."""


class GracefulStop(Callback):
    """SIGTERM and SIGINT end training after the current step, where `SafeCheckpoint` saves; a second one ends at once.

    A second SIGTERM is one that comes seconds later: launchers and managers of jobs may tell the same twice.

    No validation follows. During validation the checkpoint is that of the last training step, and the run ends after
    the current validation batch; on several ranks after the validation, as some may have a batch less than others and
    would wait for an answer. The command line exits with 128 + the signal's number (143 SIGTERM, 130 SIGINT).

    Attributes:
        signal_number: the signal that came, None while none did.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._since = 0.0
        self._process = os.getpid()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals. Lightning took them after on_fit_start, and gives them back to whoever had them before."""
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._handle)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals also when there was no sanity check."""
        self.on_sanity_check_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop at the boundary of an optimizer step."""
        if self._came(trainer) and not trainer.fit_loop._should_accumulate():
            trainer.should_stop = True
            trainer.fit_loop.epoch_loop._skip_next_val = True

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save the last training step and end, where nobody else is to be asked.

        Raises:
            InterruptedRun: a signal came.
        """
        if trainer.world_size == 1:
            self._leave(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last training step and end.

        Raises:
            InterruptedRun: a signal came, to any rank.
        """
        self._leave(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the run can go on."""
        if self.signal_number is not None:
            self._tell(trainer)

    def _tell(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            saves = [c for c in trainer.checkpoint_callbacks if isinstance(c, SafeCheckpoint) and c.periodic]
            places = [c.last_saved for c in saves if c.last_saved]
            told = (
                f"saved {places[-1]}; --resume auto goes on from there" if places else "stopped, and nothing was saved"
            )
            sys.stderr.write(f"layton: {told}\n")

    def _leave(self, trainer: Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._came(trainer):
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, SafeCheckpoint) and callback.periodic:
                    callback.save_now(trainer)
            self._tell(trainer)
            raise InterruptedRun(128 + (self.signal_number or signal.SIGTERM))

    def _came(self, trainer: Trainer) -> bool:
        """Whether it came to any rank; then all of them know."""
        came = trainer.strategy.reduce_boolean_decision(self.signal_number is not None, all=False)
        if came and self.signal_number is None:
            self.signal_number = signal.SIGTERM
        return came

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker, forked with this handler: its parent tells it when to go
            return
        if self.signal_number is not None:
            if number == signal.SIGTERM and time.monotonic() - self._since < _ONE_SIGNAL:
                return  # of a launcher and of a job's manager, which both tell the same
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.signal_number, self._since = number, time.monotonic()
        os.write(
            2, f"\n{signal.Signals(number).name}: stops after this step, and saves; once more to end at once\n".encode()
        )


class TimeLimit(Callback):
    """Ends training when this process has trained so long; `SafeCheckpoint` saves at that step.

    ``Trainer(max_time=...)`` limits the whole run, resumed parts included; this limits one job.

    Args:
        minutes: wall-clock minutes from the start of fit.

    Attributes:
        ended: whether it ended the run.

    Raises:
        ValueError: minutes not positive.
    """

    def __init__(self, minutes: float) -> None:
        if not minutes > 0:
            raise ValueError(f"minutes must be positive, got {minutes}")
        self.minutes = minutes
        self.ended = False
        self._end = float("inf")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._end, self.ended = time.monotonic() + 60.0 * self.minutes, False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop at the boundary of an optimizer step."""
        over = trainer.strategy.reduce_boolean_decision(time.monotonic() >= self._end, all=False)
        if over and not trainer.fit_loop._should_accumulate():
            self.ended = trainer.should_stop = True
