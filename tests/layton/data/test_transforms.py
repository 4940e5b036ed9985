from __future__ import annotations

import pytest
import torch

from layton.data.folder import ImageFolderSource
from layton.data.images import ImageError
from layton.data.transforms import Fit, RandomCrop, RandomResizedCrop

TRANSFORMS = [Fit(24), RandomResizedCrop(24), RandomCrop(24), RandomCrop(24, shorter_side=30), RandomCrop(200)]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("size", [(48, 40), (1, 1), (3, 90)])
def test_any_image_becomes_a_square_in_range(kit, transform, size):
    image = transform(kit.smooth_image(1, size), seed=7)
    assert image.shape == (3, transform.size, transform.size) and image.abs().max() <= 1


@pytest.mark.parametrize("transform", TRANSFORMS[1:4])
def test_chance_is_a_function_of_the_seed_and_of_nothing_else(kit, transform):
    image = kit.smooth_image(1)
    first = transform(image, seed=7)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(transform(image, seed=7), first)
    assert torch.equal(torch.get_rng_state(), state)  # training's generator is not disturbed
    assert not all(torch.equal(transform(image, seed=seed), first) for seed in range(8, 12))


def test_flips_happen_as_often_as_asked(kit):
    image = kit.smooth_image(1, (24, 24))
    plain = Fit(24)(image, seed=0)
    transform = RandomCrop(24, flip=0.5)
    flipped = [torch.equal(transform(image, seed=seed), plain.flip(-1)) for seed in range(100)]
    assert 35 <= sum(flipped) <= 65
    assert torch.equal(RandomCrop(24, flip=0.0)(image, seed=0), plain)


def test_a_line_of_pixels_is_no_bomb(kit, tmp_path):
    with pytest.raises(ImageError, match="more than the allowed"):
        RandomCrop(128)(kit.smooth_image(1, (16384, 1)), seed=0)
    (tmp_path / "line.png").write_bytes(kit.encode(kit.smooth_image(1, (16384, 1)), "PNG"))
    (tmp_path / "good.png").write_bytes(kit.encode(kit.smooth_image(2), "PNG"))
    source = ImageFolderSource(str(tmp_path), split=None, transform=RandomCrop(128))
    assert source.sample(1, seed=0)["key"].endswith("/good") and source.bad.names == [f"{tmp_path.name}/line"]


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="size must be >= 1, got 0"):
        Fit(0)
    with pytest.raises(ValueError, match="got 8"):
        RandomCrop(24, shorter_side=8)
