"""Parameters shared out among ranks (FSDP2) change where they lie, and nothing else."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sharding_tools import METHODS, STEPS, STOP, check_rank, distil_on_rank, fit, save_teacher, save_tokenizer
from torch import Tensor


def tensors(value: Any, path: str = "") -> dict[str, Tensor]:
    """All tensors of a nested checkpoint, by path, but for what the saving callback knows of files."""
    if isinstance(value, Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    items = [(key, item) for key, item in items if not str(key).startswith("SafeCheckpoint")]
    return {name: tensor for key, item in items for name, tensor in tensors(item, f"{path}/{key}").items()}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    save_tokenizer(folder / "tokenizer")
    torch.multiprocessing.spawn(check_rank, args=(free_port(), str(folder)), nprocs=2)
    assert (folder / "checked.pt").is_file()
    return folder


def checkpoint(run: Path, step: int = STEPS) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(run / "checkpoints" / f"step={step:08d}.ckpt", weights_only=True)
    return loaded


def test_a_sharded_run_is_the_run_of_whole_copies(runs: Path) -> None:
    for step in (STOP, STEPS):
        whole, parted = checkpoint(runs / "whole", step), checkpoint(runs / "parted", step)
        one, other = tensors(whole), tensors(parted)
        assert list(one) == list(other)
        assert len(one) > 100
        assert {"state_dict", "optimizer_states", "callbacks"} <= {name.split("/")[1] for name in one}
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
        assert whole["task_class"] == parted["task_class"]
    best = [next((runs / run / "checkpoints").glob("best-*.ckpt")).name for run in ("whole", "parted")]
    assert best[0] == best[1]


def test_a_sharded_run_goes_on_bit_for_bit(runs: Path) -> None:
    one, other = tensors(checkpoint(runs / "parted")), tensors(checkpoint(runs / "again"))
    assert list(one) == list(other)
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def test_what_a_signal_saves_amid_validation_is_what_was_in_training(runs: Path) -> None:
    one, other = (tensors(checkpoint(runs / run, STOP)["state_dict"]) for run in ("parted", "stopped"))
    assert all(tensor.equal(other[name]) for name, tensor in one.items())
    average = checkpoint(runs / "stopped", STOP)["callbacks"]["EMA"]
    pairs = zip(average["names"], average["average"]["shadow_params"], strict=True)
    assert any(not tensor.equal(other[f"/{name}"]) for name, tensor in pairs)
    assert not (runs / "stopped" / "export").exists()


def test_a_run_of_whole_copies_goes_on_sharded(runs: Path) -> None:
    one, other = tensors(checkpoint(runs / "whole")), tensors(checkpoint(runs / "from_whole"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:the run goes on amid an epoch")
@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_a_sharded_run_goes_on_on_one_device(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").symlink_to(runs / "tokenizer")
    start = runs / "parted" / "checkpoints" / f"step={STOP:08d}.ckpt"
    task = fit(tmp_path / "alone", "auto", devices=1, resume=start)
    assert task.trainer.global_step == STEPS
    moved = tensors(checkpoint(tmp_path / "alone")["state_dict"])
    before = tensors(checkpoint(runs / "parted", STOP)["state_dict"])
    largest = max(float((moved[name] - tensor).abs().max()) for name, tensor in before.items())
    assert 0 < largest < 2.5e-3  # of two steps at 1e-3


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "refined" else [pytest.mark.slow]) for name in METHODS]
)
def test_a_model_is_distilled_as_with_whole_copies(tmp_path: Path, name: str) -> None:
    save_teacher(tmp_path, name)
    torch.multiprocessing.spawn(distil_on_rank, args=(free_port(), str(tmp_path), name), nprocs=2)
    whole, parted = (checkpoint(tmp_path / f"{name}_{kind}", 3) for kind in ("whole", "parted"))
    one, other = tensors(whole), tensors(parted)
    assert list(one) == list(other)
    assert len(whole["optimizer_states"]) == (2 if name in ("scott", "refined") else 1)
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-3, atol=1e-5, msg=key)
    momenta = whole["optimizer_states"][0]["state"].values()
    assert all(float(state["momentum_buffer"].abs().max()) > 0 for state in momenta)
    exports = [
        load_file(next((tmp_path / f"{name}_{kind}" / "export").rglob("*.safetensors"))) for kind in ("whole", "parted")
    ]
    assert list(exports[0]) == list(exports[1])


def test_the_export_of_a_sharded_run_is_the_average(runs: Path) -> None:
    exported = load_file(runs / "parted" / "export" / "transformer" / "model.safetensors")
    average = checkpoint(runs / "parted")["callbacks"]["EMA"]
    found = dict(zip(average["names"], average["average"]["shadow_params"], strict=True))
    assert any(name.startswith("transformer.blocks") for name in found)
    for name, tensor in exported.items():
        if f"transformer.{name}" in found:
            assert tensor.equal(found[f"transformer.{name}"])
    for run in ("whole", "parted"):
        assert len(list((runs / run / "grids").glob("*.png"))) == 2
