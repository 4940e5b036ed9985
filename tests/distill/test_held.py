from __future__ import annotations

import torch
from torch import nn

from distill.held import Held, held_modules


class Owner(nn.Module):
    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.own = nn.Linear(2, 2)
        self.other = Held(held, frozen=True)


def test_what_is_held_is_no_part_of_its_holder() -> None:
    other = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    owner = Owner(other)
    assert set(owner.state_dict()) == {"own.weight", "own.bias"}
    assert len(list(owner.parameters())) == 2
    owner.train()
    assert not other.training and not other[1].training
    assert not any(parameter.requires_grad for parameter in other.parameters())
    owner.double()
    assert other[0].weight.dtype == torch.float32


def test_it_moves_when_it_is_needed() -> None:
    owner = Owner(nn.Linear(2, 2))
    moved = owner.other.on(torch.device("meta"))
    assert moved is owner.other.module
    assert moved.weight.is_meta and not owner.own.weight.is_meta


def test_those_who_count_find_it_wherever_it_is_held() -> None:
    inner = nn.Linear(2, 2)
    root = nn.ModuleDict({"below": Owner(inner)})
    assert list(held_modules(root)) == [inner]


def test_what_is_no_module_may_be_held_too() -> None:
    owner = Owner(nn.Linear(2, 2))
    owner.scorer = Held(len)
    assert owner.scorer.module("abc") == 3
    assert list(held_modules(owner)) == [owner.other.module]
