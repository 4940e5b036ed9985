from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from distill.condition import Condition


def make(batch: int, offset: float = 0.0) -> Condition:
    embeds = torch.arange(batch * 6, dtype=torch.float32).reshape(batch, 3, 2) + offset
    return Condition(embeds=embeds, mask=torch.ones(batch, 3, dtype=torch.bool), guidance=torch.full((batch,), 2.0))


def test_slices_of_a_join_are_the_parts():
    first, second = make(2), make(3, 100.0)
    both = Condition.cat([first, second])
    assert both.batch_size == 5
    assert_close(both[:2].embeds, first.embeds)
    assert_close(both[2:].embeds, second.embeds)
    assert_close(both[torch.tensor([4, 0])].embeds[1], first.embeds[0])
    assert both.pooled is None


def test_repeat_keeps_images_of_a_prompt_together():
    repeated = make(2).repeat(3)
    assert_close(repeated.embeds[:3], make(2).embeds[:1].expand(3, 3, 2))
    assert_close(repeated.embeds[3:], make(2).embeds[1:].expand(3, 3, 2))


def test_dtype_change_leaves_masks_alone():
    moved = make(1).to(dtype=torch.float64)
    assert (moved.embeds.dtype, moved.mask.dtype) == (torch.float64, torch.bool)
    assert make(1).to(device="meta").mask.device.type == "meta"


def test_unset_fields_are_filled_and_set_ones_kept():
    null = Condition(embeds=torch.zeros(1, 3, 2))
    filled = null.filled_from(make(2))
    assert not filled.embeds.any() and filled.embeds.shape == (2, 3, 2)
    assert_close(filled.guidance, make(2).guidance)


def test_empty_condition_passes_through_everything():
    empty = Condition()
    assert empty.is_empty and empty.batch_size is None
    assert Condition.cat([empty, empty[:1].repeat(2).expand(7)]).is_empty


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: Condition.cat([make(1), Condition()]), ValueError, "same fields"),
        (lambda: Condition.cat([]), ValueError, "same fields"),
        (lambda: make(2).expand(3), ValueError, "2 to 3"),
        (lambda: make(2)[0], TypeError, "int"),
        (lambda: Condition(embeds=torch.zeros(1, 2, 3), guidance=torch.ones(2)).batch_size, ValueError, "guidance"),
    ],
)
def test_mistakes_are_named(act, error, message):
    with pytest.raises(error, match=message):
        act()
