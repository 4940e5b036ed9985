from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layton.data.geometry import FIT_POLICIES, Geometry, fit_image, resize_tensor
from layton.data.images import to_tensor

SIZES = [(1, 1), (1, 7), (7, 1), (3, 400), (400, 3), (31, 33), (64, 64), (63, 65), (100, 40), (5, 6), (257, 19)]


@pytest.mark.parametrize("policy", FIT_POLICIES)
@pytest.mark.parametrize("original", SIZES)
@pytest.mark.parametrize("size", [16, 33])
def test_any_shape_becomes_the_square_and_undo_gives_its_size_back(policy, original, size):
    image = torch.rand(3, *original, generator=torch.Generator().manual_seed(0)) * 2 - 1
    geometry = Geometry.plan(original, size, policy=policy)
    square = geometry.apply(image)
    assert square.shape == (3, size, size) and square.abs().max() <= 1
    for scale in (1, 2):  # a decoder may work at a larger scale
        back = geometry.undo(resize_tensor(square, (size * scale, size * scale)))
        side = min(original)
        assert back.shape == ((3, side, side) if policy == "crop" else (3, *original))


def test_boxes_are_what_the_policies_say():
    assert Geometry.plan((100, 40), 50, policy="crop").box == (0, 30, 40, 70)
    assert Geometry.plan((100, 40), 50, policy="pad").box == (15, 0, 35, 50)
    assert Geometry.plan((100, 40), 50, policy="resize").box == (0, 0, 40, 100)
    assert Geometry.plan((3, 4000), 256, policy="pad").box == (0, 127, 256, 128)


def smooth(height, width):
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 3, width), indexing="ij")
    return torch.stack([torch.sin(x + y), torch.cos(x - y), torch.sin(2 * x)]) * 0.9


@pytest.mark.parametrize("policy", FIT_POLICIES)
def test_a_smooth_image_survives_fit_and_undo(policy):
    image = smooth(60, 90)
    geometry = Geometry.plan((60, 90), 96, policy=policy)
    kept = image[:, :, 15:75] if policy == "crop" else image
    assert (geometry.undo(geometry.apply(image)) - kept).abs().max() < 0.03


def test_padding_has_the_stated_colour_and_undo_leaves_no_trace_of_it():
    geometry = Geometry.plan((30, 60), 64, policy="pad")
    square = geometry.apply(torch.zeros(3, 30, 60), fill=1.0)
    assert (square[:, :16] == 1).all() and (square[:, 16:48] == 0).all() and (square[:, 48:] == 1).all()
    assert geometry.undo(square).abs().max() == 0


@pytest.mark.parametrize("policy", FIT_POLICIES)
@pytest.mark.parametrize("original", [(90, 70), (20, 31)])
def test_files_and_tensors_are_fitted_alike(kit, policy, original):
    image = kit.smooth_image(2, original[::-1])
    square, geometry = fit_image(image, 48, policy=policy)
    assert geometry == Geometry.plan(original, 48, policy=policy)
    assert (to_tensor(square) - geometry.apply(to_tensor(image))).abs().max() <= 1.5 / 127.5


def test_reducing_is_antialiased():
    checkers = torch.from_numpy(np.indices((128, 128)).sum(0) % 2 * 2.0 - 1).float().expand(3, -1, -1)
    assert Geometry.plan((128, 128), 16, policy="resize").apply(checkers).abs().max() < 0.1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 1024), st.sampled_from(FIT_POLICIES))
def test_a_geometry_survives_json(height, width, size, policy):
    geometry = Geometry.plan((height, width), size, policy=policy)
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


@pytest.mark.parametrize(
    "change",
    [
        {"policy": "stretch"},
        {"size": 0},
        {"size": 16.0},
        {"size": True},
        {"original_size": [20]},
        {"original_size": "20"},
        {"box": [0, 0, 99, 99]},
        {"box": [4, 0, 4, 16]},
        {"more": 1},
    ],
)
def test_a_tampered_geometry_is_refused(change):
    good = Geometry.plan((20, 40), 16, policy="pad").to_dict()
    with pytest.raises(ValueError, match=r"."):
        Geometry.from_dict({**good, **change})
    with pytest.raises(ValueError, match="a geometry has"):
        Geometry.from_dict({"size": 16})


def test_wrong_images_are_refused():
    geometry = Geometry.plan((20, 40), 16)
    with pytest.raises(ValueError, match=r"\(40, 20\)"):
        geometry.apply(torch.zeros(3, 40, 20))
    with pytest.raises(ValueError, match="16x17"):
        geometry.undo(torch.zeros(3, 16, 17))
    with pytest.raises(ValueError, match="sizes must be >= 1"):
        Geometry.plan((0, 40), 16)
    with pytest.raises(ValueError, match="stretch"):
        Geometry.plan((20, 40), 16, policy="stretch")
