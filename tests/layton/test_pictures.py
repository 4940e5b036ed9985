from __future__ import annotations

import numpy as np
import pytest

from layton.pictures import to_uint8


def test_pictures_that_are_not_finite_are_refused_and_not_black() -> None:
    images = np.array([[[[0.0, 0.5, 1.0]]], [[[0.2, 0.2, 0.2]]]], np.float32)
    assert [image.tolist() for image in to_uint8(images)] == [[[[0, 128, 255]]], [[[51, 51, 51]]]]
    images[1, 0, 0, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 2 pictures drawn hold values that are not finite"):
        to_uint8(images)
