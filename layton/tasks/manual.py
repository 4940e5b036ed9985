"""Manual optimization: what tasks share that train networks of their own (discriminators, critics) beside the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

from lightning.pytorch import Callback
from lightning.pytorch.cli import ReduceLROnPlateau as MonitoredPlateau
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from layton.tasks.base import LaytonTask, OptimizerCallable


class ManualTask(LaytonTask):
    """A task that makes its own optimizer steps, where ``automatic_optimization`` is false.

    ``trainer.accumulate_grad_batches`` holds for it as for any other: Lightning refuses the option there, so it is
    taken over before Lightning looks. Gradients are clipped by ``gradient_clip`` instead of the trainer's option.

    Attributes:
        gradient_clip: Largest gradient norm of any optimizer; 0 does not clip. Subclasses set it.
    """

    gradient_clip: float = 0.0
    _make_critic_optimizer: OptimizerCallable | None = None
    _accumulated: int = 1

    def critic_parameters(self) -> list[nn.Parameter]:
        """Parameters of the networks that judge the model; they have an optimizer of their own."""
        return []

    def trainable_parameters(self) -> list[nn.Parameter]:
        """All that require a gradient, but for the critic's."""
        critic = {id(parameter) for parameter in self.critic_parameters()}
        return [parameter for parameter in super().trainable_parameters() if id(parameter) not in critic]

    def configure_optimizers(self) -> Any:
        """The model's optimizer with its schedule, and the critic's where there is one.

        Raises:
            ValueError: Nothing to train, a critic without an optimizer, or a schedule that waits for a metric.
        """
        if self.automatic_optimization:
            return super().configure_optimizers()
        parameters, critic = self.trainable_parameters(), self.critic_parameters()
        if not parameters:
            raise ValueError(f"{type(self).__name__} has no trainable parameters")
        optimizers = [self._make_optimizer(parameters)]
        if critic:
            if self._make_critic_optimizer is None:
                raise ValueError(f"{type(self).__name__} trains networks of the method's own: give a critic_optimizer")
            optimizers.append(self._make_critic_optimizer(critic))
        if self._make_lr_scheduler is None:
            return optimizers
        scheduler = self._make_lr_scheduler(optimizers[0])
        if isinstance(scheduler, MonitoredPlateau):
            raise ValueError("this task steps its schedule after every step: ReduceLROnPlateau cannot be used")
        return optimizers, [scheduler]

    def configure_callbacks(self) -> list[Callback]:
        """As in the base; the trainer asks for them before it judges its own options."""
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if not self.automatic_optimization and fitting:
            self._accumulated, self.trainer.accumulate_grad_batches = self.trainer.accumulate_grad_batches, 1
        return super().configure_callbacks()

    def on_fit_start(self) -> None:
        """Give the trainer its option back: callbacks ask it where a step ends."""
        super().on_fit_start()
        if not self.automatic_optimization:
            self.trainer.accumulate_grad_batches = self._accumulated

    def on_train_start(self) -> None:
        """Forget the gradients of an earlier fit that ended amid a step."""
        super().on_train_start()
        if not self.automatic_optimization:
            for optimizer in self.all_optimizers():
                optimizer.zero_grad()

    @property
    def amid_step(self) -> bool:
        """Whether the batch in hand leaves its optimizer step to a later one."""
        return self._trainer is not None and self.trainer.fit_loop._should_accumulate()

    def all_optimizers(self) -> list[LightningOptimizer]:
        """The optimizers, the model's first."""
        found = self.optimizers()
        return cast("list[LightningOptimizer]", found if isinstance(found, list) else [found])

    @contextmanager
    def turn_of(self, optimizer: LightningOptimizer) -> Iterator[None]:
        """Meanwhile what other optimizers train needs no gradient."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def learn(self, optimizer: LightningOptimizer, loss: Tensor, *, counted: bool = True) -> None:
        """Backward pass of one batch, and where one is due the step, with the schedule after it.

        Call it in the optimizer's turn (`turn_of`): a gradient of another one would stay until that one's step.

        Args:
            optimizer: Whose parameters learn.
            loss: Of this batch, ().
            counted: Whether this is a step of the model, which the trainer counts and the schedule follows;
                ``max_steps`` and checkpoints do not mean those of critics.
        """
        if not counted:
            optimizer._on_before_step = optimizer._on_after_step = _nothing
        self._guard.judged, self._guard.judges_model = optimizer.optimizer, counted
        with self._unsynchronised():
            self.manual_backward(loss / self.trainer.accumulate_grad_batches)
        if self.amid_step:
            return
        optimizer.step()
        optimizer.zero_grad()  # no gradient lies beside what the next forward pass keeps
        if counted and (scheduler := cast(Any, self.lr_schedulers())) is not None:
            scheduler.step()

    def _unsynchronised(self) -> AbstractContextManager[object]:
        """Ranks exchange gradients once a step, with its last batch."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if self.amid_step and isinstance(strategy, DDPStrategy) else nullcontext()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip where the trainer does not, after `StepGuard` has looked and a scaler has unscaled the gradients."""
        if not self.automatic_optimization and self.gradient_clip > 0:
            learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(learning, self.gradient_clip)


def _nothing() -> None: ...
