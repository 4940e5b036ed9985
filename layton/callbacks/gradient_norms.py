"""How strongly each term of the loss pulls."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from layton.tasks.base import LaytonTask


class GradientNorms(Callback):
    """Logs the norm of every loss term's own gradient, weight included, as ``train/gradient_<term>``.

    A term that is not wired, or is drowned by another one, shows. Training is the same with and without it; a step in
    which it looks takes one more backward pass for each term. Of several ranks the first tells its own norms.

    Args:
        every_n_steps: Optimizer steps from one look to the next.

    Raises:
        ValueError: ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be >= 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps

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
        for name, part in parts.items():
            if part.requires_grad:
                gradients = torch.autograd.grad(part, learning, retain_graph=True, allow_unused=True)
                found = [gradient for gradient in gradients if gradient is not None]
                norm = torch.nn.utils.get_total_norm(found) if found else part.new_zeros(())
            else:
                norm = part.new_zeros(())
            task.log(f"train/gradient_{name}", norm, rank_zero_only=True)
