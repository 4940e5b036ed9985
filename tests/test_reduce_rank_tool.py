"""tools/reduce_rank.py on what training exports: decoders and students load as before, with smaller adaptors."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import small_pipelines as tiny
import torch

from distill.adapters import LoraSettings, networks_for
from distill.few_step import FewStepSampling
from distill.models import denoiser_from_pipeline
from layton.decoders import ConsistencyDecoder
from layton.distillation.distilled import LORA_NAME, load_distilled, network_of, save_distilled
from layton.folder import load_config
from layton.ldm.teacher import open_pipeline

TOOL = Path(__file__).parents[1] / "tools" / "reduce_rank.py"


def reduce(folder: Path, out: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(folder), "--rank", str(rank), "--out", str(out)])
    runpy.run_path(str(TOOL), run_name="__main__")


def test_a_student_draws_as_before_where_a_smaller_rank_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.stable_diffusion("v_prediction").save_pretrained(tmp_path / "teacher")
    student = networks_for(
        denoiser_from_pipeline(open_pipeline(tmp_path / "teacher")), LoraSettings(6, 3.0, ("to_q", "to_v", "conv1"))
    ).student
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network_of(student).named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
            if ".lora_B." in name:
                with torch.no_grad():
                    parameter[:, 2:] = 0.0
    save_distilled(student, tmp_path / "student", FewStepSampling(times=((999.0,),), prediction="v"))
    reduce(tmp_path / "student", tmp_path / "small", 2, monkeypatch)
    drawn = []
    for name in ("student", "small"):
        pipe = open_pipeline(tmp_path / "teacher")
        load_distilled(pipe, tmp_path / name)
        pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(1)
        drawn.append(
            pipe("a star", num_inference_steps=1, guidance_scale=1.0, generator=noise, output_type="pt").images
        )
    torch.testing.assert_close(*drawn, atol=1e-4, rtol=1e-4)
    sizes = [(tmp_path / name / LORA_NAME).stat().st_size for name in ("student", "small")]
    assert sizes[1] < sizes[0]
    for rank in (3, 0):
        with pytest.raises(SystemExit) as ended:
            reduce(tmp_path / "small", tmp_path / "smaller", rank, monkeypatch)
        assert ended.value.code == 1
        assert f"of rank 2: nothing to reduce to {rank}" in capsys.readouterr().err
    assert not (tmp_path / "smaller").exists()


def test_a_decoder_reconstructs_alike_with_a_smaller_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layton import assets

    mini = assets.resolve("mini")
    folder = mini / "decoders" / "consistency"
    before = load_config(folder, expected_class="layton.decoders.ConsistencyDecoder")["difference"]
    assert isinstance(before, dict) and isinstance(before["lora"], dict)
    rank = int(str(before["lora"]["rank"])) - 1
    reduce(folder, tmp_path / "small", rank, monkeypatch)
    options = {"ldm": mini / "ldm", "base": mini / "decoders" / "diffusion", "reader": mini / "decoders" / "light"}
    codes = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)) / 8**0.5
    pictures = []
    for place in (folder, tmp_path / "small"):
        decoder = ConsistencyDecoder.from_pretrained(place, **options)
        assert decoder.difference is not None
        with torch.no_grad():
            pictures.append(decoder.decode(codes, num_steps=1, generator=torch.Generator().manual_seed(1)))
    assert decoder.difference is not None and decoder.difference.adaptation.adapters.rank == rank
    error = (pictures[0] - pictures[1]).square().mean()
    assert 0 < error < 0.01
