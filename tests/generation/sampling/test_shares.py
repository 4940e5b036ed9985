from __future__ import annotations

import torch
from torch.testing import assert_close

from generation.sampling.shares import entropy, log_sum_exp, shares_of


def logits_of_all_sizes() -> torch.Tensor:
    """Some rows close together, some with differences of hundreds, whose exp is denormal or 0 in float32."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 500, generator=generator) * torch.tensor([0.1, 1.0, 10.0, 30.0, 60.0, 200.0])[:, None]


def test_sums_are_what_they_are_without_the_cut() -> None:
    logits = logits_of_all_sizes()
    assert bool((logits - logits.amax(1, keepdim=True) < -87).any())
    total = log_sum_exp(logits)
    assert_close(total, logits.logsumexp(1), rtol=1e-6, atol=0)
    assert_close(shares_of(logits, total), logits.softmax(1), rtol=2e-5, atol=1e-25)
    spread = torch.distributions.Categorical(logits=logits.double()).entropy()
    assert_close(entropy(logits), spread.float(), rtol=1e-4, atol=2e-5)


def test_no_share_is_a_denormal_number() -> None:
    logits = logits_of_all_sizes()
    assert float(shares_of(logits, log_sum_exp(logits)).min()) > torch.finfo(torch.float32).tiny
