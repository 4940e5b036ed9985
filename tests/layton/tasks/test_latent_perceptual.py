"""The proxy task of the latent perceptual network."""

from __future__ import annotations

import functools

import pytest
import torch

from distill.methods.latent_perceptual import LatentPerceptualDistance, LatentPerceptualNet
from layton.distillation.latent_perceptual import SavedLatentPerceptualDistance, save_latent_perceptual
from layton.tasks.latent_perceptual import DISTORTIONS, LatentPerceptualTask

ADAM = functools.partial(torch.optim.AdamW, lr=3e-3)


def net() -> LatentPerceptualNet:
    torch.manual_seed(0)
    return LatentPerceptualNet(8, widths=(16, 24), depths=(1, 1), pool_before=(1,))


def smooth(size: int, seed: int = 0) -> torch.Tensor:
    coarse = torch.randn(size, 8, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bicubic")


@pytest.mark.parametrize("distort", DISTORTIONS, ids=lambda f: f.__name__)
def test_distortion_keeps_the_shape_is_repeatable_and_grows(distort) -> None:
    latent = smooth(1)[0] + 0.3 * torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(1))

    def error(strength: float) -> float:
        damaged = distort(latent, strength, torch.Generator().manual_seed(3))
        assert damaged.shape == latent.shape and torch.isfinite(damaged).all()
        assert torch.equal(damaged, distort(latent, strength, torch.Generator().manual_seed(3)))
        return (damaged - latent).square().mean().item()

    assert 0 < error(0.05) < error(1.0)


def test_training_lowers_the_loss_and_only_scenes_teach_words() -> None:
    task = LatentPerceptualTask(net(), optimizer=ADAM, noisy_share=0.25)
    batch = {
        "latent": smooth(32).half(),
        "caption": ["a red star", "two blue rings"] * 16,
        "key": [f"scenes/{i}" for i in range(32)],
    }
    optimizer = ADAM(task.trainable_parameters())
    first = task.validation_step(batch, 0).item()
    assert task.validation_step(batch, 0).item() == first
    for _ in range(25):
        optimizer.zero_grad()
        task.validation_step(batch, 0).backward()
        optimizer.step()
    assert task.validation_step(batch, 0).item() < 0.8 * first


def test_saved_network_measures_the_same(tmp_path) -> None:
    save_latent_perceptual(net(), tmp_path)
    loaded = SavedLatentPerceptualDistance(str(tmp_path))
    a, b = smooth(2), smooth(2, seed=5)
    assert torch.equal(LatentPerceptualDistance(net())(a, b), loaded(a, b))
