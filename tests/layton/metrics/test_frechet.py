"""Frechet distance: closed forms, torchmetrics' own answer, ranks, and the bootstrap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from layton.metrics.frechet import (
    FrechetFeatureDistance,
    GivenFeatures,
    bootstrap_spread,
    frechet_distance,
    frechet_distance_of_features,
)


def gaussian(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_gaussians_with_diagonal_covariances_have_a_closed_form():
    mean_a, mean_b = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 0.0])
    var_a, var_b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 1.0])
    # 1 + 0 + 4, and (1 - 2)^2 + 0 + (3 - 1)^2
    assert frechet_distance(mean_a, var_a.diag(), mean_b, var_b.diag()).item() == pytest.approx(10.0, abs=1e-9)


def test_rotation_of_both_changes_nothing_and_singular_covariances_are_fine():
    q = torch.linalg.qr(gaussian(3, 3, 0)).Q
    zero, var_a, var_b = torch.zeros(3), torch.tensor([1.0, 0.0, 9.0]).double(), torch.tensor([4.0, 4.0, 0.0]).double()
    turned = frechet_distance(zero, q @ var_a.diag() @ q.T, zero, q @ var_b.diag() @ q.T)
    assert turned.item() == pytest.approx(1.0 + 4.0 + 9.0, abs=1e-6)


def test_equal_sets_are_at_zero_and_a_shift_adds_its_square():
    x = gaussian(40, 8, 0)
    assert frechet_distance_of_features(x, x).item() == pytest.approx(0.0, abs=1e-9)
    shift = torch.arange(8).double()
    assert frechet_distance_of_features(x, x + shift).item() == pytest.approx(float(shift.square().sum()), abs=1e-6)


@pytest.mark.parametrize(("n", "m"), [(60, 50), (12, 60), (10, 9)], ids=["more", "mixed", "fewer images than features"])
def test_the_short_way_equals_the_moments_and_torchmetrics(n: int, m: int):
    a, b = gaussian(n, 16, 0), 1.5 * gaussian(m, 16, 1) + 0.3
    moments = frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    torch.testing.assert_close(frechet_distance_of_features(a, b), moments, rtol=1e-6, atol=1e-6)
    theirs = FrechetInceptionDistance(feature=GivenFeatures(16))
    ours = FrechetFeatureDistance(GivenFeatures(16))
    for metric in (theirs, ours):
        metric.update(a, real=True)
        metric.update(b, real=False)
    torch.testing.assert_close(ours.compute(), moments, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(theirs.compute(), ours.compute(), rtol=1e-4, atol=1e-4)


def test_two_ranks_equal_one():
    a, b = gaussian(30, 8, 0), gaussian(30, 8, 1) * 2
    whole = FrechetFeatureDistance(GivenFeatures(8))
    whole.update(a, real=True)
    whole.update(b, real=False)
    ranks = [FrechetFeatureDistance(GivenFeatures(8)) for _ in range(2)]
    for rank, x, y in zip(ranks, a.split([11, 19]), b.split([17, 13]), strict=True):
        rank.update(x, real=True)
        rank.update(y, real=False)
    ranks[0].merge_state(ranks[1])
    torch.testing.assert_close(ranks[0].compute(), whole.compute(), rtol=1e-9, atol=1e-9)


def test_repeated_rows_equal_counted_rows():
    a, b = gaussian(12, 16, 0), gaussian(12, 16, 1)
    rows = torch.tensor([0, 0, 1, 2, 3, 3, 3, 5, 7, 8, 9, 11])
    times = torch.bincount(rows, minlength=12)
    counted = frechet_distance_of_features(a, b, times_a=times, times_b=times)
    torch.testing.assert_close(counted, frechet_distance_of_features(a[rows], b[rows]), rtol=1e-9, atol=1e-9)


def test_bootstrap_is_repeatable_and_narrows_with_more_images():
    a = gaussian(800, 4, 0)
    b = a + 0.3 * gaussian(800, 4, 1) + 0.5
    few, many = (bootstrap_spread(a[:n], b[:n], num_resamples=30) for n in (25, 800))
    assert few == bootstrap_spread(a[:25], b[:25], num_resamples=30)
    assert few != bootstrap_spread(a[:25], b[:25], num_resamples=30, seed=1)
    assert many.standard_deviation < 0.5 * few.standard_deviation
    assert few.low < few.high


def test_too_few_vectors_are_an_error():
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance_of_features(gaussian(1, 4, 0), gaussian(5, 4, 0))
    with pytest.raises(ValueError, match="same size"):
        bootstrap_spread(gaussian(4, 4, 0), gaussian(5, 4, 0))
    with pytest.raises(ValueError, match="num_resamples"):
        bootstrap_spread(gaussian(4, 4, 0), gaussian(4, 4, 0), num_resamples=1)
    metric = FrechetFeatureDistance(GivenFeatures(4))
    metric.update(gaussian(4, 4, 0), real=True)
    metric.update(gaussian(1, 4, 0), real=False)
    with pytest.raises(ValueError, match="4 real and 1 fake"):
        metric.compute()
