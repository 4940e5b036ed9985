"""Coverage: known answers, and what must not change it."""

from __future__ import annotations

import pytest
import torch

from layton.metrics.coverage import coverage


def line(*places: float) -> torch.Tensor:
    return torch.tensor(places)[:, None]


def test_known_answers_on_a_line() -> None:
    real = line(0, 1, 2, 3, 10)  # distances to the nearest other: 1, 1, 1, 1, 7
    assert coverage(real, line(0.5), nearest=1) == 2 / 5  # inside the balls of 0 and 1 alone
    assert coverage(real, line(-1), nearest=1) == 1 / 5  # on the border of the ball of 0: balls are closed
    assert coverage(real, line(-1.001), nearest=1) == 0.0
    assert coverage(real, line(17, 2.5), nearest=1) == 3 / 5  # 10, 2 and 3
    assert coverage(real, line(-1.5), nearest=2) == 1 / 5  # second neighbours: 2, 1, 1, 2, 8: the ball of 0 grew
    assert coverage(real, line(6), nearest=4) == 1.0  # fourth neighbours: 10, 9, 8, 7, 10


def test_equal_sets_are_covered_also_with_duplicates_far_from_the_origin() -> None:
    real = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) + 1e4
    assert coverage(real, real, nearest=1) == 1.0
    doubled = torch.cat([real, real])  # the nearest other of each is its double: balls of radius 0
    assert coverage(doubled, real, nearest=1) == 1.0
    assert coverage(doubled, real + 0.1, nearest=1) == 0.0


def test_a_model_that_leaves_out_a_mode_loses_just_that_share() -> None:
    generator = torch.Generator().manual_seed(1)
    modes = torch.randn(400, 4, generator=generator)
    modes[100:] += 100.0  # three quarters are elsewhere
    good = torch.randn(400, 4, generator=generator)
    assert coverage(modes, good, nearest=5) == pytest.approx(0.25, abs=0.01)
    good[100:] += 100.0
    assert coverage(modes, good, nearest=5) == pytest.approx(1 - 2**-5, abs=0.03)  # equal distributions


def test_chunks_and_common_maps_do_not_change_it() -> None:
    generator = torch.Generator().manual_seed(2)
    real, made = torch.randn(53, 5, generator=generator), 1.5 * torch.randn(31, 5, generator=generator)
    expected = coverage(real, made, nearest=3)
    assert 0.0 < expected < 1.0
    assert all(coverage(real, made, nearest=3, chunk=chunk) == expected for chunk in (1, 7, 53))
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator)).Q
    assert coverage(3 * real @ turn - 7, 3 * made @ turn - 7, nearest=3) == expected
    assert coverage(real.flip(0), made.flip(0), nearest=3) == expected


@pytest.mark.parametrize(
    ("real", "made", "nearest"),
    [(line(0, 1), line(0, 1), 2), (line(0, 1), line(0), 0), (line(0, 1), torch.zeros(0, 1), 1),
     (line(0, 1), torch.zeros(1, 2), 1), (line(0, float("nan")), line(0), 1)],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(real: torch.Tensor, made: torch.Tensor, nearest: int) -> None:
    with pytest.raises(ValueError, match=r"expected|need|finite"):
        coverage(real, made, nearest=nearest)
