"""Palette and patch PCA: exact cases, optimality, and honest descriptions."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from layton.metrics import references
from layton.metrics.references import Palette, PatchPCA, cell_means, choose_colours, fit_references


def random_images(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_palette_with_enough_colours_is_the_enlarged_cell_means():
    x = random_images(3)
    palette = Palette.fit([x[:2], x[2:]])
    expected = F.interpolate(cell_means(x, 16), size=32, mode="bicubic").clamp(-1, 1)
    torch.testing.assert_close(palette.reconstruct(x), expected, rtol=0, atol=1e-6)
    assert len(palette.colours) == 3 * 256


def test_cell_means_are_means_of_cells():
    x = random_images(2, 64)
    expected = rearrange(x, "b c (h p) (w q) -> b c h w (p q)", p=4, q=4).mean(-1)
    torch.testing.assert_close(cell_means(x, 16), expected)


def test_palette_is_at_most_as_large_as_asked_and_codes_are_the_nearest():
    x = random_images(2)
    palette = Palette.fit([x], max_colours=64)
    assert len(palette.colours) == 64
    cells = rearrange(cell_means(x, 16), "b c h w -> b (h w) c")
    assert torch.equal(palette.encode(x), torch.cdist(cells, palette.colours.expand(2, -1, -1)).argmin(-1))


def test_more_colours_are_nearer():
    points = torch.rand(5000, 3, generator=torch.Generator().manual_seed(0))
    errors = [
        torch.cdist(points, choose_colours(points, k)).amin(1).square().mean().item() for k in (1, 8, 64, 512, 4096)
    ]
    assert all(later < 0.5 * earlier for earlier, later in pairwise(errors))
    assert errors[0] == pytest.approx(float(points.var(0, correction=0).sum()), rel=1e-4)


@pytest.mark.parametrize("max_colours", [1, 2, 3, 100, 1000])
def test_number_of_colours_never_exceeds_the_limit(max_colours: int):
    points = torch.rand(700, 3, generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    colours = choose_colours(points, max_colours)
    assert 0 < len(colours) <= max_colours
    assert len(choose_colours(points, 700)) == 700


def test_pca_restores_images_that_have_as_many_degrees_of_freedom():
    generator = torch.Generator().manual_seed(0)
    basis, mean = torch.randn(5, 768, generator=generator), torch.randn(768, generator=generator) * 0.1
    numbers = torch.randn(2, 16, 5, generator=generator) * 0.03
    patches = numbers @ basis + mean
    x = rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=4, p=16, q=16)
    assert x.abs().max() < 1
    exact, short = PatchPCA.fit([x], num_components=5), PatchPCA.fit([x], num_components=4)
    torch.testing.assert_close(exact.reconstruct(x), x, rtol=0, atol=1e-4)
    assert (short.reconstruct(x) - x).abs().max() > 0.01


def test_pca_error_is_the_variance_left_out():
    x = random_images(4) * 0.3
    pca = PatchPCA.fit(x.split(2), num_components=6)
    patches = rearrange(x, "b c (h p) (w q) -> (b h w) (c p q)", p=16, q=16).double()
    values = torch.linalg.svdvals(patches - patches.mean(0))
    error = (pca.reconstruct(x) - x).double().square().sum()
    torch.testing.assert_close(error, values[6:].square().sum(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(6), rtol=0, atol=1e-5)


def test_pca_takes_oblong_images_and_refuses_ragged_ones():
    x = random_images(1, 48)[..., :32]
    assert PatchPCA.fit([x], num_components=2).reconstruct(x).shape == x.shape
    with pytest.raises(ValueError, match="multiples of 16"):
        PatchPCA.fit([random_images(1, 40)])
    with pytest.raises(ValueError, match="769"):
        PatchPCA.fit([x], num_components=769)


def test_references_walk_twice_and_say_what_they_were_fitted_on():
    palette, pca = fit_references([random_images(2)], num_components=3, fitted_on="noise")
    assert palette.name == "palette"
    assert pca.name == "pca"
    assert "512 colours" in palette.description
    assert "noise" in palette.description
    assert "3 unquantised numbers" in pca.description
    assert "noise" in pca.description
    with pytest.raises(ValueError, match="list_iterator"):
        fit_references(iter([random_images(2)]))
    with pytest.raises(ValueError, match="no images"):
        fit_references([])


def test_of_very_many_colours_the_same_ones_are_kept_in_any_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(references, "MAX_POINTS", 500)
    x = random_images(8)
    palettes = [Palette.fit(batches, max_colours=256) for batches in ([x], x.split(1), x.flip(0).split(3))]
    assert all(palette.colours.equal(palettes[0].colours) for palette in palettes)
    cells = {tuple(cell) for cell in rearrange(cell_means(x, 16), "b c h w -> (b h w) c").tolist()}
    kept = Palette.fit([x], max_colours=500).colours
    assert len(kept) == 500 and len(cells) == 8 * 256
    assert all(tuple(colour) in cells for colour in Palette.fit([x], max_colours=16_384).colours.tolist())
