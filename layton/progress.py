"""How far long work is: a bar, or lines in a log."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, Self

_SECONDS_BETWEEN_LINES = 30.0


def progress(total: int | None, text: str) -> Any:
    """A progress bar on standard error for long work; a line every half minute when that is no terminal.

    Args:
        total: number of steps, None when unknown.
        text: what is going on.

    Returns:
        A ``tqdm`` bar: a context manager with ``update(n)``.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    first = os.environ.get("RANK", "0") == "0"  # of several processes one tells
    return tqdm(total=total, desc=text) if sys.stderr.isatty() and first else _Lines(total, text, silent=not first)


class _Lines:
    """What a log is told of long work."""

    def __init__(self, total: int | None, text: str, *, silent: bool = False) -> None:
        self.total, self.text, self.n, self.silent = total, text, 0, silent
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        self.n += n
        if not self.silent and time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            whole = "" if self.total is None else f" of {self.total:,}"
            sys.stderr.write(f"layton: {self.text}: {self.n:,}{whole}\n")
