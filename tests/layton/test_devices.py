from __future__ import annotations

import pytest
import torch

from layton.devices import choose_device


def test_a_device_that_is_not_there_is_told_in_plain_words() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="no device 'gpu' here that torch can use: leave it out, or say "):
        choose_device("gpu")
