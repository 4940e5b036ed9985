"""Where runs end, and what is counted on the way."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import small_pipelines as tiny
import torch
from lightning.pytorch import Trainer

from distill.adapters import LoraSettings, adapter_state_dict
from distill.methods.hipa import HiPA
from distill.methods.lcm import LCM
from distill.methods.pairs import TeacherSolver
from distill.methods.scott import SCott
from layton.callbacks import GracefulStop, SafeCheckpoint
from layton.data.module import ImageDataModule
from layton.data.sources import SampleSource
from layton.ldm.autoencoder import Autoencoder
from layton.reproduce.budget import IMAGES, SPENT_FILE, BudgetStop, image_parts
from layton.tasks.distill import DistillTask

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
]
BATCH = 2


class Latents(SampleSource):
    def __len__(self) -> int:
        return 6

    def sample(self, index: int, *, seed: int) -> dict[str, Any]:
        latent = torch.randn(4, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(index))
        return {"latent": latent, "caption": f"{index} red stars", "key": f"toy/{index}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipe")
    tiny.build("sd").save_pretrained(path)
    return path


def fit(
    folder: Path, root: Path, method: Any, stop: BudgetStop, *more: Any, resume: str | None = None
) -> tuple[DistillTask, int]:
    torch.manual_seed(0)
    adapter = LoraSettings(rank=2, targets=("to_q", "to_v"))

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2)

    task = DistillTask(str(folder), method, optimizer=adam, adapter=adapter)
    trainer = Trainer(
        default_root_dir=root, accelerator="cpu", max_steps=-1, max_epochs=-1, logger=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[stop, *more, SafeCheckpoint(every_n_train_steps=1000)],
    )  # fmt: skip
    trainer.fit(task, ImageDataModule(Latents(), batch_size=BATCH), ckpt_path=resume, weights_only=True)
    return task, trainer.global_step


def spent(root: Path) -> dict[str, Any]:
    return json.loads((root / SPENT_FILE).read_text())


@pytest.mark.parametrize(
    ("method", "each"), [(LCM(target_decay=None), 6), (SCott(num_sub_steps=3), 19)], ids=["lcm", "scott"]
)
def test_methods_end_within_one_step_of_the_same_budget(folder: Path, tmp_path: Path, method: Any, each: int) -> None:
    _, steps = fit(folder, tmp_path, method, BudgetStop(100.0))
    found = spent(tmp_path)
    # SCott: student 3, guided teacher 6, target 1, discriminator 3 for the student and 6 for itself; its heads besides
    heads = found["accounts"].get(IMAGES, 0.0)
    assert (heads > 0) == isinstance(method, SCott)
    assert found["forwards"] - heads == pytest.approx(steps * BATCH * each)
    assert found["last_step"] == pytest.approx(found["forwards"] / steps)
    assert 100 <= found["forwards"] < 100 + found["last_step"]
    assert found["trained_parameters"] > 0 and found["budget"] == 100


def test_data_that_was_paid_for_leaves_less_for_training(folder: Path, tmp_path: Path) -> None:
    _, steps = fit(folder, tmp_path, LCM(target_decay=None), BudgetStop(100.0, prepaid=70.0))
    assert steps == 3 and spent(tmp_path)["accounts"]["data"] == 70 and spent(tmp_path)["forwards"] == 70 + 3 * 12
    with pytest.raises(ValueError, match="prepaid"):
        BudgetStop(100.0, prepaid=100.0)


class Interrupt(GracefulStop):
    def on_train_batch_end(self, trainer: Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        super().on_train_batch_end(trainer, task, outputs, batch, batch_idx)


def test_an_interrupted_run_goes_on_with_its_count(folder: Path, tmp_path: Path) -> None:
    whole, steps = fit(folder, tmp_path / "whole", LCM(target_decay=None), BudgetStop(50.0))
    assert steps == 5
    previous = signal.getsignal(signal.SIGTERM)
    try:
        fit(folder, tmp_path / "parts", LCM(target_decay=None), BudgetStop(50.0), Interrupt())
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert not (tmp_path / "parts" / SPENT_FILE).exists()  # a signal is not the end
    (checkpoint,) = (tmp_path / "parts").glob("checkpoints/*.ckpt")
    parts, steps = fit(folder, tmp_path / "parts", LCM(target_decay=None), BudgetStop(50.0), resume=str(checkpoint))
    assert steps == 5 and spent(tmp_path / "parts")["forwards"] == spent(tmp_path / "whole")["forwards"] == 60
    states = [adapter_state_dict(task.networks.teacher.denoiser, "student") for task in (whole, parts)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_losses_in_images_cost_what_they_cost(folder: Path, tmp_path: Path) -> None:
    solver = TeacherSolver("ddim", num_steps=2)
    counts = {}
    for crop in (4, 8):
        decoder = Autoencoder(tiny.autoencoder())
        method = HiPA(solver=solver, decoder=decoder, crop=crop)
        fit(folder, tmp_path / str(crop), method, BudgetStop(11.0))
        found = spent(tmp_path / str(crop))
        assert found["forwards"] == pytest.approx(sum(found["accounts"].values()))
        counts[crop] = found["accounts"][IMAGES] / found["steps"]
        assert found["accounts"]["student.network"] == found["steps"] * BATCH * (3 + 2)
    # two decodings, one of them with a backward pass; the operations grow with the area
    assert counts[8] == pytest.approx(4 * counts[4], rel=1e-6) and counts[4] > 0


def test_parts_that_losses_hold_unregistered_are_found(folder: Path) -> None:
    decoder = Autoencoder(tiny.autoencoder())
    method = HiPA(solver=TeacherSolver("ddim", num_steps=2), decoder=decoder, crop=4)
    parts = image_parts(method)
    assert {id(part) for part in parts} == {id(decoder.model.encoder), id(decoder.model.decoder)}
