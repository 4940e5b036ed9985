"""What each of two processes checks of their sharing; in a module of its own, which a spawned process can import."""

from __future__ import annotations

import os

import torch

from layton.quantizers import LFQQuantizer
from layton.ranks import (
    all_gather_items,
    all_gather_shares,
    all_reduce_counts,
    joined_ranks,
    mean_over_ranks,
    own_rank,
    own_share,
    said_by_first,
)

ITEMS = list("abcde")


def check_rank(rank: int, port: str) -> None:
    """Join as torchrun would have it, share, gather, and leave."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with joined_ranks() as first:
        assert first == (rank == 0)
        assert own_share(ITEMS) == ITEMS[rank::2]
        assert all_gather_items(own_share(ITEMS)) == ITEMS
        rows = torch.arange(10.0).reshape(5, 2)
        assert all_gather_shares(rows[rank::2]).equal(rows)
        assert said_by_first([rank]) == [0]
        _check_mean(rank)
        _check_diversity(rank)
        assert all_reduce_counts({"both": rank + 1.5, str(rank): 1.0}) == {"0": 1.0, "1": 1.0, "both": 4.0}
    assert own_rank() == 0


def _check_mean(rank: int) -> None:
    mine = torch.tensor([1.0, 2.0 + rank], requires_grad=True)
    mean = mean_over_ranks(mine)
    mean.square().sum().backward()  # of the two ranks' losses together, as gradients are averaged afterwards
    torch.testing.assert_close(mean.detach(), torch.tensor([1.0, 2.5]))
    torch.testing.assert_close(mine.grad, torch.tensor([2.0, 5.0]))


def _check_diversity(rank: int) -> None:
    """Ranks with equal features learn what one alone would; with others, of all features together."""
    features = torch.randn(1, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    quantizer = LFQQuantizer(vocab_size=16, entropy_share=1.0).train()
    equal, half = features.clone().requires_grad_(), features[..., 4 * rank : 4 * rank + 4]
    quantizer._diversity(equal.flatten(2).mT).backward()
    single = features.clone().requires_grad_()
    used = (200.0 * single.flatten(2).mT[0] @ quantizer.vq.codebook.t()).softmax(1).mean(0)
    (-(used * used.clamp(min=1e-5).log()).sum()).backward()
    torch.testing.assert_close(equal.grad, single.grad)
    whole = -(used * used.clamp(min=1e-5).log()).sum()
    torch.testing.assert_close(quantizer._diversity(half.flatten(2).mT), whole)
