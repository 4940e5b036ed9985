"""The light decoder's network."""

from __future__ import annotations

from pathlib import Path

import torch

from layton.pixel_decoder import ConvBlock, PixelDecoder


def tiny() -> PixelDecoder:
    torch.manual_seed(0)
    return PixelDecoder(4, 32, 1, 2, fine_width=8, num_fine_blocks=1, patch_size=8).eval()


def test_one_patch_for_each_code_on_any_grid() -> None:
    for h, w in ((4, 4), (1, 1), (2, 5)):
        assert tiny()(torch.zeros(2, 4, h, w)).shape == (2, 3, 8 * h, 8 * w)


def test_every_pixel_depends_on_the_codes_and_codes_on_every_pixel() -> None:
    embeddings = torch.randn(1, 4, 2, 2, requires_grad=True)
    image = tiny()(embeddings)
    image.square().sum().backward()
    assert embeddings.grad is not None
    assert bool((embeddings.grad.abs() > 0).all())
    with torch.no_grad():
        assert bool(((tiny()(embeddings) - tiny()(embeddings + 1)).abs().amax(1) > 0).all())


def test_blocks_begin_as_the_identity_up_to_a_constant() -> None:
    block, x = ConvBlock(8), torch.randn(1, 8, 4, 4)
    difference = block(x) - x
    torch.testing.assert_close(difference, difference[..., :1, :1].expand_as(difference))


def test_saved_and_loaded(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    x = torch.randn(1, 4, 2, 2)
    assert torch.equal(PixelDecoder.from_pretrained(tmp_path)(x), tiny()(x))
