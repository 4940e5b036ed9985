"""What a training run will need: parameters, memory and computation, counted on one step of it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from distill.budget import flop_counter
from distill.held import held_modules
from layton.quiet import silent_lightning
from layton.run.training import build_run
from layton.tasks.base import LaytonTask
from layton.tasks.manual import ManualTask


def run_needs(
    config: Sequence[str], *, data: str | None = None, changes: Sequence[str] = (), allow: Sequence[str] = ()
) -> dict[str, Any]:
    """Parameters of a run per part, the bytes of weights, gradients and AdamW's state, and what a step takes.

    Args:
        config: run files.
        data: data file; without one no step is made.
        changes: see `layton.run.training.build_run`.
        allow: modules, beside this library's, that they may name.

    Returns:
        task, parts (name, parameters, trainable; frozen text encoders and tokenizers are not among them), parameters,
        trainable, state_megabytes (float32), steps, step (`step_needs`, None without data) and total_teraflops (None
        without data or a number of steps).
    """
    run = build_run(config, data=data, changes=changes, allow=allow)
    task = run.task
    parts = [
        {
            "name": name,
            "class": type(module).__name__,
            "parameters": sum(p.numel() for p in module.parameters()),
            "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
        }
        for name, module in task.named_children()
    ]
    every = sum(p.numel() for p in task.parameters())
    critic = task.critic_parameters() if isinstance(task, ManualTask) else []
    trained = sum(p.numel() for p in (*task.trainable_parameters(), *critic))
    step = None if run.data is None else step_needs(task, run.data, batches=run.batches_per_step)
    return {
        "task": f"{type(task).__module__}.{type(task).__qualname__}",
        "parts": parts,
        "parameters": every,
        "trainable": trained,
        "state_megabytes": round(4 * (every + 4 * trained) / 1e6, 2),  # weights; gradient, two moments, average
        "steps": run.steps,
        "step": step,
        "total_teraflops": None if step is None or run.steps is None else run.steps * step["teraflops"],
    }


def step_needs(task: LaytonTask, data: LightningDataModule, *, batches: int = 1) -> dict[str, float]:
    """Make one optimizer step on the CPU, in float32, and count.

    Args:
        task: Is trained by one step.
        data: Its training data.
        batches: Batches of the step.

    Returns:
        teraflops: of matrix products, convolutions and attention, two for each multiplication, backward pass included.
        activations_megabytes: the most that was kept for backward passes at once, weights aside; what gradient
            checkpointing makes anew for a block is not in it.
    """
    kept = _Kept(task)
    with silent_lightning():
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=1,
            accumulate_grad_batches=batches,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with flop_counter() as counter, saved_tensors_hooks(kept.pack, _unpack):
            trainer.fit(task, datamodule=data)
    return {"teraflops": counter.get_total_flops() / 1e12, "activations_megabytes": kept.most / 1e6}


class _Kept:
    """Bytes of the storages that are saved for backward passes."""

    def __init__(self, task: LaytonTask) -> None:
        parts = [task, *held_modules(task)]
        weights = (tensor for part in parts for tensor in (*part.parameters(), *part.buffers()))
        self._own = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self._saved: Counter[int] = Counter()
        self._now = self.most = 0

    def pack(self, tensor: Tensor) -> _Saved:
        saved, storage = _Saved(tensor), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self._own:
            self._saved[place] += 1
            if self._saved[place] == 1:
                self._now += size
                self.most = max(self.most, self._now)
            weakref.finalize(saved, self._free, place, size)
        return saved

    def _free(self, place: int, size: int) -> None:
        self._saved[place] -= 1
        if self._saved[place] == 0:
            self._now -= size


class _Saved:
    """Something that can be watched: a tensor would be handed out unchanged."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor
