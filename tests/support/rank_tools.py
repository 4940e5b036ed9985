"""What each of two processes checks of their sharing; in a module of its own, which a spawned process can import."""

from __future__ import annotations

import os

import torch

from layton.ranks import (
    all_gather_items,
    all_gather_shares,
    all_reduce_counts,
    joined_ranks,
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
        assert all_reduce_counts({"both": rank + 1.5, str(rank): 1.0}) == {"0": 1.0, "1": 1.0, "both": 4.0}
    assert own_rank() == 0
