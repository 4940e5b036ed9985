"""Packed layers compute what plain ones do, and no row's result depends on the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from generation.model.packing import PackedLinear, PackedRMSNorm, packable

# MKL's order takes few outputs and small layers, oneDNN's many outputs
SHAPES = ((192, 576), (2048, 64), (2048, 768), (256, 4096))


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_rows_of_a_packed_layer_do_not_influence_one_another(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    if not packable(linear):
        pytest.skip("this torch packs nothing")
    layer, x = PackedLinear(linear), torch.randn(130, 1, inputs)
    whole = layer(x)
    assert_close(whole, linear(x), rtol=1e-4, atol=1e-5)
    for count in (1, 2, 3, 5, 8, 16, 17, 64):
        assert torch.equal(layer(x[:count]), whole[:count])
        assert torch.equal(layer(x[-count:].flip(0)), whole[-count:].flip(0))


@torch.no_grad()
def test_a_packed_norm_is_the_norm() -> None:
    torch.manual_seed(0)
    norm = nn.RMSNorm(192, eps=1e-5)
    norm.weight.uniform_(0.5, 2)
    layer, x = PackedRMSNorm(norm), torch.randn(33, 2, 192)
    x[3] = 0
    x[4] *= 1e-4
    x[5] *= 1e4
    whole, before = layer(x), x.clone()
    assert_close(whole, norm(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(x, before)
    for count in (1, 2, 7):
        assert torch.equal(layer(x[:count]), whole[:count])
