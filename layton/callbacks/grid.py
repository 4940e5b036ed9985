"""Pictures of progress: what the model makes of the same few validation samples, again and again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor

from layton.callbacks.ema import averaged_weights
from layton.data.images import to_image
from layton.pictures import Cell, Row, save_png, sheet
from layton.tasks.base import LaytonTask

GRID_FOLDER = "grids"


class PictureGrid(Callback):
    """Writes ``<run folder>/grids/step=N.png`` from `LaytonTask.picture_grid`, with the averaged weights.

    One row of pictures per name that the task returns, one column per sample. Also goes to wandb and TensorBoard
    loggers. The samples are the first validation batch, so grids of different steps compare.

    Args:
        every_n_steps: optimizer steps between grids; one is always made at the end of training.
        max_images: columns.

    Raises:
        ValueError: an argument below 1.
    """

    def __init__(self, every_n_steps: int = 500, max_images: int = 8) -> None:
        if every_n_steps < 1 or max_images < 1:
            raise ValueError(f"every_n_steps and max_images must be >= 1, got {every_n_steps}, {max_images}")
        self.every_n_steps = every_n_steps
        self.max_images = max_images
        self._batch: Any = None
        self._made_at = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run does not repeat the grid of the step it resumes from."""
        self._made_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Make a grid when it is time."""
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._made_at:
            self._make(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The grid of the finished model."""
        if trainer.global_step != self._made_at:
            self._make(trainer, pl_module)

    def _make(self, trainer: Trainer, task: LightningModule) -> None:
        self._made_at = trainer.global_step
        if not isinstance(task, LaytonTask) or getattr(trainer, "fast_dev_run", False):
            return
        with averaged_weights(trainer, task):
            if trainer.is_global_zero:
                self._show(trainer, task)

    def _show(self, trainer: Trainer, task: LaytonTask) -> None:
        if self._batch is None:
            self._batch = _first_validation_batch(trainer)
        if self._batch is None:
            return
        # Pictures must leave no trace in training: modes, random numbers and the gradient switch come back.
        modes = {module: module.training for module in task.modules()}
        with torch.random.fork_rng(), torch.no_grad():
            task.eval()
            batch = task.transfer_batch_to_device(self._batch, task.device, 0)
            with trainer.precision_plugin.forward_context():
                rows = task.picture_grid(batch)
        for module, mode in modes.items():
            module.training = mode
        if rows:
            self._write(trainer, rows)

    def _write(self, trainer: Trainer, rows: dict[str, Tensor]) -> None:
        picture = labelled(rows, title=f"step {trainer.global_step:,}", max_images=self.max_images)
        path = Path(trainer.default_root_dir) / GRID_FOLDER / f"step={trainer.global_step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(picture, path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(key="grid", images=[picture], step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("grid", np.asarray(picture), trainer.global_step, dataformats="HWC")


def labelled(rows: dict[str, Tensor], *, title: str, max_images: int) -> Image.Image:
    """Named rows of pictures on one sheet.

    Args:
        rows: (B, 3, H, W) in [-1, 1] each, NaN is black; smaller ones are enlarged to the largest.
        title: The line at the top.
        max_images: columns taken from B.

    Raises:
        ValueError: no rows, or a row that is not (B, 3, H, W).
    """
    wrong = {name: tuple(images.shape) for name, images in rows.items() if images.ndim != 4 or images.shape[1] != 3}
    if wrong or not rows:
        raise ValueError(f"picture_grid must return at least one row, each (B, 3, H, W); got {wrong or rows}")
    cells = {
        name: [Cell(to_image(image.float().nan_to_num(nan=-1.0))) for image in images[:max_images]]
        for name, images in rows.items()
    }
    side = max(max(images.shape[2:]) for images in rows.values())
    return sheet([Row(name, row) for name, row in cells.items()], title=title, cell=side)


def _first_validation_batch(trainer: Trainer) -> Any:
    loaders = trainer.val_dataloaders
    if loaders is None and trainer.datamodule is not None:  # type: ignore[attr-defined]
        loaders = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
    loader = loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders
    return next(iter(loader), None) if loader else None
