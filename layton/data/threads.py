"""Work in batches and by several threads, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def in_threads(work: Callable[[S], T], items: Iterable[S], *, num_threads: int) -> Iterator[T]:
    """Results of ``work`` in the order of ``items``; at most ``2 * num_threads`` items are under way."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 2 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def batched(items: Iterable[S], size: int) -> Iterator[list[S]]:
    """Lists of ``size`` items, the last one perhaps shorter.

    Raises:
        ValueError: If ``size`` is below 1.
    """
    if size < 1:
        raise ValueError(f"the batch size must be >= 1, got {size}")
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch
