"""Token shards written by a process of its own: an image that ends it costs that image, not the run.

Decoders of images are C code, and a file may crash one, or take all memory. What was under way when the process ended
is tried image by image; the one that ends it again, alone, is passed over by name.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from generation.data.tokenizing import JobMaker, ShardResult, ShardWriter

ALONE = 2  # times an image must end the process alone to be passed over
UNEXPLAINED = 3  # ends of the process at one shard for which no image is to blame, until that is an error


@dataclass(frozen=True, slots=True)
class IsolatedRunner:
    """A `generation.data.tokenizing.ShardRunner`: one other process on this machine.

    Attributes:
        make_job: Makes the job there; must be picklable.
    """

    make_job: JobMaker

    def __call__(self, out: Path, numbers: Sequence[int]) -> Iterator[ShardResult]:
        """Results in order; see `IsolatedShardWriter`."""
        with IsolatedShardWriter(self.make_job, out) as write:
            for number in numbers:
                yield write(number)


@dataclass(frozen=True, slots=True)
class _Order:
    """What the process is to do: write a shard without some of its inputs, or try one alone (None: a blank image)."""

    number: int
    passed_over: Mapping[int, str]
    trial: bool = False
    alone: int | None = None


@dataclass(slots=True)
class _Outcome:
    """What came of an order.

    Attributes:
        result: The shard, or True for an input that does no harm.
        reason: Why there is none.
        ended: Whether the process is no more.
        begun: Inputs that were begun.
        encoded: The first input that is not done with.
    """

    result: ShardResult | bool = False
    reason: str = ""
    ended: bool = False
    begun: set[int] = field(default_factory=set)
    encoded: int = 0


class IsolatedShardWriter:
    """Writes shards as `ShardWriter` does, the same bytes, in a process that is begun anew when it ends.

    Args:
        make_job: Makes the job in the process; must be picklable.
        out: Folder of the dataset.
        num_threads: Of torch in the process; its own choice by default.
    """

    def __init__(self, make_job: JobMaker, out: Path, *, num_threads: int | None = None) -> None:
        self._arguments = (make_job, str(out.resolve()), num_threads)
        self._process: BaseProcess | None = None
        self._link: Any = None

    def __enter__(self) -> IsolatedShardWriter:
        """For ``with``."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.close()

    def __call__(self, number: int) -> ShardResult:
        """Write shard ``number``, unless it is there.

        Raises:
            ValueError: It fails, or the process ends, for another cause than single images.
        """
        passed_over: dict[int, str] = {}
        unexplained = 0
        while True:
            outcome = self._have(_Order(number, passed_over))
            if isinstance(outcome.result, ShardResult):
                return outcome.result
            found = self._culprits(number, outcome)
            passed_over |= found
            unexplained += not found
            if not found and (not outcome.ended or unexplained == UNEXPLAINED):
                times = f" {unexplained} times" * outcome.ended
                raise ValueError(f"shard {number}: {outcome.reason}{times}, and no single image is the cause")

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._link.close()  # it ends by itself, unless it is busy
            self._process.join(timeout=5.0)
            self._process.kill()
            self._process.join()
            self._process = None

    def _culprits(self, number: int, outcome: _Outcome) -> dict[int, str]:
        """Of the inputs that were under way those that do it alone, with what they do."""
        suspects = sorted(index for index in outcome.begun if index >= outcome.encoded)
        found: dict[int, str] = {}
        for index in suspects:
            reason = self._harm(number, index)
            if reason:
                found[index] = reason
        if found and (reason := self._harm(number, None)):  # then it is not they
            raise ValueError(f"shard {number}: a blank image fails, too: {reason}")
        return found

    def _harm(self, number: int, index: int | None) -> str:
        """What an input (None: a blank image) does alone, each of `ALONE` times; empty if it does no harm."""
        for _ in range(ALONE):
            outcome = self._have(_Order(number, {}, trial=True, alone=index))
            if outcome.result:
                return ""
        return outcome.reason

    def _have(self, order: _Order) -> _Outcome:
        """Give an order and listen until it is done or the process has ended."""
        process = self._running()
        outcome = _Outcome()
        try:
            self._link.send(order)
            while True:
                kind, value = self._link.recv()
                if kind == "begun":
                    outcome.begun.add(value)
                elif kind == "encoded":
                    outcome.encoded = value
                elif kind == "refused":
                    raise ValueError(f"shard {order.number}: {value}")
                elif kind == "failed":
                    outcome.reason = value
                    self.close()  # what failed may fail for everything after it, as a GPU does after some errors
                    return outcome
                else:
                    outcome.result = value
                    return outcome
        except (EOFError, OSError):
            self.close()
            outcome.ended, outcome.reason = True, f"the process that encodes it ended ({_cause(process.exitcode)})"
            return outcome

    def _running(self) -> BaseProcess:
        if self._process is None:
            context = multiprocessing.get_context("spawn")  # a forked one could not use a GPU
            self._link, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, *self._arguments), daemon=True)
            process.start()
            there.close()
            self._process = process
        return self._process


def _cause(status: int | None) -> str:
    with suppress(ValueError):
        if status is not None and status < 0:
            return signal.Signals(-status).name
    return f"status {status}"


def _serve(link: Any, make_job: JobMaker, out: str, num_threads: int | None) -> None:
    """The process: follows orders until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end gets it, too, and ends this
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    lock = threading.Lock()

    def tell(kind: str, value: object) -> None:
        with lock:
            link.send((kind, value))

    write: ShardWriter | None = None
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            order: _Order = link.recv()
            try:
                write = write or ShardWriter(make_job(), Path(out))
                tell("done", _follow(order, write, tell))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except OSError as error:  # of a disk or a network: no image's own fault
                tell("refused", f"{type(error).__name__}: {error}")
            except Exception as error:  # noqa: BLE001  # told to the other end, whatever it is
                tell("failed", f"{type(error).__name__}: {error}")


def _follow(order: _Order, write: ShardWriter, tell: Callable[[str, object], None]) -> ShardResult | bool:
    if order.trial:
        write.try_alone(order.alone)
        return True
    done = order.number * write.job.shard_size

    def advance(count: int) -> None:
        nonlocal done
        done += count
        tell("encoded", done)

    return write(
        order.number, on_progress=advance, on_begin=lambda index: tell("begun", index), passed_over=order.passed_over
    )
