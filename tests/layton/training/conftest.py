"""The toy module is named `toy` in run files; Lightning's own deprecations are not ours to fix."""

from __future__ import annotations

from pathlib import Path

import pytest

THEIRS = (
    "ignore:.*isinstance.treespec, LeafSpec.*",  # lightning 2.6 with torch >= 2.14
    "ignore:.*does not have many workers.*",
    "ignore:.*is smaller than the logging interval.*",
    "ignore:.*log_every_n_steps.*",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in Path(item.path).parents:
            for entry in reversed(THEIRS):
                item.add_marker(pytest.mark.filterwarnings(entry))
