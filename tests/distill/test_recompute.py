from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from distill.adapters import LoraSettings, networks_for
from distill.condition import Condition
from distill.models import UNetDenoiser
from distill.recompute import Recompute, set_recompute
from distill.schedules import VPSchedule
from layton.ldm.unet import build_unet


class Operations(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def step(what: Recompute) -> tuple[Counter[str], torch.Tensor, list[torch.Tensor]]:
    """Operations of the backward pass; the prediction; the adapter's gradients."""
    torch.manual_seed(0)
    unet = build_unet(latent_channels=4, latent_size=8, block_out_channels=(16, 16), text_width=8, norm_num_groups=4)
    set_recompute(unet, what)
    networks = networks_for(UNetDenoiser(unet, VPSchedule()), LoraSettings(rank=4))
    learning = [parameter for parameter in networks.student.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.data.normal_(std=0.1)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    found = networks.student(x, torch.tensor([10.0, 500.0]), Condition(embeds=torch.ones(2, 3, 8)))
    with Operations() as operations:
        found.square().mean().backward()
    return operations.found, found.detach(), [parameter.grad for parameter in learning]


def test_the_backward_pass_repeats_what_it_should_and_no_number_changes() -> None:
    nothing, found, gradients = step("nothing")
    assert nothing["convolution"] == nothing["native_group_norm"] == 0
    for what in ("cheap", "blocks"):
        operations, same, like = step(what)
        assert torch.equal(same, found)
        assert_close(like, gradients, rtol=0.0, atol=0.0)
        assert operations["native_group_norm"] > 0 and operations["gelu"] > 0
        assert (operations["convolution"] > 0) == (operations["addmm"] > nothing["addmm"]) == (what == "blocks")


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="everything"):
        set_recompute(build_unet(block_out_channels=(16, 16)), "everything")
