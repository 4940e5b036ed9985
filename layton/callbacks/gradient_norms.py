"""How strongly each term of the loss pulls."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from layton.sharding import is_sharded
from layton.tasks.base import LaytonTask


class GradientNorms(Callback):
    """Logs the norm of every loss term's own gradient, weight included, as ``train/gradient_<term>``.

    A term that is not wired, or is drowned by another one, shows. Weights become the same with and without it. A look
    takes one more backward pass for each term (which counts where forward-equivalents are counted), through a graph
    that can be gone through twice: not that of compiled blocks or of ``gradient_checkpointing: cheap``. Of several
    ranks the first tells its own norms.

    Args:
        every_n_steps: Optimizer steps from one look to the next.

    Raises:
        ValueError: ``every_n_steps`` is below 1; while training: the graph cannot be gone through twice.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be >= 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model of which no rank has the gradients.

        Raises:
            ValueError: The model is sharded.
        """
        if is_sharded(pl_module):
            raise ValueError("GradientNorms looks at whole gradients: not with --trainer.strategy fsdp")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask the task to look, or not."""
        if isinstance(pl_module, LaytonTask):
            pl_module.on_losses = None if trainer.global_step % self.every_n_steps else self._tell

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask no more."""
        if isinstance(pl_module, LaytonTask):
            pl_module.on_losses = None

    def _tell(self, task: LaytonTask, parts: dict[str, Tensor]) -> None:
        learning = [parameter for parameter in task.trainable_parameters() if parameter.requires_grad]
        norms = {f"train/gradient_{name}": float(_norm(part, learning)) for name, part in parts.items()}
        for logger in task.loggers:  # at once: Lightning's own way writes at its own steps, and forgets at epochs' ends
            logger.log_metrics(norms, step=task.trainer.fit_loop.epoch_loop._batches_that_stepped)


def _norm(part: Tensor, learning: list[nn.Parameter]) -> Tensor:
    if not part.requires_grad:
        return part.new_zeros(())
    try:
        gradients = torch.autograd.grad(part, learning, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"GradientNorms cannot look at this run, whose graph is gone through once ({reason})"
        ) from error
    found = [gradient for gradient in gradients if gradient is not None]
    return nn.utils.get_total_norm(found) if found else part.new_zeros(())
