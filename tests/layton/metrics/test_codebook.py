"""Codebook statistics against numpy, over streams, windows and ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layton.metrics.codebook import CodebookStatistics, codebook_report


def numpy_statistics(codes: np.ndarray, vocab_size: int) -> dict[str, float]:
    values, counts = np.unique(codes, return_counts=True)
    p = counts / counts.sum()
    return {
        "usage": len(values) / vocab_size,
        "perplexity": float(np.exp(-(p * np.log(p)).sum())),
        "dead_codes": vocab_size - len(values),
    }


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), vocab_size=st.integers(1, 300), batches=st.integers(1, 4))
def test_a_stream_equals_numpy_on_all_codes(seed: int, vocab_size: int, batches: int):
    rng = np.random.default_rng(seed)
    stream = [rng.integers(0, rng.integers(1, vocab_size + 1), size=(3, 16)) for _ in range(batches)]
    metric = CodebookStatistics(vocab_size)
    for codes in stream:
        metric.update(torch.from_numpy(codes))
    report, expected = metric.report(), numpy_statistics(np.concatenate(stream), vocab_size)
    assert report.usage == pytest.approx(expected["usage"], rel=1e-6)
    assert report.perplexity == pytest.approx(expected["perplexity"], rel=1e-6)
    assert report.dead_codes == expected["dead_codes"]
    assert report.num_codes == 48 * batches
    assert metric.compute()["perplexity"].item() == pytest.approx(expected["perplexity"], rel=1e-6)


def test_known_answers():
    even = codebook_report(torch.full((8,), 5))
    assert (even.usage, even.dead_codes) == (1.0, 0)
    assert even.perplexity == pytest.approx(8.0)
    one = codebook_report(torch.tensor([0, 7, 0, 0]))
    assert (one.usage, one.dead_codes, one.perplexity) == (0.25, 3, 1.0)


def test_a_window_forgets_older_updates():
    rng = np.random.default_rng(0)
    stream = [rng.integers(0, 50, size=(2, 8)) for _ in range(7)]
    metric = CodebookStatistics(50, window=3)
    for i, codes in enumerate(stream):
        metric.update(torch.from_numpy(codes))
        expected = numpy_statistics(np.concatenate(stream[max(0, i - 2) : i + 1]), 50)
        assert metric.report().perplexity == pytest.approx(expected["perplexity"], rel=1e-6)
        assert metric.report().usage == pytest.approx(expected["usage"])


@pytest.mark.parametrize("window", [None, 2])
def test_two_ranks_equal_one(window: int | None):
    generator = torch.Generator().manual_seed(0)
    stream = torch.randint(64, (4, 2, 16), generator=generator)
    whole = CodebookStatistics(64, window=window)
    ranks = [CodebookStatistics(64, window=window) for _ in range(2)]
    for codes in stream:
        whole.update(codes)
        for rank, share in zip(ranks, codes.chunk(2), strict=True):
            rank.update(share)
    ranks[0].merge_state(ranks[1])
    assert ranks[0].report() == whole.report()


def test_codes_outside_the_codebook_are_named():
    metric = CodebookStatistics(16)
    with pytest.raises(ValueError, match=r"\[0, 16\).*0 to 16"):
        metric.update(torch.tensor([[0, 16]]))
    with pytest.raises(ValueError, match="-1"):
        metric.update(torch.tensor([[-1, 3]]))
    with pytest.raises(ValueError, match="float32"):
        metric.update(torch.zeros(1, 4))
    assert int(metric.counts.sum()) == 0


def test_no_codes_is_an_error_and_reset_starts_again():
    metric = CodebookStatistics(4)
    with pytest.raises(ValueError, match="no codes"):
        metric.report()
    metric.update(torch.tensor([[0, 1]]))
    metric.reset()
    metric.update(torch.tensor([[2, 2]]))
    assert metric.report().used_codes == 1


@pytest.mark.parametrize(("vocab_size", "window"), [(0, None), (4, 0)])
def test_sizes_must_be_positive(vocab_size: int, window: int | None):
    with pytest.raises(ValueError, match="must be >= 1"):
        CodebookStatistics(vocab_size, window=window)
