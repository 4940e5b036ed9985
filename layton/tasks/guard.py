"""Bad steps: a loss or gradient that is not finite changes nothing, is counted, and stops the run when it persists."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from layton.dtensors import local


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is NaN or infinite, or were rejected."""


class StepGuard(Callback):
    """Skips optimizer steps whose loss or gradients are not finite.

    A skipped step leaves weights, optimizer state, EMA and float buffers (running statistics, codebooks that update
    themselves in the forward pass) bit for bit as they were. It is logged as ``train/skipped_steps``. All ranks decide
    together. `LaytonTask` attaches this callback itself.

    Args:
        max_in_a_row: the run stops with `NonFiniteError`, naming the batches, after this many bad steps in a row.

    Attributes:
        skipped: bad steps since the beginning of the run (kept over resumes).
        skipped_now: whether the current step was skipped, the model's or another network's.
        model_skipped: whether the model's own was, so that averages of it stay as they are.

    Raises:
        ValueError: max_in_a_row below 1.
    """

    def __init__(self, max_in_a_row: int = 10) -> None:
        if max_in_a_row < 1:
            raise ValueError(f"max_in_a_row must be >= 1, got {max_in_a_row}")
        self.max_in_a_row = max_in_a_row
        self.skipped = 0
        self.in_a_row = 0
        self.skipped_now = self.model_skipped = False
        self.judged: Optimizer | None = None  # whose loss goes backward, where there are several
        self.judges_model = True  # whether that is the model's
        self._rejected: dict[Optimizer | None, str] = {}
        self._amid_step = False
        self._reasons: deque[str] = deque(maxlen=max_in_a_row)
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        """Counters."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counters."""
        self.skipped = int(state_dict["skipped"])
        self.in_a_row = int(state_dict["in_a_row"])

    @torch.no_grad()  # a quantizer has buffers that are told to have gradients
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember what a forward pass may change: buffers, and parameters that a module names."""
        self.skipped_now = self.model_skipped = False
        if self._amid_step:
            return
        self._rejected.clear()  # of an optimizer that made no step: its gradients are gone
        live = _changing_buffers(pl_module)
        if [id(buffer) for buffer, _ in self._buffers] != [id(buffer) for buffer in live]:
            self._buffers = [(buffer, buffer.detach().clone()) for buffer in live]
        for buffer, copy in self._buffers:
            copy.copy_(buffer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note a loss that is not finite: it need not show in the gradients."""
        value = loss.detach()
        if not bool(torch.isfinite(value).all()):
            self.reject(f"loss {float(value.float().sum())}")

    def reject(self, reason: str) -> None:
        """Have the current step skipped, for a reason of the caller's.

        Args:
            reason: For the message of a run that stops.
        """
        self._rejected[self.judged] = reason

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the gradients away when loss or gradients are bad: an optimizer skips parameters without gradient."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # Lightning leaves it to fused optimizers; who looks and who clips comes before
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        reason = self._rejected.pop(optimizer if self.judged is not None else None, None)
        reason = reason or _bad_gradient(pl_module, parameters)
        if trainer.strategy.reduce_boolean_decision(reason is None, all=True):
            return
        for parameter in parameters:
            parameter.grad = None
        for buffer, copy in self._buffers:
            if self.judges_model or not isinstance(buffer, nn.Parameter):  # a critic's bad step undoes no good one
                buffer.copy_(copy)
        self.skipped_now = True
        self.model_skipped |= self.judges_model
        self._reasons.append(f"step {trainer.global_step}: {reason or 'bad on another rank'}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, log, and stop after too many.

        Raises:
            NonFiniteError: max_in_a_row bad steps in a row.
        """
        self._amid_step = trainer.fit_loop._should_accumulate()
        if self.skipped_now:
            self.skipped += 1
            self.in_a_row += 1
            self._reasons[-1] += f", batch keys {batch_keys(batch)}"
        elif not self._amid_step:
            self.in_a_row = 0
        pl_module.log("train/skipped_steps", float(self.skipped))
        if self.in_a_row >= self.max_in_a_row:
            raise NonFiniteError(
                f"{self.in_a_row} steps in a row had a loss or gradient that is not finite or stands out; the weights "
                "are those of the last good step. " + "; ".join(self._reasons)
            )


def batch_keys(batch: Any) -> list[str]:
    """Names of the samples of a batch, from its ``key`` entry; empty when it has none."""
    if not isinstance(batch, Mapping):
        return []
    keys = batch.get("key", [])
    if isinstance(keys, str):
        return [keys]
    return [str(key) for key in keys] if isinstance(keys, Sequence) else []


def _changing_buffers(task: LightningModule) -> list[Tensor]:
    learning = [module for module in task.modules() if module.training]
    buffers = [buffer for module in learning for buffer in module.buffers(recurse=False)]
    return buffers + [written for module in learning for written in getattr(module, "changes_in_forward", ())]


def _bad_gradient(task: LightningModule, parameters: list[torch.nn.Parameter]) -> str | None:
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if not gradients or bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
        return None
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    for parameter in parameters:
        if parameter.grad is not None and not bool(torch.isfinite(local(parameter.grad)).all()):
            return f"gradient of {names.get(id(parameter), 'a parameter')}"
    return None  # finite gradients whose norm overflows: clipping deals with those
