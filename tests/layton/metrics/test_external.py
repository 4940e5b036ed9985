"""The published measures: absent with a reason, never downloaded, and working when weights are on disk.

The weights made here are random: these tests prove the paths, not the measures.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from layton.metrics.external import (
    AbsentError,
    ClipScore,
    ExternalSources,
    load_clip_score,
    load_external,
    load_lpips,
)


def test_without_weights_everything_is_absent_and_says_where_it_was_looked_for(tmp_path: Path):
    measures = load_external(ExternalSources(hub_dir=tmp_path))
    assert not measures.pairs
    assert measures.inception_fid is None
    assert set(measures.absent) == {"lpips_alex", "dists", "fid_inception"}
    assert str(tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth") in measures.absent["lpips_alex"]
    assert "vgg16" in measures.absent["dists"]
    assert not list(tmp_path.iterdir())


def test_lpips_runs_with_weights_on_disk_and_gives_one_figure_per_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    models = pytest.importorskip("torchvision.models")
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    weights = models.squeezenet1_1(weights=None).state_dict()
    torch.save(weights, tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    before = torch.hub.get_dir()
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: pytest.fail("a download"))
    measure = load_lpips(ExternalSources(hub_dir=tmp_path, lpips_net="squeeze"))
    assert torch.hub.get_dir() == before
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = torch.stack([x[0], -x[1]])
    scores = measure(x, y)
    assert scores.shape == (2,)
    assert scores[0] == pytest.approx(0, abs=1e-6)
    assert scores[1] > 0.01
    torch.testing.assert_close(measure(x[1:], y[1:]), scores[1:])


def test_clip_score_is_absent_without_a_model(tmp_path: Path):
    with pytest.raises(AbsentError, match="named"):
        load_clip_score(ExternalSources())
    with pytest.raises(AbsentError, match="nothing-here"):
        load_clip_score(ExternalSources(clip=str(tmp_path / "nothing-here")))


class FakeClip(torch.nn.Module):
    """Embeds an image as its mean colour and a text as the colour that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor):
        image_embeds = pixel_values.mean((2, 3)) * self.weight
        return type("Output", (), {"image_embeds": image_embeds, "text_embeds": torch.eye(3)[input_ids]})


def fake_processor(text, images, **options):
    ids = torch.tensor([["red", "green", "blue"].index(t) for t in text])
    assert all(image.dtype == torch.uint8 for image in images)
    return {"pixel_values": torch.stack([i.float() for i in images]), "input_ids": ids}


def test_clip_score_is_the_cosine_of_each_pair_times_100():
    score = ClipScore(FakeClip(), fake_processor, name="fake")
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 8, 8)
    yellow = torch.tensor([1.0, 1.0, -1.0])[:, None, None].expand(3, 8, 8)
    scores = score(torch.stack([red, red, yellow]), ["red", "blue", "green"])
    torch.testing.assert_close(scores, torch.tensor([100.0, 0.0, 100 / 2**0.5]), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        score(torch.stack([red, red]), ["red"])


def test_a_damaged_file_is_listed_with_its_name(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    names = ("alexnet-owt-7be5be79.pth", "weights-inception-2015-12-05-6726825d.pth")
    for name in names:
        (tmp_path / "checkpoints" / name).write_text("junk")
    absent = load_external(ExternalSources(hub_dir=tmp_path)).absent
    for measure, name in zip(("lpips_alex", "fid_inception"), names, strict=True):
        if measure == "lpips_alex" or find_spec("torch_fidelity") is not None:
            assert f"{name} cannot be read, and may be damaged" in absent[measure]
