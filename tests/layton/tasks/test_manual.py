"""Steps of a task with a critic: accumulated batches are one step, and nobody's gradient reaches the other."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from layton.tasks.manual import ManualTask

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


class Duel(ManualTask):
    """Model and critic, linear both; the model's loss goes through the critic and the critic's through the model."""

    def __init__(self, clip: float = 0.0, model_rate: float = 0.1) -> None:
        super().__init__(optimizer=partial(torch.optim.SGD, lr=model_rate))
        self._make_critic_optimizer = partial(torch.optim.SGD, lr=0.1)
        self.automatic_optimization = False
        self.gradient_clip = clip
        self.model, self.critic = nn.Linear(3, 2), nn.Linear(2, 1)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape) + 0.1 * number)

    def critic_parameters(self) -> list[nn.Parameter]:
        return list(self.critic.parameters())

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        model, critic = self.all_optimizers()
        with self.turn_of(model):
            self.learn(model, self.critic(self.model(batch).tanh()).square().mean())
        with self.turn_of(critic):
            self.learn(critic, (self.critic(self.model(batch).tanh()) - 1).square().mean(), counted=False)


def duel(
    root: Path,
    batches: list[Tensor],
    *,
    accumulate: int,
    clip: float = 0.0,
    model_rate: float = 0.1,
    task: Duel | None = None,
    plugins: list[MixedPrecision] | None = None,
) -> tuple[Duel, Trainer]:
    task = Duel(clip, model_rate) if task is None else task
    trainer = Trainer(
        default_root_dir=root,
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=plugins,
    )
    trainer.fit(task, DataLoader(batches, batch_size=None))
    return task, trainer


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_accumulated_batches_are_one_step_of_their_mean(tmp_path: Path, clip: float) -> None:
    rows = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    parts, trainer = duel(tmp_path, list(rows.split(2)), accumulate=3, clip=clip)
    assert trainer.global_step == 2 and trainer.accumulate_grad_batches == 3
    start = {name: value.clone() for name, value in Duel().state_dict().items()}
    first, _ = duel(tmp_path, [rows[:6]], accumulate=1, clip=clip)
    # The critic of accumulated batches has seen the model as it was before its step, but for the last of them.
    once, _ = duel(tmp_path, list(rows[:6].split(2)), accumulate=3, clip=clip)
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(once.model.state_dict()[name], value)
        assert not torch.equal(value, start[f"model.{name}"])
    if clip:  # SGD at 0.1 of gradients of norm 0.01 at most
        change = [value - start[f"model.{name}"] for name, value in first.model.state_dict().items()]
        assert float(torch.cat([value.flatten() for value in change]).norm()) <= 0.1 * clip * 1.001
    moved = [not torch.equal(value, start[f"critic.{name}"]) for name, value in once.critic.state_dict().items()]
    assert all(moved) and all(not torch.equal(a, b) for a, b in zip(once.parameters(), parts.parameters(), strict=True))


class Fused(Duel):
    def __init__(self, clip: float) -> None:
        super().__init__(clip)
        self._make_optimizer = self._make_critic_optimizer = partial(torch.optim.SGD, lr=0.1, fused=True)


def test_what_is_clipped_is_the_gradient_and_not_its_scaled_one(tmp_path: Path) -> None:
    rows, clip = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), 0.01
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    task = Fused(clip)
    start = torch.cat([value.flatten().clone() for value in task.model.state_dict().values()])
    duel(tmp_path, [rows], accumulate=1, task=task, plugins=[plugin])
    change = torch.cat([value.flatten() for value in task.model.state_dict().values()]) - start
    assert float(change.norm()) == pytest.approx(0.1 * clip, rel=1e-2)


def test_the_critics_gradients_are_its_own_and_add_up(tmp_path: Path) -> None:
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    # A model that does not move leaves the critic alone with the mean of its own losses.
    still, _ = duel(tmp_path, list(rows.split(2)), accumulate=3, model_rate=0.0)
    start = Duel()
    start.critic.requires_grad_(True)
    (start.critic(start.model(rows).tanh()) - 1).square().mean().backward()
    for name, parameter in start.critic.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(still.critic.state_dict()[name], parameter.detach() - 0.1 * parameter.grad)


class Bad(Duel):
    """The critic's loss of the first batch is no number."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        model, critic = self.all_optimizers()
        with self.turn_of(model):
            self.learn(model, self.critic(self.model(batch).tanh()).square().mean())
        with self.turn_of(critic):
            factor = float("nan") if batch_idx == 0 else 1.0
            self.learn(critic, factor * self.critic(self.model(batch).tanh()).mean(), counted=False)


def test_a_bad_batch_of_the_critic_costs_the_critic_alone_its_step(tmp_path: Path) -> None:
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    task, trainer = duel(tmp_path, list(rows.split(2)), accumulate=2, task=Bad())
    start = Duel()
    assert trainer.global_step == 1 and task.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(task.critic.parameters(), start.critic.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(task.model.parameters(), start.model.parameters(), strict=True))


def test_validating_leaves_the_trainers_option_alone(tmp_path: Path) -> None:
    task = Duel()
    task.validation_step = lambda *_: None  # type: ignore[method-assign,assignment]
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        enable_model_summary=False,
        **options,
    )
    rows = DataLoader(list(torch.randn(4, 3).split(2)), batch_size=None)
    trainer.validate(task, rows, verbose=False)
    trainer.fit(task, rows)
    assert trainer.accumulate_grad_batches == 2 and trainer.global_step == 1


def test_a_step_at_the_end_of_an_epoch_may_have_fewer_batches(tmp_path: Path) -> None:
    rows = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    _, trainer = duel(tmp_path, list(rows.split(2)), accumulate=3)
    assert trainer.global_step == 2


class MovedWeight(nn.Linear):
    """A weight that a forward pass writes to besides, as a codebook whose dead codes are moved."""

    @property
    def changes_in_forward(self) -> list[nn.Parameter]:
        return [self.weight]


class BadCritic(Duel):
    def __init__(self) -> None:
        super().__init__()
        moved = MovedWeight(3, 2)
        moved.load_state_dict(self.model.state_dict())
        self.model = moved
        self.after_model: Tensor | None = None

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        model, critic = self.all_optimizers()
        with self.turn_of(model):
            self.learn(model, self.critic(self.model(batch).tanh()).square().mean())
        self.after_model = self.model.weight.detach().clone()
        with self.turn_of(critic):
            self.learn(critic, self.critic(self.model(batch).tanh()).mean() * torch.nan, counted=False)


def test_a_critics_bad_step_undoes_no_good_step_of_the_model(tmp_path: Path) -> None:
    start = BadCritic().model.weight.detach().clone()
    task, _ = duel(tmp_path, [torch.ones(2, 3)], accumulate=1, task=BadCritic())
    assert task.after_model is not None and task.skipped_steps == 1
    assert torch.equal(task.model.weight.cpu(), task.after_model.cpu()) and not torch.equal(
        task.after_model.cpu(), start
    )
