"""Types that a generator's weights can have while it draws, apart from what makes them, which loads torch."""

from __future__ import annotations

from typing import Literal

Weights = Literal["fp32", "bf16", "int8"]
