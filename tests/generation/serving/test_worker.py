from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from generation.serving.worker import ClosedError, QueueFullError, Unwanted, Worker

SECONDS = 20.0


class Bench:
    """Work that waits until it is let go, and remembers what was done together."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.batches: list[list[Any]] = []

    def hold(self, items: list[Any], unwanted: Callable[[], bool]) -> list[Any]:
        self.begun.set()
        assert self.go.wait(SECONDS)
        return items

    def double(self, items: list[int], unwanted: Callable[[], bool]) -> list[int]:
        self.batches.append(list(items))
        if any(item < 0 for item in items):
            raise ValueError("below 0")
        return [2 * item for item in items]


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def worker(bench: Bench) -> Iterator[Worker]:
    made = Worker({"hold": bench.hold, "double": bench.double}, batch_size=3, queue_size=5)
    yield made
    bench.go.set()
    made.close()


def held(worker: Worker, bench: Bench) -> None:
    """Let the thread be busy."""
    worker.submit("hold", [None])
    assert bench.begun.wait(SECONDS)


def test_what_waits_together_is_done_together(worker: Worker, bench: Bench) -> None:
    held(worker, bench)
    jobs = [job for number in range(5) for job in worker.submit("double", [number])]
    bench.go.set()
    assert [job.future.result(SECONDS) for job in jobs] == [0, 2, 4, 6, 8]
    assert bench.batches == [[0, 1, 2], [3, 4]]


def test_one_bad_item_spoils_no_other(worker: Worker, bench: Bench) -> None:
    held(worker, bench)
    jobs = worker.submit("double", [1, -1, 3])
    bench.go.set()
    assert jobs[0].future.result(SECONDS) == 2 and jobs[2].future.result(SECONDS) == 6
    with pytest.raises(ValueError, match="below 0"):
        jobs[1].future.result(SECONDS)
    assert worker.submit("double", [4])[0].future.result(SECONDS) == 8


def test_all_of_a_request_waits_or_none(worker: Worker, bench: Bench) -> None:
    held(worker, bench)
    worker.submit("double", [0, 1, 2])
    with pytest.raises(QueueFullError, match="3 of at most 5"):
        worker.submit("double", [0, 1, 2])
    assert worker.waiting == 3
    assert len(worker.submit("double", [0, 1])) == 2


def test_what_nobody_wants_leaves_the_queue(worker: Worker, bench: Bench) -> None:
    held(worker, bench)
    gone, kept = worker.submit("double", [1, 2, 3, 4]), worker.submit("double", [5])
    worker.abandon(gone)
    assert worker.waiting == 1
    bench.go.set()
    assert kept[0].future.result(SECONDS) == 10
    assert bench.batches == [[5]]


def test_work_stops_when_the_last_of_those_who_waited_has_gone() -> None:
    begun, stopped = threading.Event(), threading.Event()

    def long(items: list[Any], unwanted: Callable[[], bool]) -> list[Any]:
        begun.set()
        while not unwanted():
            pass
        stopped.set()
        raise Unwanted

    worker = Worker({"long": long}, batch_size=2, queue_size=2)
    jobs = worker.submit("long", [1, 2])
    assert begun.wait(SECONDS)
    worker.abandon(jobs[:1])
    assert not stopped.is_set()
    worker.abandon(jobs)
    assert stopped.wait(SECONDS)
    worker.close()


def test_who_still_waits_at_the_end_is_told(bench: Bench) -> None:
    worker = Worker({"hold": bench.hold, "double": bench.double}, batch_size=2, queue_size=3)
    held(worker, bench)
    (left,) = worker.submit("double", [1])
    threading.Timer(0.2, bench.go.set).start()
    worker.close()
    with pytest.raises(ClosedError, match="going down"):
        left.future.result(SECONDS)
    with pytest.raises(ClosedError):
        worker.submit("double", [1])
    worker.close()


def test_the_end_stops_what_can_be_stopped() -> None:
    begun = threading.Event()

    def long(items: list[Any], unwanted: Callable[[], bool]) -> list[Any]:
        begun.set()
        while not unwanted():
            pass
        raise Unwanted

    worker = Worker({"long": long}, batch_size=2, queue_size=2)
    (job,) = worker.submit("long", [1])
    assert begun.wait(SECONDS)
    worker.close()
    with pytest.raises(ClosedError):
        job.future.result(SECONDS)


def test_single_retries_do_not_keep_what_the_batch_had() -> None:
    class Large:
        pass

    kept: list[weakref.ref[Large]] = []
    alive: list[bool] = []

    def work(items: list[int], unwanted: Callable[[], bool]) -> list[int]:
        if len(items) == 1:
            alive.append(kept[0]() is not None)
            return items
        large = Large()
        kept.append(weakref.ref(large))
        raise MemoryError

    go = threading.Event()

    def hold(items: list[int], unwanted: Callable[[], bool]) -> list[int]:
        assert go.wait(SECONDS)
        return items

    worker = Worker({"work": work, "hold": hold}, batch_size=3, queue_size=3)
    worker.submit("hold", [0])
    while worker.waiting:
        pass
    jobs = worker.submit("work", [1, 2, 3])
    go.set()
    assert [job.future.result(SECONDS) for job in jobs] == [1, 2, 3]
    assert alive == [False] * 3
    worker.close()


def test_kinds_take_turns_and_half_a_batch_is_for_others(bench: Bench) -> None:
    worker = Worker({"hold": bench.hold, "double": bench.double, "also": bench.double}, batch_size=4, queue_size=20)
    held(worker, bench)
    jobs = worker.submit("double", [1, 2, 3, 4, 5, 6, 7]) + worker.submit("double", [10, 11])
    jobs += worker.submit("double", [20]) + worker.submit("also", [30])
    bench.go.set()
    assert [job.future.result(SECONDS) for job in jobs] == [2, 4, 6, 8, 10, 12, 14, 20, 22, 40, 60]
    assert bench.batches == [[1, 2, 10, 20], [30], [3, 4, 11, 5], [6, 7]]
    worker.close()
