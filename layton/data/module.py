"""The one Lightning data module: any sources, mixed, resumable, with an account of broken images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule

from layton.data.bad import BadImages
from layton.data.loader import BatchLoader, OrderedLoader, ResumableLoader
from layton.data.mixing import MixedSource
from layton.data.sources import SampleSource


class ImageDataModule(LightningDataModule):
    """Training, validation and test batches from sources given by `class_path` in YAML.

    A batch is a dictionary: "image" (B, 3, H, W) float32 in [-1, 1], "caption" and "key" lists of B strings (with other
    sources, whatever tensors and strings their samples have). A training checkpoint holds the position in the data;
    resumed, the run sees exactly the batches it would have seen. All of it is aware of ranks, and Lightning's own
    sampler replacement does not touch it.

    Args:
        train: Sources to train on; None if only evaluating.
        validation: Sources to validate on, all samples in order.
        test: Sources to test on, all samples in order.
        weights: Shares of the training sources; proportional to their lengths by default.
        epoch_length: Training samples in an epoch; the sum of the sources' lengths by default.
        batch_size: Samples in a batch of one rank.
        eval_batch_size: The same for validation and test; `batch_size` by default.
        num_workers: Worker processes of each loader.
        seed: Decides order and augmentation.
        max_bad: How many different broken images of all sources together are tolerated before the run stops; None for
            any number. Each source has a limit of its own besides.
        pin_memory: Page-locked memory, for GPUs.
    """

    def __init__(
        self,
        train: list[SampleSource] | SampleSource | None = None,
        *,
        validation: list[SampleSource] | SampleSource | None = None,
        test: list[SampleSource] | SampleSource | None = None,
        weights: list[float] | None = None,
        epoch_length: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        max_bad: int | None = 100,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1) or num_workers < 0:
            raise ValueError(
                f"need batch sizes >= 1 and num_workers >= 0, got {batch_size}, {eval_batch_size}, {num_workers}"
            )
        self.train = _as_list(train)
        self.validation = _as_list(validation)
        self.test = _as_list(test)
        self.weights = weights
        self.epoch_length = epoch_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size if eval_batch_size is not None else batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.pin_memory = pin_memory
        self.bad = BadImages(max_bad, tell=_say_bad)
        self._loader: ResumableLoader | None = None
        self._resume_from: dict[str, Any] | None = None
        self._open: dict[str, BatchLoader] = {}

    def train_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """Loader of this rank over the mixed training sources; no loader without them."""
        if not self.train:
            return []
        mixed = MixedSource(self.train, weights=self.weights, length=self.epoch_length, seed=self.seed)
        rank, world_size = self._ranks()
        loader = ResumableLoader(
            mixed,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            rank=rank,
            world_size=world_size,
            bad=self.bad,
            pin_memory=self.pin_memory,
        )
        if self._loader is not None and self.trainer is not None and self.trainer.current_epoch > 0:
            loader.load_state_dict(self._loader.state_dict())  # reload_dataloaders_every_n_epochs
        if self._resume_from is not None:
            loader.load_state_dict(self._resume_from)
            self._resume_from = None
        self._loader = loader
        self._replace("train", loader)
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Position in the training data and the broken images so far, for the checkpoint.

        Lightning saves the loader's state too, but does not load it when the checkpoint was written at the end of an
        epoch; the run would then see its first epoch again.
        """
        position = {} if self._loader is None else {"train": self._loader.state_dict()}
        return {**position, "bad": self.bad.reasons}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint: the next training loader begins there.

        Args:
            state_dict: What `state_dict` gave.
        """
        self._resume_from = state_dict.get("train")
        self.bad.restore(state_dict.get("bad", []))

    def val_dataloader(self) -> OrderedLoader | list[OrderedLoader]:
        """Loader of this rank over the validation sources; no loader without them."""
        return self._ordered("validation", self.validation)

    def test_dataloader(self) -> OrderedLoader | list[OrderedLoader]:
        """Loader of this rank over the test sources; no loader without them."""
        return self._ordered("test", self.test)

    def _ordered(self, role: str, sources: Sequence[SampleSource]) -> OrderedLoader | list[OrderedLoader]:
        if not sources:
            return []
        rank, world_size = self._ranks()
        loader = OrderedLoader(
            MixedSource(sources, seed=self.seed, shuffle=False),
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            rank=rank,
            world_size=world_size,
            bad=self.bad,
            pin_memory=self.pin_memory,
        )
        self._replace(role, loader)
        return loader

    def _replace(self, role: str, loader: BatchLoader) -> None:
        """End the worker processes of the loader that had this role, as Lightning may ask for another each epoch."""
        if role in self._open:
            self._open[role].close()
        self._open[role] = loader

    def teardown(self, stage: str) -> None:
        """End all worker processes; called by Lightning.

        Args:
            stage: "fit", "validate" or "test".
        """
        for loader in self._open.values():
            loader.close()
        self._open.clear()

    def on_exception(self, exception: BaseException) -> None:
        """As `teardown`, of a run that failed or was interrupted; called by Lightning.

        Args:
            exception: What ended it.
        """
        self.teardown("fit")

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def _say_bad(reason: str, count: int) -> None:
    sys.stderr.write(f"layton: broken image {count} passed over: {reason}\n")


def _as_list(sources: list[SampleSource] | SampleSource | None) -> list[SampleSource]:
    if sources is None:
        return []
    return sources if isinstance(sources, list) else [sources]
