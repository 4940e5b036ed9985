from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # sceneval_degrade.py and sceneval_changes.py, next to the tests that use them
