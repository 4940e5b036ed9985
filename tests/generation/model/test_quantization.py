from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_transformers import CODES, TOKENS, captions, codes, tiny_model
from torch import nn
from torch.testing import assert_close

from generation.model import quantization
from generation.model.quantization import Int8Linear, quantize_int8, require_place, set_weights, weights_type
from generation.model.shapes import Factors
from generation.model.transformer import LaytonGenTransformer
from generation.sampling.codes import SamplingOptions, seeded_generators
from generation.sampling.decoding import generate_codes


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
    require_place(tiny_model(), torch.device("meta"))
    with pytest.raises(ValueError, match="run on a CPU only, the model is to run on meta"):
        require_place(quantize_int8(tiny_model()), torch.device("meta"))


@pytest.mark.parametrize("factors", [None, Factors(4, 4)])
def test_logits_are_float32_whatever_the_weights_are(factors: Factors | None) -> None:
    model = tiny_model(factors=factors).bfloat16()
    hidden = torch.randn(1, model.width, dtype=torch.bfloat16)
    assert model.vocabulary.logits(hidden).dtype == torch.float32  # as compiled decoding takes them


@pytest.mark.parametrize("factors", [None, Factors(4, 4)])
def test_a_saved_int8_model_is_the_same_int8_model(factors: Factors | None, tmp_path: Path) -> None:
    model, given, features = quantize_int8(tiny_model(factors=factors)), codes(3), captions(3)
    model.save_pretrained(tmp_path)
    loaded = LaytonGenTransformer.from_pretrained(tmp_path)
    layers = [sum(isinstance(layer, Int8Linear) for layer in each.modules()) for each in (model, loaded)]
    assert layers[0] == layers[1] > 0
    with torch.no_grad():
        assert loaded(given, features).equal(model(given, features))
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["blocks.0.ffn.down.weight"].dtype == torch.int8
    assert stored["blocks.0.ffn.down.scale"].dtype == torch.float32
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_int8_models_are_not_saved_or_loaded_as_another_type(tmp_path: Path) -> None:
    model = quantize_int8(tiny_model())
    with pytest.raises(ValueError, match="saved as it is"):
        model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    model.save_pretrained(tmp_path / "int8")
    with pytest.raises(ValueError, match="computes in float32"):
        LaytonGenTransformer.from_pretrained(tmp_path / "int8", dtype=torch.bfloat16)
    path = tmp_path / "int8" / "model.safetensors"
    stored = load_file(path)
    save_file({**stored, "blocks.0.ffn.down.weight": stored["blocks.0.ffn.down.weight"].float()}, path)
    with pytest.raises(ValueError, match="expected int8"):
        LaytonGenTransformer.from_pretrained(tmp_path / "int8")
    del stored["blocks.1.attention.qkv.scale"]
    save_file(stored, path)
    with pytest.raises(ValueError, match=r"missing blocks.1.attention.qkv.scale"):
        LaytonGenTransformer.from_pretrained(tmp_path / "int8")
    with pytest.raises(ValueError, match="bfloat16"):
        quantize_int8(tiny_model().to(torch.bfloat16))


def test_weights_are_set_by_name() -> None:
    assert weights_type(set_weights(tiny_model(), "bf16")) == "bfloat16"
    assert weights_type(set_weights(tiny_model().bfloat16(), "fp32")) == "float32"
    small = set_weights(tiny_model(), "int8")
    assert weights_type(small) == "int8" and set_weights(small, "int8") is small
    with pytest.raises(ValueError, match="bf16"):
        set_weights(small, "bf16")


def test_weights_of_8_bits_are_brought_to_7_where_products_would_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48, bias=False), torch.ones(1, 64)  # the largest inputs there are
    with torch.no_grad():
        linear.weight.copy_(linear.weight.abs() + 0.5)  # all of one sign: nothing hides a clipped sum
    monkeypatch.setattr(quantization, "weight_max", lambda: 127.0)
    stored = Int8Linear(linear).state_dict()
    assert stored["weight"].max() == 127
    monkeypatch.setattr(quantization, "weight_max", lambda: 63.0)
    loaded = Int8Linear(nn.Linear(64, 48, bias=False, device="meta"))
    loaded.load_state_dict(stored)
    made = Int8Linear(linear)
    assert made.state_dict()["weight"].max() == 63 and loaded.state_dict()["weight"].max() <= 64
    for layer in (loaded, made):
        assert_close(layer(x), linear(x).detach(), rtol=0.01, atol=0.0)
