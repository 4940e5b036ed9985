"""What configs/README.md says in Python runs as it is printed there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[3] / "configs" / "README.md"


def test_training_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"The same from Python.*?```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, torch.Tensor] = {}
    exec(code, names)  # noqa: S102  # the page's own words
    assert names["codes"].shape == (1, 16) and not names["codes"].is_floating_point()
