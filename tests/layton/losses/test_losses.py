"""Losses: zero where they should be, and ordered as a person would order damage."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from layton.losses.adversarial import PatchDiscriminator, hinge_discriminator_loss, hinge_generator_loss
from layton.losses.perceptual import PerceptualLoss, PerceptualNet
from layton.losses.reconstruction import psnr
from layton.scenes import render, sample_scene


def scenes(count: int = 4, size: int = 128) -> torch.Tensor:
    pixels = torch.stack([torch.from_numpy(render(sample_scene(seed), size)) for seed in range(count)])
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def test_embedded_perceptual_loss_is_zero_for_equal_images_and_grows_with_blur() -> None:
    loss, images = PerceptualLoss("mini"), scenes()
    blurred = [F.avg_pool2d(images, side, stride=1, padding=side // 2) for side in (3, 5, 9)]
    values = [float(loss(images, images)), *(float(loss(b, images)) for b in blurred)]
    assert values[0] == 0.0
    assert values == sorted(values) and values[1] > 1e-3


def test_perceptual_loss_trains_the_image_and_not_itself() -> None:
    loss = PerceptualLoss("mini")
    image = scenes(1).requires_grad_(True)
    loss(image * 0.9, scenes(1)).backward()
    assert image.grad is not None and float(image.grad.abs().sum()) > 0
    assert not list(loss.parameters()) and not loss.state_dict()


def test_perceptual_part_is_chosen_by_the_generator() -> None:
    loss, images = PerceptualLoss("mini", crop=32), scenes(2)
    damaged = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    values = [float(loss(damaged, images, generator=torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


def test_perceptual_net_round_trip(tmp_path) -> None:
    torch.manual_seed(0)
    net = PerceptualNet((4, 8))
    net.save_pretrained(tmp_path / "net")
    again = PerceptualNet.from_pretrained(tmp_path / "net")
    images = scenes(1, 64)
    for a, b in zip(net(images), again(images), strict=True):
        torch.testing.assert_close(a, b)


def test_psnr_of_a_known_error() -> None:
    images = torch.zeros(2, 3, 8, 8)
    assert torch.allclose(psnr(images + 0.2, images), torch.full((2,), 20.0), atol=1e-4)  # error 0.1 of the range


def test_hinge_losses_at_known_scores() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    assert float(hinge_discriminator_loss(real, fake)) == 0.25 + 0.5
    assert float(hinge_generator_loss(fake)) == 1.0
    assert PatchDiscriminator(8, 2)(torch.zeros(1, 3, 32, 32)).shape[1] == 1


def test_a_patch_is_seventy_pixels() -> None:
    torch.manual_seed(0)
    layers = [layer for layer in PatchDiscriminator(8).layers if not isinstance(layer, nn.GroupNorm)]  # these see all
    image = torch.randn(1, 3, 160, 160, requires_grad=True)
    scores = nn.Sequential(*layers)(image)
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    assert image.grad is not None
    rows = image.grad.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70
