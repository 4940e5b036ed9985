"""Editing, inpainting and super-resolution keep what they must keep, whatever the model draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.schedules import VPSchedule
from layton.distillation.one_step_tasks import difference_mask, edit, inpaint, resize, super_resolve

ID = {"encode": lambda images: F.avg_pool2d(images, 4), "decode": lambda z: F.interpolate(z, scale_factor=4)}


class Painter(Denoiser):
    """Paints the left half in the colour of the prompt and the rest grey, whatever it sees."""

    def __init__(self) -> None:
        super().__init__(VPSchedule(), "x0")
        self.seen: list[Tensor] = []
        self.times: list[float] = []

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.pooled is not None
        self.seen.append(x_t)
        self.times += t.tolist()
        picture = torch.zeros_like(x_t)
        picture[..., : x_t.shape[-1] // 2] = condition.pooled[:, :, None, None]
        return picture


def images(size: int = 32) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8


def flat() -> Tensor:
    """Pictures of one colour each, which survive any change of size."""
    return images()[..., :1, :1].expand(-1, -1, 32, 32) / 2


def colour(value: float) -> Condition:
    return Condition(pooled=torch.full((1, 3), value))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_an_edit_changes_what_the_prompts_disagree_on_and_no_other_pixel():
    model, source = Painter(), flat()
    result = edit(model, source, colour(0.4), colour(0.1), generator=generator(), softness=0, **ID)
    assert_close(result[..., :12], source[..., :12] + 0.3)  # added to what was there
    assert_close(result[..., 24:], source[..., 24:], rtol=0, atol=0)
    assert model.times == [999.0] * 4  # two samples under two prompts


def test_equal_prompts_edit_nothing():
    source = images()
    result = edit(Painter(), source, colour(0.5), colour(0.5), generator=generator(), **ID)
    assert_close(result, source, rtol=0, atol=0)


def test_without_threshold_the_whole_picture_is_edited_as_strongly_as_asked():
    for strength in (0.0, 1.0, 2.0):
        asked = {"threshold": 0.0, "strength": strength}
        result = edit(Painter(), flat(), colour(0.2), colour(0.1), generator=generator(), **asked, **ID)
        change = torch.zeros(32)
        change[:16] = 0.1 * strength
        assert_close(result[..., [0, -1]], (flat() + change)[..., [0, -1]])
    with pytest.raises(ValueError, match="strength -1"):
        edit(Painter(), images(), colour(0.2), colour(0.1), generator=generator(), strength=-1, **ID)


def test_the_mask_grows_by_its_softness():
    one = torch.zeros(1, 1, 9, 9)
    one[..., 4, 4] = 1.0
    narrow = difference_mask(one, torch.zeros_like(one), threshold=0.5, softness=0)
    wide = difference_mask(one, torch.zeros_like(one), threshold=0.5, softness=2)
    assert narrow.sum() == 9 and wide.sum() == 49  # the mean filter sees one pixel from a 3x3 block


def test_inpainting_leaves_pixels_outside_the_mask_alone():
    source = images()
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 5:19, 3:14] = 1
    result = inpaint(Painter(), source, mask, colour(0.9), generator=generator(), **ID)
    outside = (mask == 0).expand_as(source)
    assert_close(result[outside], source[outside], rtol=0, atol=0)
    assert_close(result[~outside], torch.full_like(result[~outside], 0.9))


def test_a_grey_fill_hides_what_was_there():
    mask = torch.ones(1, 1, 32, 32)
    for fill, hidden in (("grey", True), ("keep", False)):
        model = Painter()
        states = []
        for source in (images(), -images()):
            inpaint(model, source, mask, colour(0.1), generator=generator(), t=300.0, fill=fill, **ID)
            states.append(model.seen[-1])
        assert torch.equal(states[0], states[1]) == hidden


def test_super_resolution_agrees_with_its_source_and_keeps_the_models_detail():
    small = images(16) * 0.5
    pixels = {"encode": lambda x: x, "decode": lambda x: x}
    plain = super_resolve(Painter(), small, colour(0.3), generator=generator(), rounds=0, **pixels)
    result = super_resolve(Painter(), small, colour(0.3), generator=generator(), rounds=5, **pixels)
    assert result.shape == (2, 3, 64, 64)

    def error(x: Tensor) -> float:
        return float((resize(x, 0.25) - small).square().mean())

    assert error(result) < 0.02 * error(plain)


def test_no_strength_is_bicubic():
    small = images(16) * 0.5
    pixels = {"encode": lambda x: x, "decode": lambda x: x}
    result = super_resolve(Painter(), small, colour(0.3), generator=generator(), strength=0.0, rounds=0, **pixels)
    assert_close(result, F.interpolate(small, scale_factor=4, mode="bicubic").clamp(-1, 1))


def test_the_same_seed_gives_the_same_picture_and_nonsense_is_refused():
    found = [edit(Painter(), images(), colour(0.9), colour(0.1), generator=generator(), **ID) for _ in range(2)]
    assert_close(found[0], found[1], rtol=0, atol=0)
    with pytest.raises(ValueError, match="threshold"):
        edit(Painter(), images(), colour(0.9), colour(0.1), generator=generator(), threshold=1.0, **ID)
    with pytest.raises(ValueError, match="mask"):
        inpaint(Painter(), images(), torch.zeros(1, 1, 8, 8), colour(0.9), generator=generator(), **ID)
    with pytest.raises(ValueError, match="scale"):
        super_resolve(Painter(), images(), colour(0.9), generator=generator(), scale=1, **ID)


def test_a_model_of_pictures_starts_from_the_picture_itself_at_the_noisiest_time():
    model, mask = Painter(), torch.zeros(1, 1, 32, 32)
    mask[..., 8:16, 4:12] = 1
    small = images(16)
    pixels = {"encode": lambda x: x, "decode": lambda x: x}
    edit(model, images(), colour(0.4), colour(0.1), generator=generator(), start="image", **pixels)
    inpaint(model, images(), mask, colour(0.4), generator=generator(), start="image", t=300.0, **pixels)
    super_resolve(model, small, colour(0.4), generator=generator(), start="image", t=300.0, **pixels)
    assert model.times == [999.0] * 6  # one prediction each, of two samples
    wanted = [images(), images() * (1 - mask), resize(small, 4).clamp(-1, 1)]
    for state, given in zip(model.seen, wanted, strict=True):
        assert_close(state, given, rtol=0, atol=0)
