"""The transformer encoder: one vector for each patch, any grid, a round trip through files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layton.encoder import ViTEncoder
from layton.modules import Attention, rope_2d, rotate


def tiny() -> ViTEncoder:
    torch.manual_seed(0)
    return ViTEncoder(code_dim=4, width=32, depth=2, num_heads=2, patch_size=8, stem_width=8).eval()


def test_one_feature_vector_for_each_patch_on_any_grid() -> None:
    encoder = tiny()
    for height, width in ((32, 32), (8, 8), (16, 40)):
        assert encoder(torch.zeros(2, 3, height, width)).shape == (2, 4, height // 8, width // 8)


@pytest.mark.parametrize("shape", [(2, 3, 32, 33), (2, 1, 32, 32), (3, 32, 32)])
def test_sizes_that_do_not_divide_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        tiny()(torch.zeros(shape))
    with pytest.raises(ValueError, match="patch_size"):
        ViTEncoder(patch_size=12)


def test_images_do_not_see_one_another() -> None:
    encoder, images = tiny(), torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        alone = torch.cat([encoder(image[None]) for image in images])
        torch.testing.assert_close(encoder(images), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 0.0), (torch.float16, 0.02)])
def test_saved_and_loaded(tmp_path: Path, dtype: torch.dtype | None, tolerance: float) -> None:
    encoder, images = tiny(), torch.rand(1, 3, 32, 32)
    encoder.save_pretrained(tmp_path, dtype=dtype)
    again = ViTEncoder.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(again(images), encoder(images), rtol=0, atol=tolerance)


def test_rotary_products_depend_on_the_offset_only() -> None:
    cos, sin = rope_2d(6, 6, 8)
    query, key = torch.randn(8), torch.randn(8)
    queries, keys = (rotate(x.expand(1, 1, 36, 8), cos, sin)[0, 0].reshape(6, 6, 8) for x in (query, key))
    product = (queries[1, 2] * keys[3, 1]).sum()
    torch.testing.assert_close((queries[2, 4] * keys[4, 3]).sum(), product)
    assert not torch.isclose((queries[2, 4] * keys[3, 3]).sum(), product)
    with pytest.raises(ValueError, match="multiple of 4"):
        rope_2d(2, 2, 6)
    with pytest.raises(ValueError, match="num_heads"):
        Attention(10, 3)
