"""Averages, pictures, progress lines, seeds, loggers."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from PIL import Image
from torch.utils.data import DataLoader
from toy import ToyPart, ToySource, ToyTask, toy_data

from layton.callbacks import (
    EMA,
    ExportWeights,
    GradientNorms,
    LineProgress,
    PictureGrid,
    SafeCheckpoint,
    averaged_weights,
    export_atomically,
)
from layton.callbacks.grid import labelled
from layton.callbacks.progress import batch_size
from layton.data.module import ImageDataModule
from layton.sharding import FullySharded
from layton.tasks.seeding import derive_seed


def toy_task(**settings: Any) -> ToyTask:
    torch.manual_seed(0)
    return ToyTask(part=ToyPart(), optimizer=partial(torch.optim.AdamW, lr=1e-2), **settings)


def fit(
    folder: Path, task: ToyTask, callbacks: list[Callback], *, ckpt_path: str | None = None, **settings: Any
) -> Trainer:
    trainer = Trainer(
        **{
            "default_root_dir": folder,
            "accelerator": "cpu",
            "max_steps": 6,
            "logger": False,
            "enable_progress_bar": any(isinstance(c, LineProgress) for c in callbacks),
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, SafeCheckpoint) for c in callbacks),
            "callbacks": callbacks,
            **settings,
        }
    )
    trainer.fit(task, toy_data(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


class ByHand(Callback):
    """The average by its formula, and what validation sees."""

    def __init__(self) -> None:
        self.average: list[torch.Tensor] = []
        self.validated: list[list[torch.Tensor]] = []
        self.trained: list[list[torch.Tensor]] = []
        self.usage: list[torch.Tensor] = []

    def on_train_start(self, trainer: Trainer, task: Any) -> None:
        self.average = [p.detach().double().clone() for p in task.parameters()]

    def on_train_batch_end(self, trainer: Trainer, task: Any, *args: Any) -> None:
        step = trainer.global_step - 1
        decay = 0.0 if step == 0 else min(0.9, 1 - (1 + step) ** -0.75)
        for average, parameter in zip(self.average, task.parameters(), strict=True):
            average.lerp_(parameter.detach().double(), 1 - decay)

    def on_validation_batch_start(self, trainer: Trainer, task: Any, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append([p.detach().clone() for p in task.parameters()])
            self.usage.append(task.part.usage.clone())

    def on_train_batch_start(self, trainer: Trainer, task: Any, *args: Any) -> None:
        self.trained.append([p.detach().clone() for p in task.parameters()])


def test_every_task_is_tested_as_it_is_validated() -> None:
    task = toy_task()
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
    samples = [ToySource("test").sample(index, seed=0) for index in range(10)]
    (found,) = trainer.test(task, DataLoader(samples, batch_size=5), verbose=False)
    assert {"test/loss", "test/pixel", "test/odd", "test/even"} <= found.keys()


def test_average_follows_its_formula_and_stands_in_during_validation(tmp_path: Path) -> None:
    task, hand, ema = toy_task(), ByHand(), EMA(decay=0.9)
    trainer = fit(tmp_path, task, [ema, hand], max_steps=5)
    final = [p.detach().clone() for p in task.parameters()]
    shadow = ema.state_dict()["average"]["shadow_params"]
    torch.testing.assert_close([t.double() for t in shadow], hand.average, rtol=1e-5, atol=1e-6)
    assert ema.state_dict()["names"] == [name for name, _ in task.named_parameters()]  # parameters, no buffers
    assert all(torch.equal(a, b) for seen in hand.validated for a, b in zip(seen, shadow, strict=True))
    assert len(hand.validated) == 2 and not any(torch.equal(a, b) for a, b in zip(final, shadow, strict=True))
    assert all(torch.equal(task.part.usage, usage) for usage in hand.usage)  # buffers are those in training
    with averaged_weights(trainer, task):
        assert all(torch.equal(p, t) for p, t in zip(task.parameters(), shadow, strict=True))
    assert all(torch.equal(p, t) for p, t in zip(task.parameters(), final, strict=True))


class SaveWhileValidating(Callback):
    def on_validation_batch_end(self, trainer: Trainer, task: Any, *args: Any) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "during.ckpt")


def test_a_checkpoint_made_during_validation_holds_the_weights_in_training(tmp_path: Path) -> None:
    task = toy_task()
    fit(tmp_path, task, [EMA(decay=0.9), SaveWhileValidating()], max_steps=5)
    saved = torch.load(tmp_path / "during.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in task.state_dict().items())


def test_average_of_other_parameters_is_refused(tmp_path: Path) -> None:
    ema = EMA()
    ema.load_state_dict({"names": ["a"], "average": {"shadow_params": [torch.zeros(1)], "optimization_step": 3}})
    with pytest.raises(ValueError, match="other parameters"):
        ema.swap_in(toy_task())


def test_pictures_leave_no_trace_in_training(tmp_path: Path) -> None:
    with_grid, without = toy_task(), toy_task()
    fit(tmp_path / "a", with_grid, [EMA(decay=0.9), PictureGrid(every_n_steps=2, max_images=2)])
    fit(tmp_path / "b", without, [EMA(decay=0.9)])
    assert with_grid.losses == without.losses
    grids = sorted((tmp_path / "a" / "grids").iterdir())
    assert [path.name for path in grids] == [f"step={step:08d}.png" for step in (2, 4, 6)]
    with Image.open(grids[0]) as picture:
        picture.verify()


def test_grids_show_named_rows_one_below_the_other() -> None:
    rows = {"black": torch.full((3, 3, 16, 16), torch.nan), "large": torch.full((3, 3, 32, 32), 0.2)}
    picture = labelled(rows, title="step 5", max_images=2)
    columns, black = np.array(picture), np.array([0, 0, 0])
    assert (columns == black).all(
        -1
    ).sum() == 2 * 32**2  # of two images, as large as the others; ink is not quite black
    assert (columns == 153).all(-1).sum() == 2 * 32**2
    assert np.argwhere((columns == black).all(-1))[:, 0].max() < np.argwhere((columns == 153).all(-1))[:, 0].min()
    with pytest.raises(ValueError, match="wrong"):
        labelled({"wrong": torch.zeros(2, 1, 4, 4)}, title="", max_images=2)


def test_progress_lines_tell_speed_and_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, toy_task(), [LineProgress(every_n_steps=2)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:3] for line in lines] == [["step", step] for step in ("1/6", "3/6", "5/6", "5", "6/6")]
    assert all("img/s" in line and "loss" in line and "lr 1.00e-02" in line for line in lines if "/6" in line)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ({"key": ["a"], "image": torch.zeros(3, 2)}, 3),
        ([torch.zeros(2)], 2),
        ({"caption": ["a"] * 4}, 4),
        ({}, 0),
        (None, 0),
    ],
)
def test_batch_size(batch: Any, size: int) -> None:
    assert batch_size(batch) == size


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.one_of(st.integers(), st.text()), max_size=4), st.lists(st.one_of(st.integers(), st.text()), max_size=4)
)
def test_seeds_differ_when_their_parts_do(left: list[int | str], right: list[int | str]) -> None:
    assert 0 <= derive_seed(*left) < 2**63
    assert (derive_seed(*left) == derive_seed(*right)) == (left == right)


def test_seed_known_answer() -> None:
    """The same on every machine: a changed value changes every run."""
    assert derive_seed(0, "train", 5) == 5590350133060891142


def test_step_generator_depends_on_step_and_stream_only(tmp_path: Path) -> None:
    drawn: dict[tuple[int, str], list[float]] = {}

    class Draw(Callback):
        def on_train_batch_end(self, trainer: Trainer, task: Any, *args: Any) -> None:
            torch.rand(3)
            for stream in ("a", "b"):
                key = (trainer.global_step, stream)
                drawn.setdefault(key, []).append(float(torch.rand((), generator=task.step_generator(stream))))

    for name in "xy":
        fit(tmp_path / name, toy_task(), [Draw()])
    assert all(first == second for first, second in drawn.values())
    assert len({values[0] for values in drawn.values()}) == len(drawn) == 12


def test_log_losses_sums_with_weights() -> None:
    terms = {"a": torch.tensor(2.0), "b": torch.tensor(3.0), "c": torch.tensor(float("nan"))}
    assert float(toy_task().log_losses(terms, weights={"b": 0.5, "c": 0.0})) == 3.5
    with pytest.raises(ValueError, match="must name loss terms"):
        toy_task().log_losses(terms, weights={"d": 1.0})


def test_plateau_schedule_gets_its_metric() -> None:
    configured = toy_task(lr_scheduler=partial(ReduceLROnPlateau, monitor="val/loss")).configure_optimizers()
    assert configured["lr_scheduler"]["monitor"] == "val/loss"


def test_best_by_a_metric_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"monitor \(val/loss\) saves after validation.*last callback"):
        SafeCheckpoint(monitor="val/loss", every_n_train_steps=5)
    best = SafeCheckpoint(monitor="val/loss", keep=1)
    fit(tmp_path, toy_task(), [best], max_steps=15)
    assert len(list((tmp_path / "checkpoints").glob("best-*.ckpt"))) == 1 and best.best_model_score is not None


def test_training_in_half_precision_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"weights in training are torch.bfloat16"):
        toy_task().to(torch.bfloat16).on_fit_start()


def test_strategies_that_shard_parameters_are_refused() -> None:
    task = toy_task()
    # fitting would leave its ranks in os.environ
    for strategy, told in (
        (ModelParallelStrategy(), "no checkpoint of this library: take fsdp"),
        (FullySharded(), "ToyTask does"),
    ):
        task._trainer = SimpleNamespace(strategy=strategy)
        with pytest.raises(ValueError, match=told):
            task.configure_callbacks()


def test_an_export_outlives_a_process_that_was_killed_amid_the_next(tmp_path: Path) -> None:
    folder, old, part = tmp_path / "export", tmp_path / ".export.old", tmp_path / ".export.part"
    task = toy_task()
    export_atomically(task, folder)
    wanted = sorted(path.name for path in folder.iterdir())
    folder.replace(old)  # killed after the old one was taken away
    part.mkdir()
    (part / "half").touch()

    class Killed(ToyTask):
        def export(self, folder: Path) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_atomically(Killed(part=ToyPart(), optimizer=partial(torch.optim.SGD, lr=0.1)), folder)
    assert sorted(path.name for path in folder.iterdir()) == wanted and [*tmp_path.iterdir()] == [folder]
    export_atomically(task, folder)
    assert sorted(path.name for path in folder.iterdir()) == wanted and [*tmp_path.iterdir()] == [folder]


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    class Poison(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with torch.no_grad():
                next(pl_module.parameters()).fill_(torch.nan)

    with pytest.raises(ValueError, match="1 trained weights are not finite, such as part"):
        fit(tmp_path, toy_task(), [Poison(), ExportWeights()])
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 2, "check_val_every_n_epoch": None}])
def test_every_step_is_saved_that_of_an_epochs_end_too(tmp_path: Path, settings: dict[str, Any]) -> None:
    fit(tmp_path, toy_task(), [SafeCheckpoint(every_n_train_steps=1, keep=-1)], max_steps=12, **settings)
    assert len(list((tmp_path / "checkpoints").glob("step=*.ckpt"))) == 12


def test_weights_that_are_not_finite_cost_no_file(tmp_path: Path) -> None:
    class Poison(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            if trainer.global_step == 7:
                with torch.no_grad():
                    pl_module.unused.fill_(torch.nan)

    task = toy_task()
    task.unused = torch.nn.Parameter(torch.zeros(1))  # no part of the loss: no step is bad
    with pytest.warns(UserWarning, match="not finite at step"):
        fit(tmp_path, task, [Poison(), SafeCheckpoint(every_n_train_steps=2, keep=2)], max_steps=12)
    assert sorted(path.stem for path in (tmp_path / "checkpoints").glob("*.ckpt")) == ["step=00000004", "step=00000006"]


@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 3, "check_val_every_n_epoch": None}])
def test_an_early_end_is_saved(tmp_path: Path, settings: dict[str, Any]) -> None:
    early = EarlyStopping("val/loss", patience=1, mode="max", min_delta=10.0)  # never better
    trainer = fit(tmp_path, toy_task(), [early, SafeCheckpoint(every_n_train_steps=1000)], max_steps=100, **settings)
    assert trainer.global_step < 100
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert path.stem == f"step={trainer.global_step:08d}"


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_a_run_that_was_stopped_amid_an_epoch_goes_on_exactly(tmp_path: Path) -> None:
    options = {"max_steps": -1, "max_epochs": 3, "val_check_interval": 3}
    whole, parts = toy_task(), toy_task()
    fit(tmp_path / "whole", whole, [SafeCheckpoint(every_n_train_steps=1000)], **options)
    early = EarlyStopping("val/loss", patience=1, mode="max", min_delta=10.0)
    stopped = fit(tmp_path / "parts", toy_task(), [early, SafeCheckpoint(every_n_train_steps=1000)], **options)
    assert stopped.global_step % 5  # not at an epoch's end
    (path,) = (tmp_path / "parts" / "checkpoints").glob("*.ckpt")
    again = fit(tmp_path / "parts", parts, [SafeCheckpoint(every_n_train_steps=1000)], ckpt_path=str(path), **options)
    assert again.global_step == 15
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_nothing_is_saved_of_a_run_that_ends_before_it_begins(tmp_path: Path) -> None:
    class Spent(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = True

    fit(tmp_path, toy_task(), [SafeCheckpoint(every_n_train_steps=2, keep=2)], max_steps=6)
    files = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    saved = SafeCheckpoint(every_n_train_steps=2, keep=2)
    fit(tmp_path, toy_task(), [saved, Spent()], max_steps=9, min_steps=0, ckpt_path=str(files[-1]))
    assert sorted((tmp_path / "checkpoints").glob("*.ckpt")) == files


def test_an_average_of_every_few_steps_goes_on_in_step(tmp_path: Path) -> None:
    def average(folder: str, *, steps: int, resume: str | None = None) -> tuple[Path, dict[str, Any]]:
        ema, saved = EMA(decay=0.5, update_every=4), SafeCheckpoint(every_n_train_steps=1, keep=1)
        fit(tmp_path / folder, toy_task(), [ema, saved], max_steps=steps, ckpt_path=resume)
        return max((tmp_path / folder / "checkpoints").glob("*.ckpt")), ema.state_dict()["average"]

    _, whole = average("whole", steps=12)
    path, _ = average("parts", steps=6)
    _, parts = average("parts", steps=12, resume=str(path))
    assert parts["optimization_step"] == whole["optimization_step"] == 3
    assert all(torch.equal(a, b) for a, b in zip(parts["shadow_params"], whole["shadow_params"], strict=True))


def test_means_over_an_evaluation_count_samples(tmp_path: Path) -> None:
    class Sizes(ToyTask):
        def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            number = torch.tensor(float(batch_idx))
            return self.log_losses({"a": number, "b": 2 * number}, weights={"b": 0.5}, batch_size=len(batch["key"]))

    task = Sizes(ToyPart(), partial(torch.optim.AdamW, lr=1e-3))
    data = ImageDataModule(ToySource(), validation=ToySource("validation", 5), batch_size=2)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (found,) = trainer.validate(task, data, verbose=False)
    assert found == pytest.approx({"val/a": 4 / 5, "val/b": 8 / 5, "val/loss": 8 / 5})  # of batches of 2, 2 and 1


@pytest.mark.slow  # wandb starts a service of its own
def test_wandb_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="toy", save_dir=tmp_path, offline=True)
    fit(tmp_path, toy_task(), [PictureGrid(every_n_steps=3)], logger=logger, max_steps=3, log_every_n_steps=1)
    logger.experiment.finish()
    assert list(tmp_path.rglob("*.wandb")) and list(tmp_path.rglob("grid*.png"))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: EMA(decay=1.0),
        lambda: EMA(update_every=0),
        lambda: PictureGrid(every_n_steps=0),
        lambda: LineProgress(every_n_steps=0),
        lambda: SafeCheckpoint(),
        lambda: SafeCheckpoint(every_n_train_steps=1, keep=0),
        lambda: toy_task(max_bad_steps=0),
    ],
)
def test_senseless_settings_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"must|say when"):
        wrong()


class ThreeTerms(ToyTask):
    """A known gradient, another one, and one that is not wired."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        first = next(self.part.parameters())
        error = (self.part(batch["image"]) - batch["image"]).square().mean()
        terms = {"sum": first.sum(), "error": error, "unwired": error.detach()}
        return self.log_losses(terms, weights={"sum": 0.5, "error": 3.0})


def test_gradient_norms_are_told_and_change_nothing(tmp_path: Path) -> None:
    def trained(callbacks: list[Callback]) -> tuple[CSVLogger, list[torch.Tensor]]:
        torch.manual_seed(0)
        task = ThreeTerms(part=ToyPart(), optimizer=partial(torch.optim.SGD, lr=1e-2))
        logger = CSVLogger(tmp_path / str(len(callbacks)))
        fit(tmp_path, task, callbacks, max_steps=1, logger=logger, log_every_n_steps=50)
        return logger, [p.detach().clone() for p in task.parameters()]

    logger, weights = trained([GradientNorms(every_n_steps=2)])
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    told = {name.removeprefix("train/"): float(value) for name, value in rows[0].items() if value}
    assert told["step"] == 0
    _, alone = trained([])
    assert all(map(torch.equal, weights, alone))
    torch.manual_seed(0)
    task = ToyTask(part=ToyPart(), optimizer=partial(torch.optim.SGD, lr=1e-2))
    size = next(task.part.parameters()).numel()
    assert told["gradient_sum"] == pytest.approx(0.5 * size**0.5)
    assert told["gradient_unwired"] == 0.0
    steps = torch.cat(
        [((before - after) / 1e-2).flatten() for before, after in zip(task.parameters(), weights, strict=True)]
    )
    steps[:size] -= 0.5  # what is left of the step is that of the other term
    assert told["gradient_error"] == pytest.approx(steps.norm().item(), rel=1e-3)
    with pytest.raises(ValueError, match="every_n_steps"):
        GradientNorms(every_n_steps=0)


def test_gradient_norms_refuse_a_graph_that_is_gone_through_once(tmp_path: Path) -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(context: Any, *gradients: torch.Tensor) -> Any:
            raise RuntimeError("this backward function was compiled with donated buffers")

    class Compiled(ToyTask):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.log_losses({"pixel": Once.apply(self.part(batch["image"])).sum()})

    task = Compiled(part=ToyPart(), optimizer=partial(torch.optim.SGD, lr=1e-2))
    with pytest.raises(ValueError, match=r"gone through once \(this backward function was compiled"):
        fit(tmp_path, task, [GradientNorms()], max_steps=1)
