from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# What trains, distils, encodes, draws and measures; the rest of the suite has no device to choose.
PARTS = ("layton/tasks", "layton/ldm", "layton/distillation", "layton/metrics", "generation/test_pipeline.py")


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_it_works_on_a_device_that_is_not_the_cpu(part: str) -> None:
    if shutil.which("c++") is None or shutil.which("ninja") is None:
        pytest.skip("the stand-in for a GPU is compiled: it needs a C++ compiler and ninja")
    places = [str(TESTS / "support" / "standin"), os.environ.get("PYTHONPATH", "")]
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-p", "standin_device"]
    run = subprocess.run(  # noqa: S603
        [*pytest_here, TESTS / part],
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
