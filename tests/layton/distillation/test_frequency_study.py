"""The study tells which band an image lacks, and its files can be read."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from distill.frequency import low_pass
from layton.distillation.frequency_study import line_plot, picture_of, study_frequencies, write_study


def images() -> tuple[torch.Tensor, torch.Tensor]:
    sharp = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    return sharp, low_pass(sharp, 0.3, kind="ideal")


def test_images_without_their_upper_band_are_restored_by_it():
    sharp, blurred = images()
    study = study_frequencies(sharp, blurred, radii=(0.1, 0.3, 0.6), batch_size=2)
    restored = {swap.radius: swap.high_restored for swap in study.swaps}
    assert restored[0.3] < 1e-6 * study.distance  # the band that was taken away
    assert restored[0.6] == pytest.approx(study.distance - _power_above(sharp, 0.6), rel=1e-3)
    # giving it the low band again changes nothing: there it was right
    assert study.swaps[0].low_restored == pytest.approx(study.distance, rel=1e-4)


def _power_above(sharp: torch.Tensor, radius: float) -> float:
    return float((sharp - low_pass(sharp, radius, kind="ideal")).square().mean())


def test_ratios_of_upper_power_are_to_the_many_step_images():
    sharp, blurred = images()
    study = study_frequencies(sharp, blurred, others={"half": sharp / 2})
    assert study.upper_half_ratio["many_steps"] == pytest.approx(1.0)
    assert study.upper_half_ratio["half"] == pytest.approx(0.25, rel=1e-4)
    assert study.upper_half_ratio["one_step"] < 1e-6
    assert study.num_images == 5 and len(study.spectra["half"]) == 64


def test_files_are_written_and_can_be_read(tmp_path):
    sharp, blurred = images()
    study = study_frequencies(sharp, blurred)
    write_study(study, tmp_path / "out", many_steps=sharp, one_step=blurred, num_pictures=2)
    found = json.loads((tmp_path / "out" / "study.json").read_text())
    assert found["distance"] == study.distance and len(found["swaps"]) == len(study.swaps)
    with Image.open(tmp_path / "out" / "bands.png") as picture:
        assert picture.size == (2 * 32, 4 * 32)
    for name in ("spectra.png", "swaps.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=10_000) or []) > 3


def test_a_plot_draws_its_curves_where_they_belong():
    plot = line_plot({"up": ([0.0, 1.0], [0.0, 1.0])}, title="t", size=(200, 120))
    assert plot.getpixel((70, 90)) == (31, 119, 180)  # lower left corner of the frame
    assert plot.getpixel((125, 60)) == (31, 119, 180)  # its middle
    with pytest.raises(ValueError, match="curves"):
        line_plot({}, title="t")


def test_pictures_round_to_the_nearest_level():
    picture = picture_of([torch.tensor([-1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 1, 4).expand(1, 3, 1, 4)])
    assert [picture.getpixel((x, 0))[0] for x in range(4)] == [0, 128, 255, 255]


def test_sets_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match="pair up"):
        study_frequencies(torch.zeros(2, 3, 8, 8), torch.zeros(3, 3, 8, 8))
