"""Floors, what is said about them, and the judges on figures whose verdict is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from layton.metrics.frechet import bootstrap_ratio, frechet_distance_of_features
from layton.reproduce import layton_claim, mlcm, scott
from layton.reproduce.claim import Context, Scale, ScaleName
from layton.reproduce.evaluation import SceneScores
from layton.reproduce.report import Check, Outcome
from layton.reproduce.students import Measured

SCALE = Scale("full", budget=10.0, images=100, per_task=1, images_per_prompt=1)


def context(tmp_path: Path, scale: ScaleName = "full") -> Context:
    return Context(tmp_path, tmp_path, replace(SCALE, name=scale))


def scores(*overall: float) -> SceneScores:
    return SceneScores(overall, {"counting": overall[0]}, 6)


def measured(**values: Any) -> Measured:
    def ratio(a: tuple[str, int], b: tuple[str, int]) -> tuple[float, float]:
        return values["fd"][a] / values["fd"][b], 0.01

    return cast(
        Measured,
        SimpleNamespace(
            scenes=lambda arm, steps: values["scenes"][arm, steps],
            fd=lambda arm, steps: values["fd"][arm, steps],
            coverage=lambda arm, steps: values["coverage"][arm, steps],
            fd_ratio=ratio,
            evaluator=SimpleNamespace(scale=SCALE),
        ),
    )


def test_floors_are_closed_on_both_sides() -> None:
    for direction, below, above in (("at most", True, False), ("at least", False, True)):
        verdicts = [Check("q", "", "", value, cast(Any, direction), 1.0).met for value in (0.9, 1.0, 1.1)]
        assert verdicts == [below, True, above]


@pytest.mark.parametrize("scale", ["full", "small", "quick"])
def test_what_does_not_hold_is_said_and_written(tmp_path: Path, scale: ScaleName) -> None:
    good = Check("first", "paper's 5", "3 against 4", 0.75, "at most", 0.8, 0.02)
    bad = Check("second", "", "1", 1.0, "at least", 2.0)
    outcome = Outcome("mlcm", "title", "arXiv 1", (good, bad), arms={"mlcm": {"role": "method", "forwards": 12.0}})
    text = outcome.summary(context(tmp_path, scale))
    assert "paper's 5" in text and "3 against 4" in text and "at most 0.8: met" in text
    assert "at least 2: NOT MET" in text and "does not hold" in text and "12 forward-equivalents" in text
    assert (f"{scale}: not the figure of record" in text) == (scale != "full")
    outcome.save(tmp_path / "result.json", context(tmp_path, scale))
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["met"] is False and [check["met"] for check in saved["checks"]] == [True, False]
    assert saved["scale"]["seeds"] == [0, 1, 2] and saved["scale"]["budget"] == 10 and saved["versions"]["torch"]
    assert saved["label"].partition(":")[0] == saved["scale"]["name"] == scale


@pytest.mark.parametrize(
    ("four", "eight", "fd", "verdicts"),
    [
        ((0.64, 0.65, 0.66), (0.6, 0.61, 0.62), 11.0, [True, True, True]),
        ((0.62, 0.63, 0.64), (0.50, 0.50, 0.50), 12.0, [False, False, False]),  # 2 points above, clearly below 2 steps
        ((0.64, 0.65, 0.66), (0.58, 0.62, 0.59), 11.5, [True, True, True]),  # below 2 steps, by less than the error
    ],
)
def test_mlcm_is_judged_in_points(
    tmp_path: Path, four: Sequence[float], eight: Sequence[float], fd: float, verdicts: list[bool]
) -> None:
    found = measured(
        scenes={
            ("mlcm", 2): scores(0.6, 0.6, 0.6),
            ("mlcm", 4): scores(*four),
            ("mlcm", 8): scores(*eight),
            ("lcm", 4): scores(0.60, 0.61, 0.62),
        },
        fd={("mlcm", 4): fd, ("lcm", 4): 10.0},
    )
    checks = mlcm.judge(found, context(tmp_path))
    assert [check.met for check in checks] == verdicts
    assert checks[0].value == pytest.approx(100 * (sum(four) / 3 - 0.61))


def test_equal_coverage_is_not_higher(tmp_path: Path) -> None:
    for ours, verdict in ((0.50, False), (0.51, True)):
        found = measured(
            fd={("scott", 2): 8.0, ("lcm", 2): 10.0}, coverage={("scott", 2): ours, ("lcm", 2): 0.50}
        )  # fmt: skip
        assert [check.met for check in scott.judge(found, context(tmp_path))] == [True, verdict]


def test_layton_is_judged_in_its_most_steps() -> None:
    def report(psnr: float, epd: float, fd: float) -> dict[str, Any]:
        return {
            "model": {
                "psnr": {"mean": psnr, "standard_error": 0.1}, "epd": {"mean": epd}, "fd_effnet": {"value": fd}
            },
            "references": {"palette": {"psnr": {"mean": 20.0}, "epd": {"mean": 1.0}}},
            "gains": {"palette": {"psnr": {"mean": psnr - 20.0, "standard_error": 0.1}}},
        }  # fmt: skip

    figures: dict[str, Any] = {
        "diffusion-25": {"scenes": report(22.0, 0.7, 10.0)},
        "consistency-1": {"scenes": report(30.0, 0.1, 1.0)},
        "consistency-2": {"scenes": report(30.0, 0.1, 1.0)},
        "consistency-3": {"scenes": report(24.5, 0.59, 9.0)},
    }
    checks = layton_claim.judge(figures)
    assert [check.met for check in checks] == [True, True, True, True, True]
    figures["consistency-3"] = {
        "scenes": report(23.5, 0.65, 11.0),
        "photographs": report(21.3, 0.5, 1.0),
        "objects": {"kept": 0.89, "scenes": 500, "originals": 1.0},
    }
    checks = layton_claim.judge(figures)
    assert [check.met for check in checks] == [False, False, False, False, False, True, True, False]


def test_the_spread_of_a_ratio_is_that_of_common_resamples() -> None:
    generator = torch.Generator().manual_seed(0)
    real, noise = torch.randn(60, 3, generator=generator), torch.randn(60, 3, generator=generator)
    near, far = real + 0.3 * noise, real + 0.3 * noise + 1.0
    spread = bootstrap_ratio(real, near, far, num_resamples=10)
    ratio = float(frechet_distance_of_features(real, near) / frechet_distance_of_features(real, far))
    assert 0 < spread.standard_deviation < 0.2 and 0 < spread.low <= spread.high < 10 * ratio
    assert bootstrap_ratio(real, far, far).standard_deviation == 0.0  # what is common cancels
    with pytest.raises(ValueError, match="one size"):
        bootstrap_ratio(real, near[:5], far)
