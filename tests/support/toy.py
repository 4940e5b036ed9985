"""A tiny task and data module of the same kind as the real ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from layton.data.module import ImageDataModule
from layton.data.sources import SampleSource
from layton.tasks.base import LaytonTask, LRSchedulerCallable, OptimizerCallable


class ToyPart(nn.Module):
    def __init__(self, width: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.Dropout(dropout), nn.Conv2d(width, 3, 1))
        self.register_buffer("usage", torch.zeros(width))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.layers[0](images)
        if self.training:
            self.usage.lerp_(hidden.detach().float().mean((0, 2, 3)), 0.1)
        return self.layers[2](self.layers[1](hidden))


class ToyTask(LaytonTask):
    def __init__(
        self,
        part: ToyPart,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_bad_steps: int = 3,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler, max_bad_steps=max_bad_steps)
        self.part = part
        self.held = torch.Generator().manual_seed(5)
        self.seen: list[str] = []
        self.losses: list[float] = []

    def _loss(self, batch: Any) -> Tensor:
        images = batch["image"]
        generator = self.step_generator("noise")
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        noise = noise + torch.rand((), generator=self.held) + torch.rand(())
        return self.log_losses(
            {"pixel": (self.part(images + 0.1 * noise) - images).square().mean()}, batch_size=len(images)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.seen += batch["key"]
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        means = batch["image"].mean((1, 2, 3))
        for key, mean in zip(batch["key"], means, strict=True):
            self.log_measure("odd" if int(key.rpartition("/")[2]) % 2 else "even", mean[None])
        return self._loss(batch)

    def picture_grid(self, batch: Any) -> dict[str, Tensor]:
        return {"input": batch["image"], "output": self.part(batch["image"])}

    def export(self, folder: Path) -> None:
        from layton.folder import save_tensors

        save_tensors(folder / "part.safetensors", dict(self.part.named_parameters()))


class ToySource(SampleSource):
    """Random pictures by index; those named in `bad` hold a NaN."""

    def __init__(self, split: str = "train", length: int = 10, bad: list[int] | None = None) -> None:
        self.split, self.length, self.bad = split, length, bad or []

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, *, seed: int) -> Mapping[str, Any]:
        image = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(index)) * 2 - 1
        if index in self.bad:
            image[0, 0, 0] = float("nan")
        return {"image": image, "caption": f"seed {seed}", "key": f"{self.split}/{index}"}


class RecordKeys(Callback):
    """Appends the keys of every training batch to a file of its own for each rank."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer: Trainer, task: LightningModule, outputs: Any, batch: Any, *args: Any) -> None:
        with (self.folder / f"{trainer.world_size}-{trainer.global_rank}.txt").open("a") as file:
            file.write("".join(f"{key}\n" for key in batch["key"]))


def toy_data(*, workers: int = 0, length: int = 10, bad: list[int] | None = None) -> ImageDataModule:
    return ImageDataModule(
        ToySource("train", length, bad), validation=ToySource("validation", 4), batch_size=2, num_workers=workers
    )


RUN = """seed_everything: 3
model:
  class_path: toy.ToyTask
  init_args:
    part: {class_path: toy.ToyPart, init_args: {width: 4}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1e-2}}
    lr_scheduler: {class_path: torch.optim.lr_scheduler.ExponentialLR, init_args: {gamma: 0.9}}
data:
  class_path: layton.data.module.ImageDataModule
  init_args:
    train: {class_path: toy.ToySource}
    validation: {class_path: toy.ToySource, init_args: {split: validation, length: 4}}
    batch_size: 2
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 7
  log_every_n_steps: 1
  enable_model_summary: false
  callbacks:
    - class_path: layton.callbacks.EMA
      init_args: {decay: 0.9}
    - class_path: layton.callbacks.PictureGrid
      init_args: {every_n_steps: 3, max_images: 2}
"""


def write_run(folder: Path) -> Path:
    """A run file for the toy."""
    path = folder / "toy.yaml"
    path.write_text(RUN)
    return path


def assert_same(left: Any, right: Any, name: str = "") -> None:
    assert type(left) is type(right), name
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), name
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), name
        for key in left:
            assert_same(left[key], right[key], f"{name}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), name
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{name}.{index}")
    else:
        assert left == right, name
