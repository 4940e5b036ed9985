from __future__ import annotations

import copy

import pytest
import torch
from tiny_transformers import CODES, TOKENS, captions, codes, tiny_model
from torch import nn
from torch.testing import assert_close

from generation.decoding import generate_codes
from generation.quantization import Int8Linear, quantize_int8
from generation.sampling import SamplingOptions, seeded_generators
from generation.shapes import Factors


def test_int8_products_are_close_and_every_row_has_its_own_scale() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    x = torch.randn(3, 64) * torch.tensor([[1e-4], [1.0], [1e4]])
    with torch.no_grad():
        wanted, got = linear(x) - linear.bias, Int8Linear(linear)(x) - linear.bias
    assert ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max() < 0.02
    assert_close(Int8Linear(linear)(torch.zeros(1, 64)), linear.bias.detach()[None])


def test_a_row_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    layer, x = Int8Linear(nn.Linear(64, 48, bias=False)), torch.randn(7, 64)
    assert torch.equal(layer(x)[:1], layer(x[:1]))
    assert torch.equal(layer(x.flip(0)).flip(0), layer(x))


@pytest.mark.parametrize("factors", [None, Factors(4, 4)])
def test_int8_weights_find_mostly_the_same_next_code(factors: Factors | None) -> None:
    model, given, features = tiny_model(factors=factors), codes(16), captions(16)
    small = quantize_int8(copy.deepcopy(model))
    assert sum(isinstance(layer, Int8Linear) for layer in small.modules()) == 8 + (factors is None)
    with torch.no_grad():
        exact, rough = model(given, features), small(given, features)
    assert ((exact - rough).norm() / exact.norm()) < 0.08
    assert (exact.argmax(-1) == rough.argmax(-1)).float().mean() > 0.9
    assert not torch.equal(exact, rough)


def test_int8_models_decode_the_same_in_any_batch() -> None:
    model = quantize_int8(tiny_model())
    hot = SamplingOptions(1.0)
    made = generate_codes(model, captions(3), generators=seeded_generators([0, 1, 2]), sampling=hot)
    alone = generate_codes(model, captions(3)[1:2], generators=seeded_generators([1]), sampling=hot)
    assert torch.equal(made[1:2], alone)


def test_bfloat16_models_decode() -> None:
    model = tiny_model().to(torch.bfloat16)
    made = generate_codes(model, captions(2), generators=seeded_generators([0, 1]))
    assert made.shape == (2, TOKENS)
    assert 0 <= int(made.min()) <= int(made.max()) < CODES


def test_int8_is_for_a_cpu() -> None:
    with pytest.raises(ValueError, match="meta"):
        quantize_int8(tiny_model().to("meta"))
