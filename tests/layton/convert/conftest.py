"""The official tensors in the layout of the released tokenizer file."""

from __future__ import annotations

import json
import os
import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

FIXTURES = Path(__file__).parents[2] / "fixtures" / "parity"


@dataclass(frozen=True)
class Official:
    """Weights under the names of the released file, recorded inputs and outputs, and settings."""

    state: dict[str, Tensor]
    vq: dict[str, Tensor]
    ladd: dict[str, Tensor]
    config: dict

    def save(self, folder: Path, *, container: str | None = "model", **changes: Tensor | None) -> Path:
        """A ``.pth`` file with these weights; ``changes`` replace tensors, None removes them."""
        state = {**self.state, **changes}
        state = {name: value for name, value in state.items() if value is not None}
        path = folder / "released.pth"
        torch.save(state if container is None else {container: state}, path)
        return path


def official(folder: Path, weights: dict[str, dict[str, Tensor]]) -> Official:
    return Official(
        state=weights["vq"] | {f"decoder.{name}": value for name, value in weights["ladd"].items()},
        vq=load_file(folder / "vq_io.safetensors"),
        ladd=load_file(folder / "ladd_io.safetensors"),
        config=json.loads((folder / "ladd_config.json").read_text()),
    )


@pytest.fixture(scope="session")
def cut_down() -> Official:
    restore = runpy.run_path(str(FIXTURES / "seeded.py"))["restore"]
    return official(FIXTURES, {name: restore(name) for name in ("vq", "ladd")})


@pytest.fixture(scope="session")
def full() -> Official:
    if "LAYTON_PARITY" not in os.environ:
        pytest.skip("LAYTON_PARITY does not name the folder of the full recordings")
    folder = Path(os.environ["LAYTON_PARITY"])
    return official(folder, {name: load_file(folder / f"{name}_weights.safetensors") for name in ("vq", "ladd")})


@pytest.fixture(params=["cut_down", "full"])
def recorded(request: pytest.FixtureRequest) -> Official:
    return request.getfixturevalue(request.param)
