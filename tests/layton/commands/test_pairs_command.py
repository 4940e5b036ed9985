"""`layton pairs`: a teacher's pairs on disk, made once and gone on with."""

from __future__ import annotations

from pathlib import Path

from command_tools import Run


def test_pairs_are_made_rebuilt_from_their_seeds_and_not_made_twice(
    run: Run, fails: Run, pipeline: Path, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "pairs"
    prompts.write_text("a red star\ntwo blue rings\n")
    options = ["--prompts", prompts, "--num-pairs", 4, "--steps", 2, "--part-size", 2, "--batch-size", 2]
    assert "4 pairs" in run("pairs", pipeline, "--out", out, *options)
    first = {path.name: path.read_bytes() for path in sorted(out.iterdir())}
    assert "4 pairs" in run("pairs", pipeline, "--out", out, *options)
    assert {path.name: path.read_bytes() for path in sorted(out.iterdir())} == first
    assert "at least 1" in run("pairs", pipeline, "--out", out, "--steps", 0, status=2)
    fails("pairs", pipeline, "--out", out, *options[:-6], "--steps", 3)  # pairs of another rule lie there
