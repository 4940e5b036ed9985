"""What every training task of the library has in common. A task wires models, losses and optimizer; nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.cli import ReduceLROnPlateau as MonitoredPlateau
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from distill.held import held_modules
from layton.data.sources import SampleSource
from layton.data.values import LOOSE, require_values
from layton.folder import class_name, weights_hashes
from layton.losses.published import PublishedPerceptualLoss
from layton.ranks import all_gather_items
from layton.sharding import FullySharded, WholeWeights, is_sharded, own_class
from layton.tasks.guard import StepGuard
from layton.tasks.seeding import Randomness

__all__ = ["LRSchedulerCallable", "LaytonTask", "OptimizerCallable"]

_TASK, _MEASURES, _FROZEN = "task_class", "perceptual_measures", "frozen_weights"  # keys of checkpoints


class LaytonTask(LightningModule, ABC):
    """Base of the training tasks: optimizer from the run file, named loss terms, exact resume, bad steps skipped.

    A subclass takes its finished parts and the two callables, calls ``super().__init__`` **first**, and writes
    `training_step`, `validation_step` and, where it applies, `picture_grid`, `export` and `trainable_parameters`.
    Random numbers come from `step_generator`. Batches are `layton.data.types.ImageSample` mappings with tensors
    image (B, 3, H, W) in [-1, 1] and lists caption and key.

    Args:
        optimizer: makes an optimizer from the trainable parameters, for example AdamW in the run file.
        lr_scheduler: makes a learning-rate scheduler from the optimizer; it is stepped after every optimizer step.
        max_bad_steps: the run stops after this many steps in a row with a NaN or infinite loss or gradient.

    Raises:
        ValueError: max_bad_steps below 1.
    """

    gathering_methods: tuple[str, ...] = ("training_step",)
    """Methods that compute a loss, each to be followed by its backward pass; see `layton.sharding.shard`."""

    def __init__(
        self,
        *,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_bad_steps: int = 10,
    ) -> None:
        super().__init__()
        self._make_optimizer = optimizer
        self._make_lr_scheduler = lr_scheduler
        self._guard = StepGuard(max_bad_steps)
        self._randomness = Randomness()
        self.on_losses: Callable[[LaytonTask, dict[str, Tensor]], None] | None = None  # see `GradientNorms`
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._looked_at_captions = False
        self._whole_weights = WholeWeights()
        self._hashes_of_frozen: list[str] | None = None
        self._images_seen = False
        self._cycles: list[tuple[OneCycleLR, dict[str, Any]]] = []
        if _given_hyperparameters.get() is not None:
            # Built by the command line: the parsed run file (plain data) goes into the checkpoint and
            # load_from_checkpoint rebuilds all parts. Built by hand: parts are modules, which must not be pickled.
            self.save_hyperparameters(logger=False)

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Loss of one batch, () float32; None only with manual optimization."""

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that the optimizer gets: all that require a gradient. Override to leave some out."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def averaged_parameters(self) -> list[nn.Parameter]:
        """Parameters that the EMA follows: the trainable ones. Override to leave a discriminator out."""
        return self.trainable_parameters()

    def frozen_parts(self) -> Sequence[nn.Module]:
        """Modules whose frozen parameters come from folders that the run file names: checkpoints do without these."""
        return ()

    def picture_grid(self, batch: Any) -> dict[str, Tensor] | None:
        """Pictures that show progress, for the `PictureGrid` callback; called with the averaged weights, no gradients.

        Args:
            batch: the first validation batch.

        Returns:
            Rows of a grid by name, each (B, 3, H, W) in [-1, 1]; None when the task has nothing to show.
        """
        return None

    def export(self, folder: Path) -> None:
        """Write the trained parts to an empty folder by their ``save_pretrained``; called with the averaged weights.

        Args:
            folder: an existing empty folder.
        """

    def sources(self) -> list[SampleSource]:
        """What the data in use were configured with, of all splits; nothing outside a run."""
        data = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
        names = ("train", "validation", "test")
        return [source for name in names for source in getattr(data, name, None) or []]

    def step_generator(self, stream: str = "", *, device: torch.device | str | None = None) -> torch.Generator:
        """Generator seeded by (run seed, stage, step, batch, rank, stream): the same numbers after a resume.

        Two calls with one stream in one step give the same numbers; name the streams when you need two.

        Args:
            stream: purpose of the numbers, for example ``"noise"``.
            device: where the numbers are drawn; the task's device when None.

        Returns:
            A fresh generator.
        """
        generator = torch.Generator(device=device if device is not None else self.device)
        return generator.manual_seed(self._randomness.derived("step_generator", stream))

    @property
    def stage(self) -> str:
        """``train``, ``val`` or ``test``: the prefix of logged names."""
        if self._trainer is None or self.trainer.training:
            return "train"
        return "test" if self.trainer.testing else "val"

    @property
    def skipped_steps(self) -> int:
        """Steps skipped so far because loss or gradients were not finite."""
        return self._guard.skipped

    def reject_step(self, reason: str) -> None:
        """Have the current optimizer step skipped, as if its loss were not finite; see `StepGuard`."""
        self._guard.reject(reason)

    def log_losses(
        self,
        terms: Mapping[str, Tensor],
        *,
        weights: Mapping[str, float] | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Log every term as ``<stage>/<name>`` and their weighted sum as ``<stage>/loss``.

        Args:
            terms: named loss terms, each () float.
            weights: factor of each term in the sum, 1 where absent; a factor of 0 logs only.
            batch_size: B, for the mean over a validation epoch; without it all batches count alike.

        Returns:
            The weighted sum, () float.

        Raises:
            ValueError: no terms, or a weight for a term that is not there.
        """
        weights = weights or {}
        if not terms or not weights.keys() <= terms.keys():
            raise ValueError(f"weights {sorted(weights)} must name loss terms {sorted(terms)}, which must not be empty")
        parts = {name: term * weights.get(name, 1.0) for name, term in terms.items() if weights.get(name, 1.0) != 0.0}
        total = torch.stack([p.float() for p in parts.values()]).sum() if parts else torch.zeros((), device=self.device)
        if self.on_losses is not None and self.stage == "train":
            self.on_losses(self, parts)
        if self._trainer is not None and self.stage == "train":
            self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()}, batch_size=batch_size)
            self.log("train/loss", total.detach(), prog_bar=True, batch_size=batch_size)
        elif self._trainer is not None:
            for name, term in {**terms, "loss": total}.items():
                self._add_up(name, term.detach().float() * (batch_size or 1), batch_size or 1)
        return total

    def log_measure(self, name: str, values: Tensor, *, prog_bar: bool = False) -> None:
        """Log the mean of a measure over samples as ``<stage>/<name>``; without a trainer, nothing.

        Over an evaluation it is the mean of all samples of all ranks, also where some ranks see none of a kind.

        Args:
            name: of the measure.
            values: (n,), one for each sample.
            prog_bar: show it while training.
        """
        if self._trainer is None or not len(values):
            return
        values = values.detach().float()
        if self.stage == "train":
            self.log(f"train/{name}", values.mean(), prog_bar=prog_bar)
            return
        self._add_up(name, values.sum(), len(values))

    def _add_up(self, name: str, values: Tensor, count: int) -> None:
        """Over an evaluation; Lightning's own means over ranks are wrong where these see different numbers."""
        total, before = self._sums.get(name, (0.0, 0))
        self._sums[name] = (values + total, count + before)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        """As validation, on what the data keep for tests (``layton test``)."""
        return self.validation_step(batch, batch_idx)

    def on_test_start(self) -> None:
        """As before validation."""
        self.on_validation_start()

    def on_validation_epoch_end(self) -> None:
        """Log what `log_losses` and `log_measure` were given."""
        super().on_validation_epoch_end()
        own = {name: (float(total), count) for name, (total, count) in self._sums.items()}
        self._sums = {}
        ranks = all_gather_items([own])
        for name in sorted({name for found in ranks for name in found}):
            totals, counts = zip(*(found[name] for found in ranks if name in found), strict=True)
            self.log(f"{self.stage}/{name}", sum(totals) / sum(counts), prog_bar=name == "loss")

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`."""
        super().on_test_epoch_end()
        self.on_validation_epoch_end()

    def measures(self) -> list[str]:
        """The perceptual measures in the losses that depend on what lies on disk (`PublishedPerceptualLoss`)."""
        parts = (*self.modules(), *held_modules(self))
        return sorted({part.measure for part in parts if isinstance(part, PublishedPerceptualLoss)})

    def look_at_captions(self, captions: Sequence[str], unread: Callable[[str], Sequence[str]] | None = None) -> None:
        """Warn if a run's first batch says nothing, or nothing that is understood: a model would learn without it.

        Args:
            captions: Of a batch.
            unread: Words of a caption that the text encoder has no tokens for.
        """
        if self._looked_at_captions:
            return
        strange = [found for caption in captions if unread is not None and (found := unread(caption))]
        if 2 * len(strange) > len(captions):
            words = ", ".join(list(dict.fromkeys(word for found in strange for word in found))[:5])
            rank_zero_warn(
                f"{len(strange)} of {len(captions)} captions of the first batch have words that are not in the text "
                f"encoder's vocabulary, such as {words}: it cannot tell what they say, take one that knows them"
            )
        if not any(captions):
            rank_zero_warn(
                "no image of the first batch has a caption: this run learns from captions, which lie in a .txt beside "
                "each image, in captions.jsonl or metadata.jsonl, or are the names of folders (classes: true)"
            )
        self._looked_at_captions = True

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Look at the first batch: images that are not in [-1, 1] would train, to nothing.

        Raises:
            ValueError: With the range that they span.
        """
        images = batch.get("image") if isinstance(batch, Mapping) else None
        if self._images_seen or not isinstance(images, Tensor) or not bool(images.isfinite().all()):
            return  # what is not finite is the guard's
        require_values(images, slack=LOOSE)
        self._images_seen = True

    def on_fit_start(self) -> None:
        """Say which perceptual measures were found, and warn of training in half precision.

        Raises:
            ValueError: The learning rate's cycle ends before the run does.
        """
        super().on_fit_start()
        self._cycles = [(cycle, _extent(cycle)) for cycle in self._one_cycles()]
        for _, extent in self._cycles:
            if self.trainer.max_steps > extent["total_steps"]:
                raise ValueError(
                    f"lr_scheduler: OneCycleLR is made for {extent['total_steps']} steps, the run has "
                    f"{self.trainer.max_steps}: set total_steps"
                )
            if 0 < self.trainer.max_steps < extent["total_steps"]:
                rank_zero_info(
                    f"the learning rate's cycle is of {extent['total_steps']} steps and the run of "
                    f"{self.trainer.max_steps}, so that it does not fall to its end; --max_steps N sets both"
                )
        low = {str(p.dtype) for p in self.trainable_parameters() if p.dtype in (torch.float16, torch.bfloat16)}
        if low:
            rank_zero_warn(
                f"weights in training are {', '.join(sorted(low))}, where small updates are lost in rounding: take "
                "--trainer.precision bf16-mixed"
            )
        if self.measures():
            rank_zero_info(f"perceptual loss: {', '.join(self.measures())}")

    def on_train_start(self) -> None:
        """A resumed run's cycle of the learning rate is as long as its run file says now; another rate is told.

        Raises:
            ValueError: Several ranks do not go on at one step, or do not see the same data: by a file system that shows
                one of them an older state, for instance.
        """
        super().on_train_start()
        at = {"step": self.trainer.global_step, "samples": [len(source) for source in self.sources()]}
        others = all_gather_items([at])
        if any(other != at for other in others):
            raise ValueError(f"ranks do not agree on where the run is and on what: {others}")
        for cycle, extent in self._cycles:
            vars(cycle).update(extent)
        for optimizer in [] if self._cycles else self.trainer.optimizers:
            asked, group = optimizer.defaults.get("lr"), optimizer.param_groups[0]
            kept = group.get("initial_lr", asked if self.trainer.lr_scheduler_configs else group["lr"])
            if asked != kept:
                rank_zero_warn(f"the run goes on at the learning rate that it was saved with, {kept}, not at {asked}")

    def _one_cycles(self) -> list[OneCycleLR]:
        configs = [] if self._trainer is None else self.trainer.lr_scheduler_configs
        return [config.scheduler for config in configs if isinstance(config.scheduler, OneCycleLR)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record whose run this is, and the perceptual measures."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_TASK], checkpoint[_MEASURES] = class_name(own_class(self)), self.measures()
        if frozen := self._frozen():
            checkpoint[_FROZEN] = self._frozen_hashes()
        for name in frozen:
            checkpoint.get("state_dict", {}).pop(name, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with a run of another task, or with another loss than the run began with.

        Raises:
            ValueError: With the tasks, or the measures, of both.
        """
        super().on_load_checkpoint(checkpoint)
        task, own = checkpoint.get(_TASK), class_name(own_class(self))
        if task not in (None, own):
            raise ValueError(
                f"the checkpoint is of another run, of {task}, this one is of {own}: take another --run_dir"
            )
        frozen = self._frozen()
        if not set(checkpoint.get(_FROZEN, self._frozen_hashes())) & set(self._frozen_hashes()):
            raise ValueError(
                "the run began with other frozen weights than the folders that its run file names hold now: what it "
                "learnt belongs to those"
            )
        checkpoint["state_dict"] = frozen | checkpoint.get("state_dict", {})
        before = checkpoint.get(_MEASURES, self.measures())
        if before != self.measures():
            raise ValueError(f"the run learnt by the perceptual measures {before}, here are {self.measures()}")

    def left_out(self) -> frozenset[str]:
        """Names in the state dict that checkpoints do without."""
        return frozenset(self._frozen())

    def _frozen(self) -> dict[str, Tensor]:
        """What checkpoints do without, by name."""
        parts = {id(p) for part in self.frozen_parts() for p in part.parameters() if not p.requires_grad}
        return {name: p.detach() for name, p in self.named_parameters(remove_duplicate=False) if id(p) in parts}

    def _frozen_hashes(self) -> list[str]:
        return self._hashes_of_frozen or list(weights_hashes(self._frozen()))

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks that no run goes without: `StepGuard` and `Randomness`, and where it is sharded `WholeWeights`.

        Raises:
            ValueError: The strategy gives each rank a part of every parameter, and the task does not learn so.
        """
        strategy = None if self._trainer is None else self.trainer.strategy
        if isinstance(strategy, FSDPStrategy | ModelParallelStrategy) and not isinstance(strategy, FullySharded):
            raise ValueError(f"{type(strategy).__name__} saves no checkpoint of this library: take fsdp (FSDP2) or ddp")
        if not isinstance(strategy, FullySharded):
            return [self._randomness, self._guard]
        if reason := self.why_not_sharded():
            raise ValueError(
                f"{reason}: take --trainer.strategy ddp, with --trainer.precision bf16-mixed and accumulated batches "
                "where memory is short"
            )
        return [self._randomness, self._guard, self._whole_weights]

    def configure_model(self) -> None:
        """Before parameters are shared out among ranks, note what the frozen ones are."""
        if self._trainer is not None and isinstance(self.trainer.strategy, FullySharded) and not is_sharded(self):
            self._hashes_of_frozen = list(weights_hashes(self._frozen()))

    def why_not_sharded(self) -> str | None:
        """Why this task's parameters cannot be shared out among ranks (`layton.sharding`); None if they can.

        They can where every rank calls the same blocks in every training step, and no backward pass begins within
        `gathering_methods`.
        """
        return f"{type(self).__name__} does not train with shared-out parameters"

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer over `trainable_parameters` and its scheduler, stepped with it.

        Raises:
            ValueError: nothing to train.
        """
        parameters = self.trainable_parameters()
        if not parameters:
            raise ValueError(f"{type(self).__name__} has no trainable parameters")
        optimizer = self._make_optimizer(parameters)
        if self._make_lr_scheduler is None:
            return optimizer
        scheduler = self._make_lr_scheduler(optimizer)
        if isinstance(scheduler, MonitoredPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def required(batch: Mapping[str, Any], *names: str) -> list[Tensor]:
    """The tensors that a task learns from.

    Raises:
        ValueError: The data have others.
    """
    if missing := [name for name in names if name not in batch]:
        source = "" if missing == ["image"] else ": take layton.ldm.cache.CachedLatents (codes need its tokenizer)"
        raise ValueError(
            f"this task learns from {', '.join(names)}, but batches hold {', '.join(sorted(batch))} only{source}"
        )
    return [batch[name] for name in names]


def _extent(cycle: OneCycleLR) -> dict[str, Any]:
    """What of a cycle's state says how long it is."""
    return {name: value for name, value in vars(cycle).items() if name in ("total_steps", "_schedule_phases")}
