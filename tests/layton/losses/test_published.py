"""DISTS and LPIPS as losses: taken where weights are on disk, replaced where not, with gradients either way.

The backbones made here are random: these tests prove the paths, not the measures.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision import models
from torchvision.models.vgg import cfgs, make_layers
from toy import ToyPart, ToyTask

from distill.held import Held
from layton.losses.published import PublishedPerceptualLoss


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: pytest.fail("a download"))
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    return tmp_path


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return drawn[0].requires_grad_(), drawn[1]


def is_a_loss(loss: PublishedPerceptualLoss) -> None:
    images, targets = pictures()
    distance = loss(images, targets)
    assert distance.shape == () and distance > 1e-4
    distance.backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert loss(targets, targets) == pytest.approx(0.0, abs=1e-5)
    assert not loss.state_dict() and not list(loss.parameters())


def test_lpips_where_its_backbone_is(hub: Path) -> None:
    torch.save(models.squeezenet1_1(weights=None).state_dict(), hub / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    loss = PublishedPerceptualLoss(hub_dir=hub, lpips_net="squeeze")  # DISTS is looked for first, and is not there
    assert loss.measure == "lpips"
    is_a_loss(loss)


def test_dists_where_its_backbone_is(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (hub / "checkpoints" / "vgg16-397923af.pth").touch()  # 528 MB, and only its first layers count
    vgg = SimpleNamespace(features=make_layers(cfgs["D"]))
    monkeypatch.setattr("torchmetrics.functional.image.dists.vgg16", lambda **_: vgg)
    loss = PublishedPerceptualLoss(hub_dir=hub)
    assert loss.measure == "dists"
    is_a_loss(loss)


def test_the_network_of_our_own_otherwise(hub: Path) -> None:
    loss = PublishedPerceptualLoss(hub_dir=hub)
    assert loss.measure == "own"
    is_a_loss(loss)
    with pytest.raises(ValueError, match="vgg16"):
        PublishedPerceptualLoss(hub_dir=hub, otherwise=None)
    with pytest.raises(ValueError, match="ssim"):
        PublishedPerceptualLoss(prefer=("ssim",))  # type: ignore[arg-type]


def test_a_run_keeps_its_measure(hub: Path) -> None:
    task = ToyTask(ToyPart(), torch.optim.AdamW)
    checkpoint: dict[str, object] = {}
    task.part.distance = Held(PublishedPerceptualLoss(hub_dir=hub))
    task.on_save_checkpoint(checkpoint)
    task.on_load_checkpoint(checkpoint)
    task.part.distance.module.measure = "dists"  # as where its weights are
    with pytest.raises(ValueError, match=r"own.*dists"):
        task.on_load_checkpoint(checkpoint)
