"""One thread that owns a model, and a bounded queue before it: what waits together is done together.

A picture does not depend on its neighbours in a batch, so that whoever asks at the same time may share one. Who asks
for many holds up nobody for long: kinds of work take turns, and half of a batch is for the others.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

Work = Callable[[list[Any], Callable[[], bool]], list[Any]]
"""``(items, unwanted) -> results``, one each; ``unwanted()`` says that nobody waits for them any more."""


class QueueFullError(RuntimeError):
    """As much waits already as may."""


class ClosedError(RuntimeError):
    """The worker is going down."""


class Unwanted(Exception):  # no error
    """Raised by work that has been told that nobody waits for it."""


@dataclass(slots=True, eq=False)
class Job:
    """One item and its result to come.

    Attributes:
        kind: Which work it is for.
        item: What that is given.
        request: Those that were submitted together have one number.
        future: The result.
        unwanted: Nobody waits for it any more.
    """

    kind: str
    item: Any
    request: int
    future: Future[Any] = field(default_factory=Future)
    unwanted: bool = False


class Worker:
    """Does the oldest job, and with it what else of its kind waits, in a thread of its own.

    Args:
        kinds: What can be done, by name.
        batch_size: Items that are done together at most.
        queue_size: Items that may wait at most.
    """

    def __init__(self, kinds: Mapping[str, Work], *, batch_size: int, queue_size: int) -> None:
        self._kinds = dict(kinds)
        self._batch_size, self._queue_size = batch_size, queue_size
        self._waiting: deque[Job] = deque()
        self._begun: list[Job] = []
        self._requests = 0
        self._last_kind = ""
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="layton-serve", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of items that wait."""
        return len(self._waiting)

    def submit(self, kind: str, items: Sequence[Any]) -> list[Job]:
        """Let all of some items wait, or none.

        Raises:
            QueueFullError: There is no room for all of them.
            ClosedError: The worker is going down.
        """
        with self._changed:
            self.require_room(len(items))
            self._requests += 1
            jobs = [Job(kind, item, self._requests) for item in items]
            self._waiting.extend(jobs)
            self._changed.notify()
        return jobs

    def require_room(self, count: int = 1) -> None:
        """Ask before work that comes before waiting.

        Raises:
            QueueFullError: There is no room for so many.
            ClosedError: The worker is going down.
        """
        if self._closed:
            raise ClosedError("the server is going down")
        if len(self._waiting) + count > self._queue_size:
            raise QueueFullError(f"{len(self._waiting)} of at most {self._queue_size} wait already: try again later")

    def abandon(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more: those that have not begun leave the queue, others stop when they can."""
        with self._changed:
            for job in jobs:
                job.unwanted = True
            self._waiting = deque(job for job in self._waiting if not job.unwanted)

    def close(self) -> None:
        """End as soon as what has begun can be stopped; who waits is told. Again, it does nothing."""
        with self._changed:
            self._closed = True
            left, self._waiting = list(self._waiting), deque()
            for job in self._begun:
                job.unwanted = True
            self._changed.notify()
        for job in left:
            job.future.set_exception(ClosedError("the server is going down"))
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            self._do(batch)

    def _next_batch(self) -> list[Job]:
        """Jobs of one kind, such as were not done last if there are any; empty when all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return []
            others = (job.kind for job in self._waiting if job.kind != self._last_kind)
            self._last_kind = next(others, self._waiting[0].kind)
            batch = self._chosen([job for job in self._waiting if job.kind == self._last_kind])
            taken = {id(job) for job in batch}
            self._waiting = deque(job for job in self._waiting if id(job) not in taken)
            for job in batch:
                job.future.set_running_or_notify_cancel()
            self._begun = batch
            return batch

    def _chosen(self, jobs: list[Job]) -> list[Job]:
        """As many as are done together: the oldest, and the first of each later request for half of the places."""
        oldest = -(-self._batch_size // 2)
        firsts = {job.request: job for job in reversed(jobs)}
        early = [job for job in jobs[oldest:] if job is firsts[job.request]]
        rest = [job for job in jobs[oldest:] if job is not firsts[job.request]]
        return [*jobs[:oldest], *early, *rest][: self._batch_size]

    def _do(self, batch: list[Job]) -> None:
        failed: BaseException | None = None
        try:
            results = self._kinds[batch[0].kind](
                [job.item for job in batch], lambda: all(job.unwanted for job in batch)
            )
        except Unwanted:
            failed = ClosedError("the server is going down")  # or nobody is there to be told
        except Exception as error:  # noqa: BLE001  # whatever it is, the next batch has nothing to do with it
            failed = error if len(batch) == 1 else None
        else:
            for job, result in zip(batch, results, strict=True):
                job.future.set_result(result)
            return
        # Outside of the except block, whose traceback would keep the tensors of the batch that failed.
        for job in batch:
            if failed is not None:
                job.future.set_exception(failed)
            else:  # what one of them has done wrong is no reason to refuse the others
                self._do([job])
