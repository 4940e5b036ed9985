"""Random numbers of a run as a pure function of (seed, place in the run), so that resuming is exact by construction."""

from __future__ import annotations

import hashlib
import os
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

_CHECKPOINT_KEY = "layton_generators"


def derive_seed(*parts: int | str) -> int:
    """63-bit seed of a tuple of numbers and words; equal on every machine and in every process.

    Args:
        parts: what the seed belongs to, for example ``(run_seed, "train", global_step)``.

    Returns:
        An integer in [0, 2**63), by BLAKE2b of the parts.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_libraries(seed: int) -> None:
    """Seed the global generators of torch (all devices), numpy and Python.

    Args:
        seed: any integer in [0, 2**63).
    """
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def default_run_seed() -> int:
    """The seed that ``seed_everything`` chose for this process, 0 when it was never called."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


class Randomness(Callback):
    """Seeds the global generators before every batch, and saves the generators that the task holds.

    Dropout, k-means starts and everything else that draws from a global generator then depends on
    (seed, stage, step, batch, rank) only: not on what was drawn before, nor on validation having run, nor on
    whether the process was restarted. `LaytonTask` attaches this callback itself.

    Attributes:
        seed: seed of the run; the one saved in the checkpoint wins on resume.
        position: what the current batch's numbers are derived from.
    """

    def __init__(self) -> None:
        self.seed = default_run_seed()
        self.position: tuple[int | str, ...] = ("setup",)
        self._before_validation: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """The run's seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the seed of the run that is resumed."""
        self.seed = int(state_dict["seed"])

    def derived(self, *parts: int | str) -> int:
        """Seed for a purpose at the current place in the run."""
        return derive_seed(self.seed, *self.position, *parts)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed for one training batch; batch_idx keeps accumulated batches of one step apart."""
        self._seed("train", trainer.global_step, batch_idx, trainer.global_rank)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validating more or less often must not change training: keep the task's own generators as they are."""
        self._before_validation = _states(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the task's own generators back."""
        _restore(pl_module, self._before_validation)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed for one validation batch: the same numbers at every validation, so that scores compare."""
        self._seed("validation", batch_idx, dataloader_idx, trainer.global_rank)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed for one test batch."""
        self._seed("test", batch_idx, dataloader_idx, trainer.global_rank)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the state of every torch.Generator that is an attribute of the task."""
        states = self._before_validation if trainer.validating else _states(pl_module)
        if states:
            checkpoint[_CHECKPOINT_KEY] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore those generators."""
        _restore(pl_module, checkpoint.get(_CHECKPOINT_KEY, {}))

    def _seed(self, *position: int | str) -> None:
        self.position = position
        seed_libraries(self.derived("global"))


def _generators(task: LightningModule) -> dict[str, torch.Generator]:
    return {name: value for name, value in vars(task).items() if isinstance(value, torch.Generator)}


def _states(task: LightningModule) -> dict[str, Tensor]:
    return {name: generator.get_state() for name, generator in _generators(task).items()}


def _restore(task: LightningModule, states: dict[str, Tensor]) -> None:
    held = _generators(task)
    for name, state in states.items():
        if name in held:
            held[name].set_state(state.cpu())
