"""What other libraries say too often, said once."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LIBRARY, _PACKAGES = Path(__file__).parents[1], ("distill", "layton", "generation")


@contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """Within it a warning is shown as one line: of this library what it says, of others also where it comes from."""
    before = warnings.formatwarning
    warnings.formatwarning = _in_a_line
    try:
        yield
    finally:
        warnings.formatwarning = before


def _in_a_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    text = " ".join(str(message).split())
    ours = Path(filename).is_relative_to(_LIBRARY) and Path(filename).relative_to(_LIBRARY).parts[0] in _PACKAGES
    return f"layton: {text}\n" if ours else f"{category.__name__}: {text} ({filename}:{lineno})\n"


class Unwarned:
    """A context in which no warning is shown, for several threads at once.

    ``warnings.catch_warnings`` puts back what the filters were when it was entered: of threads that overlap, the last
    to leave may put back the silence of another, and leave the process without warnings for good.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._caught = warnings.catch_warnings()

    def __enter__(self) -> None:
        """The first to come switches warnings off."""
        with self._lock:
            if not self._inside:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        """The last to leave puts them back."""
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._caught.__exit__(None, None, None)


@contextmanager
def cut_captions_told_once() -> Iterator[None]:
    """Of what diffusers cuts of every caption in every batch, say only that it does, and once."""
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.get_logger("diffusers")  # makes the handler, if nothing else has yet
    handlers, once = list(logging.getLogger("diffusers").handlers), _CutOnce()
    for handler in handlers:
        handler.addFilter(once)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(once)


@contextmanager
def no_advertisements() -> Iterator[None]:
    """Without Lightning's advice to install its cloud logger."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(_no_advertisement)
    try:
        yield
    finally:
        log.removeFilter(_no_advertisement)


@contextmanager
def silent_lightning() -> Iterator[None]:
    """Without what Lightning says of a run, where that is but a means."""
    log = logging.getLogger("lightning.pytorch")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            yield
    finally:
        log.setLevel(before)


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in str(record.msg)


class _CutOnce(logging.Filter):
    told = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "input was truncated" not in str(record.msg):
            return True
        if self.told:
            return False
        self.told = True
        record.msg, record.args = "Some captions are longer than the text encoder reads, and are cut (told once).", ()
        return True
