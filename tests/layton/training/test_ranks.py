"""A run stopped on some ranks goes on with another number of them, and of workers: no sample twice, none lost (R7)."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import ToySource, write_run

LENGTH, BATCH = 24, 2
DRIVER = "import sys; from layton.cli import main; sys.exit(main(sys.argv[1:], allow=['toy']))"


def fit(run: Path, *, ranks: int, workers: int = 0, steps: int, validation: int | None = None) -> None:
    """Go on until `steps`, in processes of their own, over gloo where there are two ranks.

    Validation follows every step, on so many samples; none without.
    """
    record = f"{{'class_path': 'toy.RecordKeys', 'init_args': {{'folder': '{run.parent}'}}}}"
    driver = run.parent / "driver.py"
    driver.write_text(DRIVER)
    command = [sys.executable, str(driver), "fit", "--config", str(run), "--run_dir", str(run.parent / "run")]
    command += ["--resume", "auto", f"--trainer.max_steps={steps}"]
    if validation is None:
        command += ["--trainer.limit_val_batches=0"]
    else:
        command += [f"--data.init_args.validation.init_args.length={validation}", "--trainer.val_check_interval=1"]
    command += [f"--trainer.callbacks+={record}", f"--data.init_args.num_workers={workers}"]
    command += [f"--data.init_args.train.init_args.length={LENGTH}"]
    if ranks > 1:
        command += [f"--trainer.devices={ranks}", "--trainer.strategy=ddp"]
    support = Path(__file__).parents[2] / "support"
    environment = {**os.environ, "PYTHONPATH": str(support), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("before", "after", "workers"),
    [
        (2, 1, (0, 0)),
        *(
            pytest.param(before, after, workers, marks=pytest.mark.slow)
            for before, after, workers in [
                (1, 2, (0, 0)),
                (2, 2, (0, 1)),
                (2, 1, (1, 2)),
                (1, 2, (2, 1)),
                (1, 1, (2, 0)),
            ]
        ),
    ],
)
def test_the_rest_of_an_epoch_is_each_sample_once(
    tmp_path: Path, before: int, after: int, workers: tuple[int, int]
) -> None:
    run = write_run(tmp_path)
    stop = 2
    fit(run, ranks=before, workers=workers[0], steps=stop)
    left = LENGTH - stop * before * BATCH
    assert left % (after * BATCH) == 0  # the epoch's end is a step's end on both sides
    last = stop + left // (after * BATCH)
    fit(run, ranks=after, workers=workers[1], steps=last)
    files = sorted(tmp_path.glob("?-?.txt"))
    assert {path.name for path in files} == {f"{n}-{rank}.txt" for n in (before, after) for rank in range(n)}
    seen = [key for path in files for key in path.read_text().split()]
    assert sorted(seen) == sorted(f"train/{index}" for index in range(LENGTH))
    saved = torch.load(tmp_path / "run" / "checkpoints" / f"step={last:08d}.ckpt", weights_only=True)
    assert saved["global_step"] == last


def test_validation_is_of_all_samples_whatever_a_rank_has_of_them(tmp_path: Path) -> None:
    """Of 5 samples in batches of 2 one rank has a batch more, and each sees one kind only: nobody waits for nobody."""
    run = write_run(tmp_path)
    fit(run, ranks=2, steps=2, validation=5)
    (table,) = (tmp_path / "run").rglob("metrics.csv")
    rows = [row for row in csv.DictReader(table.read_text().splitlines()) if row["val/even"]]
    source = ToySource("validation", 5)
    means = [float(source.sample(index, seed=0)["image"].mean()) for index in range(5)]
    assert len(rows) == 2
    for row in rows:
        assert float(row["val/even"]) == pytest.approx(sum(means[::2]) / 3, abs=1e-6)
        assert float(row["val/odd"]) == pytest.approx(sum(means[1::2]) / 2, abs=1e-6)
