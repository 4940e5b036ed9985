"""Band filters, spectra and edges: known answers and round trips."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from distill.frequency import (
    edge_strength,
    high_pass,
    low_pass,
    radial_power_spectrum,
    sobel,
    swap_bands,
)


def wave(cycles: int, size: int = 32) -> torch.Tensor:
    """One cosine along the width, (1, 1, H, W) float64."""
    x = torch.arange(size, dtype=torch.float64)
    return torch.cos(2 * math.pi * cycles * x / size).expand(1, 1, size, size)


@pytest.mark.parametrize("kind", ["ideal", "gaussian"])
def test_the_two_bands_add_up_to_the_image(rand64, kind):
    images = rand64(2, 3, 15, 18)
    assert_close(low_pass(images, 0.3, kind=kind) + high_pass(images, 0.3, kind=kind), images)


def test_an_ideal_filter_keeps_a_wave_whole_or_drops_it():
    slow, fast = wave(2), wave(12)  # 2/16 and 12/16 of Nyquist
    assert_close(low_pass(slow + fast, 0.5, kind="ideal"), slow)
    assert_close(high_pass(slow + fast, 0.5, kind="ideal"), fast)
    assert_close(swap_bands(slow + fast, 3 * slow - 2 * fast, 0.5), slow - 2 * fast)


def test_swapping_an_image_with_itself_changes_nothing(rand64):
    images = rand64(1, 3, 16, 16)
    assert_close(swap_bands(images, images, 0.4), images)


def test_the_gaussian_gain_is_the_formula():
    # 8 of 16 cycles: half of Nyquist; one standard deviation there
    assert_close(low_pass(wave(8), 0.5), math.exp(-0.5) * wave(8), rtol=1e-6, atol=1e-6)


def test_spectrum_sums_to_the_variance_of_a_band_limited_image(rand64):
    images = low_pass(rand64(3, 2, 32, 32), 0.9, kind="ideal")
    images = images - images.mean(dim=(2, 3), keepdim=True)
    assert_close(radial_power_spectrum(images, num_bins=16).sum(1), images.square().mean(dim=(1, 2, 3)))


def test_spectrum_puts_a_wave_in_its_ring():
    spectrum = radial_power_spectrum(wave(5), num_bins=16)[0]  # 5/16 of Nyquist: ring 5 of 16, index 4
    assert_close(spectrum[4], torch.tensor(0.5, dtype=torch.float64))
    assert_close(spectrum.sum(), spectrum[4])


def test_sobel_of_a_ramp_is_its_slope():
    ramp = torch.arange(8.0).expand(1, 2, 8, 8) * 3
    along_width, along_height = sobel(ramp).chunk(2, dim=1)
    assert_close(along_width[..., 1:-1], torch.full((1, 2, 8, 6), 3.0))
    assert_close(along_height, torch.zeros(1, 2, 8, 8))
    assert_close(edge_strength(ramp)[..., 1:-1], torch.full((1, 2, 8, 6), 3.0))


def test_gradients_reach_the_images_and_stay_finite():
    images = torch.zeros(1, 3, 8, 8, requires_grad=True)
    (
        edge_strength(images).sum()
        + high_pass(images, 0.2).square().sum()
        + radial_power_spectrum(images, num_bins=2).sum()
    ).backward()
    assert images.grad is not None and bool(images.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_edges_of_flat_pictures_have_gradients_under_autocast_too(dtype):
    weight = torch.full((3, 3, 1, 1), 0.1, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        images = torch.nn.functional.conv2d(torch.ones(1, 3, 8, 8), weight)
        strength = edge_strength(images)
    assert images.dtype == dtype and strength.dtype == torch.float32
    strength.sum().backward()
    assert weight.grad is not None and bool(weight.grad.isfinite().all())


@pytest.mark.parametrize("radius", [0.0, -1.0])
def test_a_radius_must_be_positive(radius):
    with pytest.raises(ValueError, match="radius"):
        low_pass(torch.zeros(1, 1, 4, 4), radius)
