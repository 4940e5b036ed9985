"""PSNR, SSIM, rounding and colours against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from layton.metrics.colour import colour_errors
from layton.metrics.image import mean_squared_error, psnr, round_to_uint8, ssim


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def grey(value: float, size: int = 16) -> torch.Tensor:
    return torch.full((1, 3, size, size), value)


def test_psnr_of_a_constant_error_is_known():
    # error of 0.2 on a range of 2: 20 log10(2 / 0.2) = 20 dB
    assert psnr(grey(0.3), grey(0.1)).item() == pytest.approx(20.0, abs=1e-4)


def test_psnr_is_of_each_image_alone():
    a, b = random_images(3, 3, 16, 16), random_images(3, 3, 16, 16, seed=1)
    alone = torch.cat([psnr(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(psnr(a, b), alone)
    expected = [10 * math.log10(4 / float((a[i].double() - b[i].double()).square().mean())) for i in range(3)]
    assert psnr(a, b).tolist() == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(10 * torch.log10(4 / mean_squared_error(a, b)), psnr(a, b))


def test_equal_images_have_infinite_psnr_and_ssim_one():
    a = random_images(2, 3, 16, 16)
    assert psnr(a, a).isinf().all()
    torch.testing.assert_close(ssim(a, a), torch.ones(2))


def test_ssim_of_constant_images_is_the_luminance_term():
    # no variance: SSIM = (2 a b + C1) / (a^2 + b^2 + C1), C1 = (0.01 * 2)^2
    a, b, c1 = 0.5, 0.2, (0.01 * 2) ** 2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim(grey(a), grey(b)).item() == pytest.approx(expected, abs=1e-5)


def test_ssim_is_of_each_image_alone_also_for_one():
    a, b = random_images(3, 3, 24, 16), random_images(3, 3, 24, 16, seed=1)
    alone = torch.cat([ssim(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    assert alone.shape == (3,)
    torch.testing.assert_close(ssim(a, b), alone, rtol=1e-5, atol=1e-6)


def test_a_range_twice_too_large_inflates_ssim():
    """The quirk of LlamaGen's script: range 2.0 for images in [0, 1]."""
    a = (random_images(1, 3, 32, 32) * 0.05 + 1) / 2
    b = (a + 0.02 * random_images(1, 3, 32, 32, seed=1)).clamp(0, 1)
    assert ssim(a, b, data_range=2.0).item() > ssim(a, b, data_range=1.0).item() + 0.01
    torch.testing.assert_close(ssim(a * 2 - 1, b * 2 - 1).shape, torch.Size([1]))


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_wrong_shapes_are_named(measure):
    with pytest.raises(ValueError, match=r"differ in shape"):
        measure(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17))
    with pytest.raises(ValueError, match=r"\(1, 4, 16, 16\)"):
        measure(torch.zeros(1, 4, 16, 16), torch.zeros(1, 4, 16, 16))


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="at least 11"):
        ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))


def test_rounding_keeps_the_levels_of_a_file_and_is_idempotent():
    levels = torch.arange(256).float() / 127.5 - 1
    torch.testing.assert_close(round_to_uint8(levels), levels, rtol=0, atol=1e-6)
    x = random_images(1, 3, 16, 16) * 1.2
    once = round_to_uint8(x)
    assert torch.equal(round_to_uint8(once), once)
    assert (once - x.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6
    assert len(once.unique()) <= 256


def test_colour_errors_of_a_shift_and_of_a_washed_out_image():
    x = random_images(2, 3, 32, 32) * 0.5
    shifted = colour_errors(x + torch.tensor([0.1, 0.0, -0.1])[:, None, None], x)
    torch.testing.assert_close(shifted.mean, torch.tensor([[12.75, 0.0, -12.75]]).expand(2, 3), rtol=0, atol=1e-3)
    torch.testing.assert_close(shifted.std, torch.zeros(2, 3), rtol=0, atol=1e-3)
    mean = x.mean((2, 3), keepdim=True)
    washed = colour_errors(mean + 0.5 * (x - mean), x)
    torch.testing.assert_close(washed.mean, torch.zeros(2, 3), rtol=0, atol=1e-3)
    torch.testing.assert_close(washed.std, -0.5 * 127.5 * x.std((2, 3), correction=0), rtol=1e-4, atol=1e-3)


def test_colour_delta_of_known_colours():
    # CIE 1976: black to white is L* 0 to 100; sRGB red is L* 53.24, a* 80.09, b* 67.20 (D65)
    assert colour_errors(grey(1.0), grey(-1.0)).delta_e.item() == pytest.approx(100.0, abs=0.01)
    red = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, 4, 4)
    expected = math.sqrt(53.24**2 + 80.09**2 + 67.20**2)
    assert colour_errors(red, grey(-1.0, size=4)).delta_e.item() == pytest.approx(expected, abs=0.05)
    assert colour_errors(red, red).delta_e.item() == 0
