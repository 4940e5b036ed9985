"""Exponential moving average of the trained parameters, by diffusers' EMAModel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from layton.dtensors import gathered, is_parted, joined, local, parted_like
from layton.ranks import own_rank
from layton.sharding import whole_weights
from layton.tasks.base import LaytonTask
from layton.tasks.guard import StepGuard

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


class EMA(Callback):
    """Averages `LaytonTask.averaged_parameters`, never buffers (a quantizer's statistics average themselves).

    The average is saved in the checkpoint and stands in for the weights during validation, tests, picture grids and
    export. Steps that `StepGuard` skipped are not averaged in. A low-precision parameter is averaged in float32.

    Args:
        decay: largest decay of the average, in [0, 1).
        use_ema_warmup: decay 1 - (1 + step / inv_gamma) ** -power instead of (1 + step) / (10 + step).
        inv_gamma: see use_ema_warmup.
        power: see use_ema_warmup; 2/3 for a million steps, 3/4 for fewer.
        min_decay: smallest decay, in [0, 1).
        update_after_step: averagings at the beginning, one every ``update_every`` steps, that just follow the weights.
        update_every: average after every so many optimizer steps.

    Of parameters that are shared out among ranks (`layton.sharding`) each rank averages its own part.

    Raises:
        ValueError: decay outside [0, 1) or update_every below 1.
    """

    def __init__(
        self,
        decay: float = 0.9999,
        use_ema_warmup: bool = True,
        inv_gamma: float = 1.0,
        power: float = 0.75,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        update_every: int = 1,
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if update_every < 1:
            raise ValueError(f"update_every must be >= 1, got {update_every}")
        self.decay = decay
        self.use_ema_warmup = use_ema_warmup
        self.inv_gamma = inv_gamma
        self.power = power
        self.min_decay = min_decay
        self.update_after_step = update_after_step
        self.update_every = update_every
        self.swapped = False
        self._average: EMAModel | None = None
        self._names: list[str] = []
        self._parameters: list[nn.Parameter] = []
        self._pending: dict[str, Any] | None = None
        self._last_step: int | None = None  # at which the average was last brought up to date

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the average, or take up the one of the checkpoint."""
        self._begin(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the average to the device; note the step, known only after the loops were restored."""
        if self._average is not None:
            self._average.to(device=pl_module.device)
        if self._last_step is None or self._last_step > trainer.global_step:  # or an earlier fit had more steps
            self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average in the weights after an optimizer step."""
        if self._average is None or self._last_step is None:
            return
        stepped = trainer.global_step - self._last_step
        if stepped == 0:
            return
        skipped = any(isinstance(c, StepGuard) and c.model_skipped for c in trainer.callbacks)  # type: ignore[attr-defined]
        if skipped:
            self._last_step = trainer.global_step
        elif stepped >= self.update_every:
            self._last_step = trainer.global_step
            self._average.step(self._own_parts())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        self.swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to the weights in training."""
        self.swap_out(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the average."""
        self.swap_in(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to the weights in training."""
        self.swap_out(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Back to the weights in training, also when validation failed."""
        self.swap_out(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint made while the average stands in still holds the weights in training."""
        if self.swapped and self._average is not None:
            checkpoint["state_dict"].update(
                zip(self._names, self._joined(self._average.temp_stored_params), strict=True)
            )

    def state_dict(self) -> dict[str, Any]:
        """The average, with the names of its parameters."""
        if self._average is None:
            return self._pending or {}
        average = self._average.state_dict()
        average["shadow_params"] = self._joined(average["shadow_params"])
        return {"names": self._names, "average": average, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the saved average until the model is there."""
        self._pending = state_dict or None
        self._average = None
        self._last_step = state_dict.get("last_step")  # older checkpoints do not say it

    def swap_in(self, task: LightningModule) -> None:
        """Put the average in place of the weights; no effect before training or when it is there already."""
        self._begin(task, only_saved=True)
        if self._average is not None and not self.swapped:
            parameters = self._own_parts()
            self._average.store(parameters)
            self._average.copy_to(parameters)
            self.swapped = True

    def swap_out(self, task: LightningModule) -> None:
        """Put the weights in training back."""
        if self._average is not None and self.swapped:
            self._average.restore(self._own_parts())
            self.swapped = False

    def _begin(self, task: LightningModule, *, only_saved: bool = False) -> None:
        if self._average is not None or (only_saved and self._pending is None):
            return
        from diffusers.training_utils import EMAModel  # here: it brings half of diffusers with it

        self._parameters = parameters = _averaged(task)
        names = {id(parameter): name for name, parameter in task.named_parameters()}
        self._names = [names[id(parameter)] for parameter in parameters]
        self._average = EMAModel(
            self._own_parts(),
            decay=self.decay,
            min_decay=self.min_decay,
            update_after_step=self.update_after_step,
            use_ema_warmup=self.use_ema_warmup,
            inv_gamma=self.inv_gamma,
            power=self.power,
            foreach=all(parameter.dtype == torch.float32 for parameter in parameters),
        )
        self._average.to(dtype=torch.float32)
        if self._pending is not None:
            self._restore(self._average, parameters, self._pending)
            self._pending = None

    def _restore(self, average: EMAModel, parameters: list[nn.Parameter], state: dict[str, Any]) -> None:
        shapes = [tuple(tensor.shape) for tensor in state["average"]["shadow_params"]]
        if state["names"] != self._names or shapes != [tuple(p.shape) for p in parameters]:
            odd = sorted(set(state["names"]) ^ set(self._names))[:8]
            raise ValueError(f"the checkpoint's EMA follows other parameters than this task; differing: {odd}")
        # The numbers come from the checkpoint, the recipe from the run file, as with a learning rate.
        recipe = {"shadow_params", "optimization_step"}
        found = {key: value for key, value in state["average"].items() if key in recipe}
        pairs = zip(found["shadow_params"], parameters, strict=True)
        found["shadow_params"] = [local(parted_like(tensor, parameter)) for tensor, parameter in pairs]
        average.load_state_dict(found)
        average.to(device=parameters[0].device if parameters else None)

    def _own_parts(self) -> list[Tensor]:
        return [local(parameter) for parameter in self._parameters]

    def _joined(self, parts: list[Tensor]) -> list[Tensor]:
        """Whole tensors of the ranks' parts, for a checkpoint, which rank 0 writes; all ranks have to ask."""
        if not any(map(is_parted, self._parameters)):
            return parts
        keep = own_rank() == 0
        return [gathered(joined(part, p), keep=keep) for part, p in zip(parts, self._parameters, strict=True)]


def _averaged(task: LightningModule) -> list[nn.Parameter]:
    if isinstance(task, LaytonTask):
        return task.averaged_parameters()
    return [parameter for parameter in task.parameters() if parameter.requires_grad]


@contextmanager
def averaged_weights(trainer: Trainer, task: LightningModule) -> Iterator[None]:
    """Within the block the task has its averaged weights, if the trainer keeps any, and has them whole.

    All ranks have to enter (`layton.sharding.whole_weights`).
    """
    averages = [c for c in trainer.callbacks if isinstance(c, EMA) and not c.swapped]  # type: ignore[attr-defined]
    for average in averages:
        average.swap_in(task)
    try:
        with whole_weights(task):
            yield
    finally:
        for average in averages:
            average.swap_out(task)
