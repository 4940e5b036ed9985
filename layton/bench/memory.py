"""Peak memory of a step, as the operating system sees it.

Each contender gets a process of its own, which imports everything, notes how much memory it holds, builds the networks
and the optimizer, does two steps (the second one with the optimizer's state in place) and reports its peak above the
note. That counts weights, gradients, optimizer state, everything kept for the backward pass, and the scratch memory of
kernels, which no count of tensors sees. glibc's allocator is told to give freed blocks back at once, so that the peak
is what was alive, not what was left over.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from layton.bench.distillation_steps import DistillationShape

STEPS = 2
STATUS = Path("/proc/self/status")
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def peak_bytes(shape: DistillationShape, name: str) -> int:
    """Peak memory of a contender of `layton.bench.distillation` above that of a process without networks.

    Args:
        shape: What to measure.
        name: One of its ``METHODS`` or ``PEERS``.

    Raises:
        RuntimeError: The process failed.
    """
    threads = str(torch.get_num_threads())
    done = subprocess.run(  # noqa: S603  # this interpreter, this module
        [sys.executable, "-m", "layton.bench.memory", name, json.dumps(asdict(shape)), threads],
        env=os.environ | ALLOCATOR | {"OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name!r} failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.split()[-1])


def main(name: str, shape: str, threads: str) -> None:
    """Print the peak in bytes; arguments as `peak_bytes` writes them."""
    from layton.bench.distillation import runner
    from layton.bench.distillation_steps import DistillationShape

    torch.set_num_threads(int(threads))
    values = json.loads(shape)
    before = _resident("VmRSS")
    run = runner(DistillationShape(**values | {"widths": tuple(values["widths"])}), name)
    for _ in range(STEPS):
        run()
    sys.stdout.write(f"{_resident('VmHWM') - before}\n")


def _resident(field: str) -> int:
    """Memory of this process in bytes, now (``VmRSS``) or at its highest (``VmHWM``)."""
    if STATUS.exists():
        lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii").splitlines() if ":" in line)
        return 1024 * int(lines[field].split()[0])
    import resource  # elsewhere the peak only: of imports before, of the steps after

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main(*sys.argv[1:])
