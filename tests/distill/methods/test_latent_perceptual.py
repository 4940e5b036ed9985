"""The perceptual distance between latents."""

from __future__ import annotations

import pytest
import torch

from distill.methods.latent_perceptual import LatentPerceptualDistance, LatentPerceptualNet


def net(channels: int = 6) -> LatentPerceptualNet:
    torch.manual_seed(0)
    return LatentPerceptualNet(channels, widths=(8, 12), depths=(1, 2), pool_before=(1,))


def test_levels_have_the_stated_shapes() -> None:
    assert [tuple(level.shape) for level in net()(torch.zeros(2, 6, 8, 8))] == [(2, 8, 8, 8), (2, 12, 4, 4)]
    small = LatentPerceptualNet.small(16)(torch.zeros(1, 16, 16, 16))
    assert [level.shape[-1] for level in small] == [16, 16, 8, 4]
    with torch.device("meta"):
        vgg = LatentPerceptualNet()
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in vgg.modules()) == 13  # VGG16's
    assert sum(isinstance(layer, torch.nn.MaxPool2d) for layer in vgg.modules()) == 1  # three of its four removed


def test_distance_is_zero_for_equals_symmetric_and_grows_with_damage() -> None:
    distance = LatentPerceptualDistance(net())
    generator = torch.Generator().manual_seed(0)
    x, d = torch.randn(4, 6, 8, 8, generator=generator), torch.randn(4, 6, 8, 8, generator=generator)
    assert distance(x, x) == 0
    assert torch.allclose(distance(x, x + d), distance(x + d, x))
    assert 0 < distance(x, x + 0.1 * d) < distance(x, x + 0.5 * d)


def test_gradient_flows_into_the_first_only_and_the_net_stays_outside() -> None:
    distance = LatentPerceptualDistance(net(), l2_weight=0.5)
    a, b = torch.randn(2, 6, 8, 8, requires_grad=True), torch.randn(2, 6, 8, 8, requires_grad=True)
    distance(a, b).backward()
    assert a.grad is not None and a.grad.abs().sum() > 0 and b.grad is None
    assert not list(distance.parameters()) and not distance.state_dict()


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="6, h, w"):
        net()(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="pool_before"):
        LatentPerceptualNet(4, widths=(8,), depths=(1,), pool_before=(3,))
