"""Token shards by many processes, on one machine or a cluster, through Ray Data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from generation.data.isolation import IsolatedShardWriter
from generation.data.tokenizing import JobMaker, ShardResult, ShardWriter


@dataclass(frozen=True, slots=True)
class RayRunner:
    """Has Ray Data's actors write the shards. They are written whole or not at all, so that one may be done twice.

    Attributes:
        make_job: Makes the job in each worker; must be picklable, and what it reads must be there on every machine.
        workers: Actors; each takes one GPU where there are any, else one CPU.
        address: Of a running Ray cluster, which must see the output folder under the same path; None starts Ray here.
        isolate: Each actor has a process of its own do it, so that images that end it are found and passed over.
    """

    make_job: JobMaker
    workers: int
    address: str | None = None
    isolate: bool = False

    def __call__(self, out: Path, numbers: Sequence[int]) -> Iterator[ShardResult]:
        """Results in the order in which shards are finished.

        Raises:
            ValueError: If Ray is not installed.
        """
        try:
            import ray
        except ImportError as error:
            raise ValueError("several workers need Ray: pip install 'layton[scale]'") from error
        started = not ray.is_initialized()
        if started:
            local: dict[str, Any] = {} if self.address else {"num_cpus": self.workers, "include_dashboard": False}
            ray.init(address=self.address, log_to_driver=False, logging_level="error", **local)
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False
            shards = ray.data.from_items([{"number": n} for n in numbers], override_num_blocks=max(1, len(numbers)))
            gpus = torch.cuda.device_count() if self.address is None else ray.cluster_resources().get("GPU", 0)
            written = shards.map(
                _Worker,
                fn_constructor_args=(self.make_job, str(out.resolve()), self.isolate),
                concurrency=self.workers,
                num_cpus=0 if gpus else 1,
                num_gpus=1 if gpus else 0,
            )
            for row in written.iter_rows():
                yield ShardResult(**{**row, "skipped": tuple(row["skipped"])})
        finally:
            if started:
                ray.shutdown()


class _Worker:
    """In an actor: the job, made once, and its shards."""

    def __init__(self, make_job: JobMaker, out: str, isolate: bool) -> None:
        torch.set_num_threads(1)
        self._write: Callable[[int], ShardResult]
        if isolate:
            self._write = IsolatedShardWriter(make_job, Path(out), num_threads=1)
        else:
            self._write = ShardWriter(make_job(), Path(out))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        result = asdict(self._write(int(row["number"])))
        return {**result, "skipped": list(result["skipped"])}
