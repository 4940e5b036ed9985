"""The Stacked U-Net equals its two halves run by hand, and leaves the original alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.testing import assert_close

from distill.condition import Condition
from distill.models import UNetDenoiser
from distill.schedules import FlowSchedule
from distill.stacked import StackedUNet2DConditionModel, stack


def denoiser(width: int = 16) -> UNetDenoiser:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(width, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()
    return UNetDenoiser(unet, FlowSchedule(), "flow")


def inputs():
    draw = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, 4, 8, 8, generator=draw)
    return x_t, torch.tensor([1000.0, 250.0]), Condition(embeds=torch.randn(2, 3, 16, generator=draw))


def test_features_before_the_output_layers_enter_after_the_input_convolution():
    base = denoiser()
    kept: list[torch.Tensor] = []
    replaced: list[torch.Tensor] = []
    x_t, t, condition = inputs()
    stacked = stack(base)
    with torch.no_grad():
        found = stacked(x_t, t, condition)
        handle = base.unet.conv_norm_out.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        base(x_t, t, condition)
        handle.remove()
        handle = base.unet.conv_in.register_forward_hook(lambda *_: replaced.append(kept[0]) or kept[0])
        wanted = base(x_t, t, condition)
        handle.remove()
    assert len(replaced) == 1
    assert_close(found, wanted)


def test_the_two_networks_have_weights_of_their_own_and_lack_the_middle_layers():
    base = denoiser()
    stacked = stack(base)
    total = sum(p.numel() for p in base.parameters())
    middle = [base.unet.conv_in, base.unet.conv_norm_out, base.unet.conv_out]
    left_out = sum(p.numel() for module in middle for p in module.parameters())
    assert sum(p.numel() for p in stacked.parameters()) == 2 * total - left_out
    x_t, t, condition = inputs()
    stacked(x_t, t, condition).sum().backward()
    assert all(p.grad is not None for p in stacked.parameters())
    assert all(p.grad is None for p in base.parameters())


def test_it_saves_and_loads_as_a_network_of_diffusers(tmp_path: Path):
    base = denoiser()
    stacked = stack(base)
    with torch.no_grad():
        for parameter in stacked.unet.first.parameters():
            parameter.add_(0.01)
    stacked.unet.save_pretrained(tmp_path)
    loaded = StackedUNet2DConditionModel.from_pretrained(tmp_path, local_files_only=True).eval()
    with torch.no_grad():
        assert_close(UNetDenoiser(loaded, FlowSchedule(), "flow")(*inputs()), stacked(*inputs()), rtol=0, atol=0)
    with pytest.raises(ValueError, match="already"):
        stack(stacked)
