"""Adaptors of another rank: the closest smaller ones, by singular values, and the same ones with room to learn."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from distill.low_rank import extend_rank, reduce_rank


def adaptors(rank: int, *, true_rank: int | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    state = {
        "a.to_q.lora_A.weight": draw(rank, 12),
        "a.to_q.lora_B.weight": draw(10, rank),
        "b.conv1.lora_A.weight": draw(rank, 6, 3, 3),
        "b.conv1.lora_B.weight": draw(8, rank, 1, 1),
        "heard": draw(3),
    }
    if true_rank is not None:
        for name in ("a.to_q.lora_B.weight", "b.conv1.lora_B.weight"):
            state[name][:, true_rank:] = 0
    return state


def product(state: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    return state[f"{layer}.lora_B.weight"].flatten(1) @ state[f"{layer}.lora_A.weight"].flatten(1)


def test_what_has_a_small_rank_stays_what_it_is():
    state = adaptors(6, true_rank=2)
    reduced = reduce_rank(state, 2)
    assert reduced.keys() == state.keys() and torch.equal(reduced["heard"], state["heard"])
    assert reduced["a.to_q.lora_A.weight"].shape == (2, 12) and reduced["b.conv1.lora_B.weight"].shape == (8, 2, 1, 1)
    assert reduced["b.conv1.lora_A.weight"].shape == (2, 6, 3, 3)
    for layer in ("a.to_q", "b.conv1"):
        assert_close(product(reduced, layer), product(state, layer), atol=1e-5, rtol=1e-5)


def test_what_is_lost_is_the_smallest_singular_values():
    state = adaptors(6)
    for layer in ("a.to_q", "b.conv1"):
        values = torch.linalg.svdvals(product(state, layer))
        lost = (product(reduce_rank(state, 4), layer) - product(state, layer)).norm()
        assert_close(lost, values[4:].norm(), atol=1e-4, rtol=1e-4)


def test_a_smaller_one_is_left_alone_in_its_own_type():
    state = {name: tensor.half() for name, tensor in adaptors(4).items()}
    kept = reduce_rank(state, 4)
    assert all(torch.equal(kept[name], state[name]) for name in state)
    assert all(tensor.dtype == torch.float16 for tensor in reduce_rank(state, 2).values())


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="rank >= 1"):
        reduce_rank(adaptors(4), 0)
    with pytest.raises(ValueError, match="0 of them"):
        reduce_rank({"heard": torch.ones(3)}, 2)
    state = adaptors(4)
    del state["b.conv1.lora_B.weight"]
    with pytest.raises(ValueError, match=r"b\.conv1"):
        reduce_rank(state, 2)


def test_larger_ones_add_the_same():
    small, fresh = adaptors(2), adaptors(5, true_rank=0)
    del small["heard"], fresh["heard"]
    extended = extend_rank(small, fresh, 0.5)
    assert {name: tensor.shape for name, tensor in extended.items()} == {n: t.shape for n, t in fresh.items()}
    for layer in ("a.to_q", "b.conv1"):
        assert_close(product(extended, layer), 0.5 * product(small, layer))
        assert torch.equal(extended[f"{layer}.lora_A.weight"][2:], fresh[f"{layer}.lora_A.weight"][2:])
    with pytest.raises(ValueError, match="does not fit"):
        extend_rank(fresh, small)
    del small["a.to_q.lora_A.weight"]
    with pytest.raises(ValueError, match="1 tensors differ"):
        extend_rank(small, fresh)
