"""What two processes do with one model; in a module of its own, which a spawned process can import."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import small_pipelines
import torch
from laytongen_parts import SIZE, tiny_text_encoder, tiny_tokenizer, tiny_transformer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard, distribute_tensor

from distill.adapters import LoraSettings
from distill.method import DistillationMethod
from distill.methods.adversarial import Adversarial
from distill.methods.distribution_matching import DistributionMatching
from distill.methods.extra_terms import ExtraTerm
from distill.methods.lcm import LCM
from distill.methods.mlcm import MLCM, Refinement
from distill.methods.scott import SCott
from generation.model.blocks import Block
from generation.tasks.laytongen import LaytonGenTask
from layton.callbacks import EMA, ExportWeights, GracefulStop, PictureGrid, SafeCheckpoint
from layton.callbacks.stop import InterruptedRun
from layton.data.module import ImageDataModule
from layton.data.sources import SampleSource, ScenesSource
from layton.optim import MuonAdamW
from layton.sharding import FullySharded, shard
from layton.tasks.distill import DistillTask
from layton.tasks.seeding import seed_libraries

STEPS, STOP = 4, 2
METHODS: dict[str, tuple[str, Callable[[], DistillationMethod], bool]] = {
    "scott": ("sd", lambda: SCott(num_sub_steps=2), True),
    "mlcm": ("flux", lambda: MLCM(states="denoised", guidance_scale=1.0), True),  # ranks take other numbers of steps
    "refined": ("sd", lambda: MLCM(states="noised", refinement=Refinement(start=1), extras=_extras()), True),
    "lcm": ("sd", lambda: LCM(target_decay=0.9), False),
}


def _extras() -> list[ExtraTerm]:
    return [DistributionMatching(weight=0.5, fake_updates=2), Adversarial(weight=0.1)]


class Latents(SampleSource):
    """Noise with captions."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __len__(self) -> int:
        return 16

    def sample(self, index: int, *, seed: int) -> Mapping[str, Any]:
        """By index."""
        latent = torch.randn(self.shape, generator=torch.Generator().manual_seed(index))
        return {"latent": latent, "caption": f"{index} red stars", "key": f"toy/{index}"}


def _trainer(folder: Path, strategy: Strategy | str, callbacks: list[Callback], **options: Any) -> Trainer:
    return Trainer(
        **({"devices": 2} | options),
        accelerator="cpu",
        strategy=strategy,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )


def distil(folder: Path, name: str, strategy: Strategy) -> None:
    """A few steps of a method, by plain gradient descent, which makes no steps of rounding errors."""
    kind, method, adapted = METHODS[name]
    seed_libraries(0)
    task = DistillTask(
        str(folder.parent / kind),
        method(),
        optimizer=functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        adapter=LoraSettings(rank=2, targets=("to_q", "to_v", "proj_in")) if adapted else None,
        preview_steps=(2,),
        reference_steps=2,
        frozen_dtype="float32" if adapted else "bfloat16",
    )
    data = Latents(task.latent_shape)
    trainer = _trainer(
        folder, strategy, [EMA(decay=0.9), SafeCheckpoint(every_n_train_steps=3), ExportWeights()], max_steps=3
    )
    trainer.fit(task, ImageDataModule(data, validation=data, batch_size=2, num_workers=0))


class Terminate(Callback):
    """A signal to one rank, amid validation."""

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Once training has begun."""
        if trainer.is_global_zero and trainer.global_step == STOP:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(
    folder: Path,
    strategy: Strategy | str,
    *callbacks: Callback,
    devices: int = 2,
    resume: Path | None = None,
    **task: Any,
) -> LaytonGenTask:
    """A short training run with all that goes with one: averages, clipping, validation, pictures, an export."""
    seed_libraries(0)
    tokenizer = folder.parent / "tokenizer"
    made = LaytonGenTask(
        tiny_transformer(),
        tiny_text_encoder(trainable=True),
        # biases of keys have no gradient but rounding, of which a smaller eps would make whole steps
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3, eps=1e-4),
        tokenizer=str(tokenizer),
        **task,
    )
    data = ImageDataModule(
        ScenesSource(split="train", length=64, size=SIZE),
        validation=ScenesSource(split="validation", length=5, size=SIZE),  # a rank has a batch more
        batch_size=2,
        num_workers=0,
    )
    kept = [
        *callbacks,
        EMA(decay=0.9),
        PictureGrid(every_n_steps=STOP, max_images=2),
        SafeCheckpoint(every_n_train_steps=STOP),
        SafeCheckpoint(monitor="val/loss", mode="min"),
        ExportWeights(),
    ]
    trainer = _trainer(
        folder,
        strategy,
        kept,
        devices=devices,
        max_steps=STEPS,
        val_check_interval=STOP,
        check_val_every_n_epoch=None,
        gradient_clip_val=0.5,
    )
    trainer.fit(made, data, ckpt_path=None if resume is None else str(resume))
    return made


def _join(rank: int, port: str) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)


def distil_on_rank(rank: int, port: str, folder: str, name: str) -> None:
    """Distil with whole and with parted parameters."""
    _join(rank, port)
    distil(Path(folder) / f"{name}_whole", name, DDPStrategy(find_unused_parameters=True))
    distil(Path(folder) / f"{name}_parted", name, FullySharded())


def check_rank(rank: int, port: str, folder: str) -> None:
    """Train with whole and with parted parameters, go on with a saved run, and refuse what cannot be parted."""
    _join(rank, port)
    place = Path(folder)
    fit(place / "whole", DDPStrategy(find_unused_parameters=True))
    task = fit(place / "parted", FullySharded())
    assert isinstance(task, FSDPModule)
    assert sum(isinstance(block, FSDPModule) for block in task.transformer.blocks) == 2
    parameters = list(task.parameters())
    own = sum(p.to_local().numel() for p in parameters)
    assert 0.4 < own / sum(p.numel() for p in parameters) < 0.6
    fit(place / "again", FullySharded(), resume=place / "parted" / "checkpoints" / f"step={STOP:08d}.ckpt")
    fit(place / "from_whole", FullySharded(), resume=place / "whole" / "checkpoints" / f"step={STOP:08d}.ckpt")
    _check_muon(task)
    trainer = task.trainer
    (figures,) = trainer.validate(task, trainer.datamodule, verbose=False)  # of a task that is parted already
    assert figures["val/loss"] > 0
    try:
        fit(place / "stopped", FullySharded(), Terminate(), GracefulStop())
    except InterruptedRun as stop:
        assert stop.code == 128 + signal.SIGTERM
    else:
        raise AssertionError("the run went on")
    _check_refusals(task)
    try:
        fit(place / "refused", FullySharded(), contrast=0.5, code_dropout=0.0)
    except ValueError as error:
        assert "contrast" in str(error)
    else:
        raise AssertionError("contrast was not refused")
    if rank == 0:
        torch.save({"own": own}, place / "checked.pt")


def _check_muon(task: Any) -> None:
    """A step on parted matrices, convolutions and biases is the step on whole ones, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    mesh = next(task.parameters()).device_mesh
    shapes = [(64, 96), (65, 64, 3, 3), (64, 96), (7,), (3, 5)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    plain = [nn.Parameter(value.clone()) for value in values]
    parted = [nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])) for value in values]
    optimizers = MuonAdamW(plain), MuonAdamW(parted)
    for _ in range(2):
        for one, other in zip(plain, parted, strict=True):
            gradient = torch.randn(one.shape, generator=generator)
            one.grad, other.grad = gradient, distribute_tensor(gradient, mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(plain, parted, strict=True):
        assert other.full_tensor().equal(one)


def _check_refusals(task: Any) -> None:
    """Blocks that share a weight."""
    seed_libraries(0)
    tied = Block(32, 2, 64), Block(32, 2, 64)
    tied[1].ffn_norm = tied[0].ffn_norm
    module = LightningModule()
    module.blocks = nn.ModuleList(tied)
    try:
        shard(module, next(task.parameters()).device_mesh)
    except ValueError as error:
        assert "two blocks share" in str(error)
    else:
        raise AssertionError("shared weights were not refused")


def save_tokenizer(folder: Path) -> None:
    """The tokenizer of the runs."""
    tiny_tokenizer().save_pretrained(folder)


def save_teacher(folder: Path, name: str) -> None:
    """The pipeline that a method distils."""
    kind = METHODS[name][0]
    small_pipelines.build(kind).save_pretrained(folder / kind)
