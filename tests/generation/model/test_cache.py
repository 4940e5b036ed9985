from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_transformers import CODES, LENGTH, TOKENS, captions, codes, left_padded, tiny_model
from torch.testing import assert_close

from generation.model.cache import CachedDecoder
from generation.model.packing import PackedLinear, packed
from generation.model.shapes import Factors
from generation.model.transformer import LaytonGenTransformer


def cached_logits(
    model: LaytonGenTransformer, given: torch.Tensor, features: torch.Tensor, mask: torch.Tensor | None, first: int = 0
) -> torch.Tensor:
    """Logits of codes ``first`` to the last, one step for each."""
    decoder = CachedDecoder(model, features, mask)
    logits = [decoder.prefill(given[:, :first])]
    logits += [decoder.step(given[:, index]) for index in range(first, TOKENS - 1)]
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("rotary", ["identity", "zero"])
@pytest.mark.parametrize("factors", [None, Factors(4, 4)])
@pytest.mark.parametrize("first", [0, 5, TOKENS - 1])
def test_cached_logits_equal_uncached_ones(rotary: str, factors: Factors | None, first: int) -> None:
    model, given = tiny_model(rotary=rotary, factors=factors), codes(2)
    features, mask = left_padded([captions(1, 2)[0], captions(1, LENGTH)[0]])
    with torch.no_grad():
        full = model(given, features, mask)
    assert_close(cached_logits(model, given, features, mask, first), full[:, first:], rtol=1e-4, atol=1e-4)


def test_class_models_are_cached_too() -> None:
    model, given, labels = tiny_model(classes=3), codes(2), torch.tensor([0, 2])
    with torch.no_grad():
        full = model(given, labels)
    assert_close(cached_logits(model, given, labels, None), full, rtol=1e-4, atol=1e-4)


def test_memory_is_taken_once_and_is_what_keys_and_values_need() -> None:
    model = tiny_model()
    decoder = CachedDecoder(model, captions(3))
    places = [each.data_ptr() for each in decoder.memory.tensors]
    decoder.prefill()
    for index in range(TOKENS - 1):
        decoder.step(codes(3)[:, index])
    assert [each.data_ptr() for each in decoder.memory.tensors] == places
    numbers = sum(each.numel() for each in decoder.memory.tensors)
    assert numbers == 2 * len(model.blocks) * 3 * model.width * (LENGTH + TOKENS - 1)
    with pytest.raises(ValueError, match="21 of 21"):
        decoder.step(codes(3)[:, -1])


def test_rows_can_be_forgotten() -> None:
    model = tiny_model()
    features, mask = left_padded([captions(1, 2)[0], captions(1, LENGTH)[0]])
    whole, part = CachedDecoder(model, features, mask), CachedDecoder(model, features, mask)
    whole.prefill()
    part.prefill()
    part.keep_rows(1)
    assert_close(part.step(codes(1)[:, 0]), whole.step(codes(1)[:, 0].repeat(2))[:1], rtol=1e-4, atol=1e-4)


def test_packed_weights_compute_the_same_and_leave_the_model_alone() -> None:
    model = tiny_model()
    twin = packed(model)
    assert not any(isinstance(layer, PackedLinear) for layer in model.modules())
    assert any(isinstance(layer, PackedLinear) for layer in twin.modules()) == torch.backends.mkldnn.is_available()
    with torch.no_grad():
        assert_close(twin(codes(2), captions(2)), model(codes(2), captions(2)), rtol=1e-4, atol=1e-4)
    assert packed(twin).blocks[0].ffn.down is twin.blocks[0].ffn.down


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several share the sums of products as small as these, by the number of rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="only packed products are the same to the last bit"
)
@pytest.mark.parametrize("factors", [None, Factors(4, 4)])
def test_a_row_decodes_to_the_same_bits_in_any_batch(factors: Factors | None, one_thread: None) -> None:
    model, given, features = tiny_model(factors=factors), codes(7), captions(7)
    together = cached_logits(model, given, features, None)
    for rows in ([0], [3], [5, 1], [2, 4, 6]):
        assert torch.equal(cached_logits(model, given[rows], features[rows], None), together[rows])


def test_misuse_is_told() -> None:
    model = tiny_model()
    features, mask = left_padded([captions(1, 2)[0], captions(1, LENGTH)[0]])
    for wrong, text in (
        (mask.flip(1), "the last must be real"),
        (torch.zeros_like(mask), "the last must be real"),
        (mask[:, 1:], "does not fit"),
        (torch.tensor([[True, False, True, True, True, True]] * 2), "padding found after"),
    ):
        with pytest.raises(ValueError, match=text):
            CachedDecoder(model, features, wrong)
    for count in (0, TOKENS + 1):
        with pytest.raises(ValueError, match=f"got {count}"):
            CachedDecoder(model, features, mask, num_codes=count)
    decoder = CachedDecoder(model, features, mask)
    with pytest.raises(ValueError, match="holds 0"):
        decoder.step(torch.zeros(2, dtype=torch.int64))
    decoder.prefill()
    with pytest.raises(ValueError, match="prefill comes first"):
        decoder.prefill()
    with pytest.raises(ValueError, match="training mode"):
        CachedDecoder(model.train(), features, mask)
    assert CODES > 0
