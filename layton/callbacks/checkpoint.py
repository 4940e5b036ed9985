"""Periodic checkpoints in the run folder, written safely."""

from __future__ import annotations

import sys
import warnings
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from layton.callbacks.checkpoint_io import (
    BackgroundCheckpointIO,
    SafeCheckpointIO,
    leave_behind,
    sweep_orphans,
)
from layton.dtensors import local

CHECKPOINT_FOLDER = "checkpoints"


class SafeCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint with files that survive being killed, and a save at every planned end.

    Beside the periodic saves it saves at the step where the run ends: last step or epoch, time limit, SIGTERM or
    SIGINT (with `GracefulStop`), early stopping. Weights that are not finite are never saved, so the kept files stay
    good. Files are ``<run folder>/checkpoints/step=N.ckpt``, each with its digest beside it.

    Args:
        every_n_train_steps: save after so many optimizer steps; None to save by time or metric only.
        every_minutes: save after so many minutes of training; excludes every_n_train_steps.
        keep: how many are kept, the newest ones, or the best ones when monitor is given; -1 for all.
        monitor: a logged metric, for example ``"val/loss"``; saves after validation then, and at no other time.
        mode: whether the smallest or the largest value of monitor is the best.
        dirpath: another folder than ``<run folder>/checkpoints``.
        filename: name pattern without suffix, as in ModelCheckpoint.
        in_background: write files in a thread while training goes on; takes the memory of one more checkpoint.

    Raises:
        ValueError: keep is 0 or below -1, nothing says when to save, or a monitor and a period do.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        every_minutes: float | None = None,
        keep: int = 2,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        dirpath: str | None = None,
        filename: str | None = None,
        in_background: bool = False,
    ) -> None:
        if keep == 0 or keep < -1:
            raise ValueError(f"keep must be positive, or -1 for all, got {keep}")
        if every_n_train_steps is None and every_minutes is None and monitor is None:
            raise ValueError("say when to save: every_n_train_steps, every_minutes or monitor")
        if monitor is not None and (every_n_train_steps is not None or every_minutes is not None):
            raise ValueError(
                f"a callback with a monitor ({monitor}) saves after validation: have another one save every so often. "
                "On the command line, --trainer.callbacks.init_args means the last callback of the list"
            )
        self.periodic = monitor is None
        self._in_background = in_background
        self._loops_at_step: tuple[int, dict[str, Any]] = (-1, {})  # and of which step
        self._began, self._ends = 0, False
        super().__init__(
            dirpath=dirpath,
            filename=filename or ("step={step:08d}" if self.periodic else "best-step={step:08d}"),
            monitor=monitor or "step",  # the newest are the ones with the highest step
            mode=mode if monitor is not None else "max",
            save_top_k=keep,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=timedelta(minutes=every_minutes) if every_minutes is not None else None,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the safe writer, choose the folder, sweep what a killed run left."""
        if not isinstance(trainer.strategy.checkpoint_io, BackgroundCheckpointIO):  # another callback asked for it
            trainer.strategy.checkpoint_io = BackgroundCheckpointIO() if self._in_background else SafeCheckpointIO()
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir).absolute() / CHECKPOINT_FOLDER)
        if trainer.is_global_zero and stage == "fit":
            sweep_orphans(Path(self.dirpath))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
            super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Periodic save, or the save at the step where the run ends; never amid batches of one optimizer step."""
        if self.periodic and trainer.fit_loop._should_accumulate():
            return  # the gradients so far would be lost; a save that is due by the clock is due at the next batch, too
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # Where validation is to follow the last batch of an epoch, Lightning puts a save off for its metrics.
        put_off = self.periodic and getattr(self, "_defer_save_until_validation", False)
        if put_off:
            self._defer_save_until_validation = False
        if self.periodic and (put_off or _ends_here(trainer)):
            self.save_now(trainer)
        fetcher = trainer.fit_loop._data_fetcher
        if fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher):
            # Validation follows. Saved during it, the run must resume as if saved here.
            loops = deepcopy(trainer._checkpoint_connector._get_loops_state_dict())
            self._loops_at_step = (trainer.global_step, loops)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A periodic file made during validation, or after it, gets the progress of the training step before it."""
        step, loops = self._loops_at_step
        if self.periodic and (trainer.validating or self._ends) and step == trainer.global_step:
            checkpoint["loops"] = loops

    @property
    def last_saved(self) -> str:
        """The file that this part of the run saved last; empty if it saved none."""
        return str(self._last_checkpoint_saved) if self._last_global_step_saved > self._began else ""

    def save_now(self, trainer: Trainer) -> None:
        """Save the current step, unless it is saved already."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing for periodic files: they are saved at steps."""
        if not self.periodic:
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best ones."""
        if not self.periodic:
            super().on_validation_end(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where this part of the run begins, and leave behind what an earlier branch saved of later steps."""
        super().on_train_start(trainer, pl_module)
        self._began, self._loops_at_step = trainer.global_step, (-1, {})
        if self.dirpath is not None and trainer.ckpt_path and trainer.is_global_zero:
            left = leave_behind(Path(self.dirpath), Path(str(trainer.ckpt_path)))
            if left:
                told = f"the run goes on from {Path(str(trainer.ckpt_path)).name}"
                sys.stderr.write(f"layton: {told}; {len(left)} later checkpoints are *.left now\n")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where nobody knew at the last step that it was the last: after validation that stopped the run."""
        super().on_train_end(trainer, pl_module)
        if self.periodic and not trainer.fit_loop._should_accumulate() and trainer.global_step > self._began:
            self._ends = True
            self.save_now(trainer)
            self._ends = False

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        """Nothing of weights that are not finite, for which an older file would have to go."""
        module = trainer.lightning_module
        finite = all(bool(torch.isfinite(local(p)).all()) for p in module.parameters() if p.requires_grad)
        if trainer.strategy.reduce_boolean_decision(finite, all=True):
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        else:
            warnings.warn(f"weights that are not finite at step {trainer.global_step}: nothing saved", stacklevel=2)


def _ends_here(trainer: Trainer) -> bool:
    if trainer.should_stop or (trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps):
        return True
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
    return bool(last_epoch and trainer.is_last_batch)
