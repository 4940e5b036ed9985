"""Codes that are a part of an image stand at their own places on the grid."""

from __future__ import annotations

import pytest
import torch
from tiny_transformers import CODES, TOKENS, captions, codes, tiny_model

from generation.model.quantization import quantize_int8
from generation.pretrained import laytongen_transformer


def test_positions_of_the_whole_image_change_nothing():
    model, condition, whole = tiny_model().eval(), captions(2), codes(2)
    places = torch.arange(TOKENS).expand(2, TOKENS)
    torch.testing.assert_close(model(whole, condition, positions=places), model(whole, condition))
    first = places[:, :5]
    torch.testing.assert_close(model(whole[:, :5], condition, positions=first), model(whole, condition)[:, :5])


def test_every_image_has_its_own_places():
    model, condition, whole = tiny_model().eval(), captions(2), codes(2)
    shifted = torch.stack([torch.arange(4), torch.arange(4) + 5])
    both = model(whole[:, :4], condition, positions=shifted)
    for row in range(2):
        alone = model(whole[row : row + 1, :4], condition[row : row + 1], positions=shifted[row : row + 1])
        torch.testing.assert_close(both[row : row + 1], alone)
    moved = model(whole[:, :4], condition, positions=shifted.flip(0))
    assert not torch.allclose(both, moved, atol=1e-4)  # places matter
    assert both.shape == (2, 4, CODES)


def test_a_saved_transformer_goes_on_learning_but_a_quantized_one_does_not(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "full")
    loaded = laytongen_transformer(str(tmp_path / "full"))
    assert loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    quantize_int8(model).save_pretrained(tmp_path / "int8")
    with pytest.raises(ValueError, match="int8"):
        laytongen_transformer(str(tmp_path / "int8"))
