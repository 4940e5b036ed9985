"""The averaged weights as model folders, when a run is done."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from layton.callbacks.ema import averaged_weights
from layton.callbacks.stop import GracefulStop, TimeLimit
from layton.tasks.base import LaytonTask


class ExportWeights(Callback):
    """Writes ``<run folder>/export`` with `LaytonTask.export` when training has reached its planned end.

    Raises:
        ValueError: Weights that were trained are not finite; nothing is written then.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, unless the task has nothing to export, or a signal or a time limit ended the run."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        stopped = any(isinstance(c, GracefulStop) and c.signal_number for c in callbacks)
        if (
            stopped
            or (any(isinstance(c, TimeLimit) and c.ended for c in callbacks) and _has_more_to_do(trainer))
            or getattr(trainer, "fast_dev_run", False)
            or not isinstance(pl_module, LaytonTask)
        ):
            return
        if is_overridden("export", pl_module, LaytonTask):
            with averaged_weights(trainer, pl_module):
                if not trainer.is_global_zero:
                    return
                broken = [n for n, p in pl_module.named_parameters() if p.requires_grad and not p.isfinite().all()]
                if broken:
                    raise ValueError(f"{len(broken)} trained weights are not finite, such as {broken[0]}: not exported")
                folder = Path(trainer.default_root_dir) / "export"
                export_atomically(pl_module, folder)
                sys.stderr.write(f"layton: exported to {folder}\n")


def _has_more_to_do(trainer: Trainer) -> bool:
    return trainer.max_steps == -1 or trainer.global_step < trainer.max_steps


def export_atomically(task: LaytonTask, folder: Path) -> None:
    """Let a task write its parts to a new folder that takes the place of ``folder`` only when it is whole.

    What a killed process left beside it is removed, or put back where it took the last whole one away.
    """
    part, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("part", "old"))
    if old.exists() and not folder.exists():
        old.replace(folder)
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        task.export(part)
        if folder.exists():
            folder.replace(old)
        part.replace(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
