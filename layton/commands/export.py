"""``layton export``: the parts of a training checkpoint in ``save_pretrained`` formats."""

from __future__ import annotations

import sys
from pathlib import Path

from layton.errors import UsageError
from layton.staging import require_absent


def export(checkpoint: Path, *, out: Path, averaged: bool = True, allow: list[str] | None = None) -> None:
    """Write what the task of a training checkpoint exports, as ``layton fit`` does at the end of a run.

    Args:
        checkpoint: a file that `layton fit` wrote, or the folder of a run, whose newest one is taken.
        out: folder to write; must not exist.
        averaged: the averaged weights (EMA), if the run kept them; else those in training.
        allow: modules of your own that the checkpoint may name.
    """
    from lightning.pytorch.utilities.model_helpers import is_overridden

    from layton.callbacks import export_atomically
    from layton.run.training import load_task
    from layton.tasks.base import LaytonTask

    require_absent(out)
    if checkpoint.is_dir():
        checkpoint = _newest(checkpoint)
        sys.stderr.write(f"layton: takes {checkpoint}\n")
    task = load_task(checkpoint, averaged=averaged, allow=allow or ())
    if not is_overridden("export", task, LaytonTask):
        raise UsageError(f"{type(task).__name__} has nothing to export")
    export_atomically(task, out)
    sys.stdout.write(f"{out}\n")


def _newest(run: Path) -> Path:
    from layton.callbacks import newest_good_checkpoint
    from layton.callbacks.checkpoint import CHECKPOINT_FOLDER

    for folder in (run / CHECKPOINT_FOLDER, run):
        found = newest_good_checkpoint(folder)
        if found is not None:
            return found
    raise UsageError(f"no good checkpoint in {run}")
