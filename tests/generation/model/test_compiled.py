"""Compiled decoding steps: the codes are those that are found without."""

from __future__ import annotations

import pytest
import torch
from tiny_transformers import LENGTH, TOKENS, captions, codes, left_padded, tiny_model
from torch.testing import assert_close

from generation.model.cache import CachedDecoder
from generation.model.compiled import can_compile, compile_decoding
from generation.model.quantization import quantize_int8
from generation.model.shapes import Factors
from generation.sampling.codes import GREEDY
from generation.sampling.decoding import generate_codes
from generation.sampling.guidance import Guidance

needs_compiler = pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="torch.compile needs a C++ compiler")


@needs_compiler
def test_compiled_steps_are_the_steps() -> None:
    model, given = tiny_model(factors=Factors(4, 4)), codes(2)
    features, mask = left_padded([captions(1, 2)[0], captions(1, LENGTH)[0]])
    short = captions(2, 2)
    with torch.no_grad():
        padded, plain = model(given, features, mask), model(given, short)
    greedy = generate_codes(model, features[1:], sampling=GREEDY, guidance=Guidance(2.0))
    compile_decoding(model)
    torch._dynamo.utils.counters.clear()
    for condition, hidden, expected in ((features, mask, padded), (short, None, plain)):  # one graph serves both
        decoder = CachedDecoder(model, condition, hidden)
        logits = [decoder.prefill(given[:, :1]), *(decoder.step(given[:, n]) for n in range(1, TOKENS - 1))]
        assert_close(torch.stack(logits, dim=1), expected[:, 1:], rtol=1e-4, atol=1e-4)
    assert torch.equal(generate_codes(model, features[1:], sampling=GREEDY, guidance=Guidance(2.0)), greedy)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # two rows each time
    assert not torch._dynamo.utils.counters["graph_break"]


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="training mode"):
        compile_decoding(tiny_model().train())
    with pytest.raises(ValueError, match="int8"):
        compile_decoding(quantize_int8(tiny_model()))
    monkeypatch.setattr("generation.model.compiled.can_compile", lambda _: False)
    with pytest.raises(ValueError, match="needs a C"):
        compile_decoding(tiny_model())


def test_captions_longer_than_the_model_was_made_for_go_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr("generation.model.compiled.can_compile", lambda _: True)
    compile_decoding(model)
    features = torch.cat([captions(1), captions(1)], dim=1)
    assert CachedDecoder(model, captions(1))._compiled is not None
    decoder = CachedDecoder(model, features)
    assert decoder._compiled is None
    with torch.no_grad():
        expected = model(codes(1), features)
    assert_close(decoder.prefill(), expected[:, 0], rtol=1e-4, atol=1e-4)
    assert_close(decoder.step(codes(1)[:, 0]), expected[:, 1], rtol=1e-4, atol=1e-4)
