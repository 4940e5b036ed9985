from __future__ import annotations

import multiprocessing
import warnings
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from layton.data.folder import ImageFolderSource
from layton.data.module import ImageDataModule
from layton.data.sources import ScenesSource
from layton.data.transforms import Fit

warnings.filterwarnings("ignore", category=DeprecationWarning)
pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.keys, self.epochs, self.seen_in_validation = [], [], []

    def training_step(self, batch, batch_idx):
        self.keys.append(batch["key"])
        self.epochs.append(self.current_epoch)
        return self.layer(batch["image"].mean(dim=(1, 2, 3))[:, None]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.seen_in_validation += batch["key"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(workers=0):
    return ImageDataModule(
        train=[ScenesSource(length=14, size=16), ScenesSource(length=9, offset=100, size=16)],
        validation=ScenesSource(split="validation", length=5, size=16),
        weights=[2, 1],
        batch_size=4,
        num_workers=workers,
        seed=7,
    )


def trainer(folder, steps, every=None):
    callbacks = [ModelCheckpoint(folder, every_n_train_steps=every, save_top_k=-1, filename="{step}")] if every else []
    return Trainer(
        max_steps=steps, accelerator="cpu", logger=False, callbacks=callbacks, enable_checkpointing=bool(every),
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_resumes_at_the_exact_batch(tmp_path, workers):
    whole = Recorder()
    trainer(tmp_path, 12, every=1).fit(whole, data())  # 5 batches an epoch
    assert len(whole.keys) == 12 and len(set(whole.epochs)) == 3
    for stop in (3, 5, 6) if workers == 0 else (6,):
        rest = Recorder()
        trainer(tmp_path, 12).fit(rest, data(workers), ckpt_path=tmp_path / f"step={stop}.ckpt", weights_only=True)
        assert rest.keys == whole.keys[stop:], f"stopped after {stop}"
        assert all(torch.equal(a, b) for a, b in zip(rest.parameters(), whole.parameters(), strict=True))
        assert multiprocessing.active_children() == []  # no worker outlives its run


@pytest.mark.parametrize("at_train_end", [True, False])
def test_lightning_resumes_from_checkpoints_at_the_end_of_an_epoch(tmp_path, at_train_end):
    def run(model, *, epochs, callbacks=(), ckpt_path=None):
        Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, callbacks=list(callbacks),
            enable_checkpointing=bool(callbacks), enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(model, data(), ckpt_path=ckpt_path, weights_only=True)  # fmt: skip

    whole, rest = Recorder(), Recorder()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=at_train_end)
    run(whole, epochs=3, callbacks=[saver])
    run(rest, epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert rest.keys == whole.keys[5:]


def test_reloading_the_loader_each_epoch_does_not_begin_the_data_again(tmp_path):
    models = Recorder(), Recorder()
    for model, every in zip(models, (0, 1), strict=True):
        Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, reload_dataloaders_every_n_epochs=every,
        ).fit(model, data())  # fmt: skip
    assert models[0].keys == models[1].keys


class Failing(Recorder):
    def training_step(self, batch, batch_idx):
        if self.current_epoch == 3:
            raise RuntimeError("a bug")
        self.epochs.append(len(multiprocessing.active_children()))
        return super().training_step(batch, batch_idx)


def test_workers_neither_pile_up_where_loaders_are_made_anew_nor_outlive_a_failure(tmp_path):
    model = Failing()
    with pytest.raises(RuntimeError, match="a bug"):
        Trainer(
            max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, reload_dataloaders_every_n_epochs=1, default_root_dir=tmp_path,
        ).fit(model, data(1))  # fmt: skip
    assert max(model.epochs) <= 2  # one of each role
    assert multiprocessing.active_children() == []


def test_validation_sees_all_samples_in_order(tmp_path):
    model = Recorder()
    trainer(tmp_path, 1).validate(model, data(), verbose=False)
    assert model.seen_in_validation == [f"scenes/{10**9 + i}" for i in range(5)]


def test_another_seed_on_resume_is_refused(tmp_path):
    trainer(tmp_path, 2, every=2).fit(Recorder(), data())
    other = data()
    other.seed = 8
    with pytest.raises(ValueError, match="seed: saved 7, now 8"):
        trainer(tmp_path, 4).fit(Recorder(), other, ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)


def test_the_module_is_built_from_class_paths():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageDataModule, "data")
    scenes = {
        "class_path": "layton.data.sources.ScenesSource",
        "init_args": {"length": 8, "size": 24, "transform": {"class_path": "layton.data.transforms.RandomCrop",
                                                             "init_args": {"size": 16}}},
    }  # fmt: skip
    config = parser.parse_object({"data": {"train": [scenes], "validation": scenes, "batch_size": 4}})
    module = parser.instantiate_classes(config).data
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (4, 3, 16, 16) and len(batch["caption"]) == len(batch["key"]) == 4
    assert module.test_dataloader() == []


def test_stored_sources_are_built_from_class_paths(shards):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageDataModule, "data")
    photos = {
        "class_path": "layton.data.shards.ShardSource",
        "init_args": {"shards": [shards], "captions": "optional", "limits": {"max_side": 100},
                      "transform": {"class_path": "layton.data.transforms.RandomResizedCrop",
                                    "init_args": {"size": 16, "scale": [0.5, 1.0]}}},
    }  # fmt: skip
    config = parser.parse_object({"data": {"train": photos, "batch_size": 6}})
    module = parser.instantiate_classes(config).data
    assert module.train[0].limits.max_side == 100
    assert [batch["image"].shape for batch in module.train_dataloader()] == [(6, 3, 16, 16)] * 2


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="got 0"):
        ImageDataModule(batch_size=0)


def test_broken_images_are_named_once_and_remembered_over_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(7):
        Image.new("RGB", (32, 32), (30 * number, 0, 0)).save(tmp_path / f"{number}.png")
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[:40])

    def module() -> ImageDataModule:
        source = ImageFolderSource(str(tmp_path), split=None, transform=Fit(16))
        return ImageDataModule(train=[source], batch_size=2, epoch_length=14)

    first = module()
    for _ in first.train_dataloader():
        pass
    said = capsys.readouterr().err
    assert said.startswith("layton: broken image 1 passed over: ") and "3.png" in said and said.count("\n") == 1
    second = module()
    second.load_state_dict(first.state_dict())
    for _ in second.train_dataloader():
        pass
    assert capsys.readouterr().err == "" and second.bad.count == 1
