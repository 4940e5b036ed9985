"""The three applications: cases can be solved, a perfect model solves them, one that does nothing does not."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import small_pipelines as tiny
import torch
from PIL import Image
from torch import Tensor

from distill.adapters import LoraSettings, networks_for
from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.few_step import FewStepSampling
from distill.models import denoiser_from_pipeline
from distill.schedules import VPSchedule
from generation.evaluation.application_verdicts import circles, fills, is_found, shows
from generation.evaluation.applications import (
    OneStepModel,
    TaskSettings,
    score_editing,
    score_enlargement,
    score_inpainting,
)
from layton.cli import main
from layton.data.images import to_tensor
from layton.distillation.distilled import save_distilled
from layton.distillation.one_step_model import load_one_step_model
from layton.scenes import caption, render, split_seeds
from layton.scenes.cases import edit_case, hole_of, holes
from layton.sceneval import find_objects

SIZE = 128
COUNT = 6
EXACT = TaskSettings(edit_t=1.0, edit_threshold=0.05, edit_softness=1, inpaint_t=1.0, enlarge_t=1.0)


class Oracle(Denoiser):
    """Knows the picture of every prompt (its number is in the condition) and draws it whatever it sees."""

    def __init__(self, pictures: dict[str, Tensor]) -> None:
        super().__init__(VPSchedule(), "x0")
        self.texts = list(pictures)
        self.pictures = torch.stack(list(pictures.values()))

    def condition_of(self, texts: Sequence[str]) -> Condition:
        return Condition(pooled=torch.tensor([[float(self.texts.index(text))] for text in texts]))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.pooled is not None
        return self.pictures[condition.pooled[:, 0].long()]


class Idle(Oracle):
    """Draws grey, whatever it is told."""

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.zeros_like(x_t)


def model_of(pictures: dict[str, Tensor], kind: type[Oracle] = Oracle) -> OneStepModel:
    oracle = kind(pictures)
    return OneStepModel(oracle, lambda x: x, lambda x: x, oracle.condition_of, SIZE)


def drawn(scene) -> Tensor:
    return to_tensor(Image.fromarray(render(scene, SIZE)))


def test_cases_change_what_the_caption_names_and_nothing_else():
    for seed in split_seeds("validation", 40):
        case = edit_case(seed)
        assert case == edit_case(seed)
        assert caption(case.wanted) != caption(case.scene)
        for index, (before, after) in enumerate(zip(case.scene.objects, case.wanted.objects, strict=True)):
            assert (before.colour != after.colour) == (index in case.changed)
            assert (before.shape, before.cx, before.cy) == (after.shape, after.cx, after.cy)
        assert circles(case.recoloured(), 32).sum() > 0


def test_a_hole_holds_its_object_whole_and_no_other():
    found = list(holes("validation", 20))
    assert len(found) == 20
    for hole in found:
        rows, columns = hole.box(SIZE)
        difference = (drawn(hole.scene) - drawn(hole.without())).abs().amax(dim=0)
        assert difference[rows, columns].max() > 0
        difference[rows, columns] = 0
        assert difference.max() == 0
    assert hole_of(found[0].scene.seed) == found[0]


def test_verdicts_want_shape_colour_and_place():
    case = edit_case(split_seeds("validation", 1)[0])
    found = find_objects(render(case.wanted, SIZE))
    assert shows(case.wanted, found)
    assert not shows(case.scene, found)
    assert not shows(case.wanted, [*found, found[0]])
    assert all(is_found(item, found) for item in case.recoloured())
    hole = next(holes("validation", 1))
    assert fills(hole, find_objects(render(hole.scene, SIZE)), SIZE)
    assert not fills(hole, find_objects(render(hole.without(), SIZE)), SIZE)


def test_editing():
    cases = [edit_case(seed) for seed in split_seeds("validation", COUNT)]
    pictures = {caption(scene): drawn(scene) for case in cases for scene in (case.scene, case.wanted)}
    score = score_editing(model_of(pictures), COUNT, EXACT, split="validation", batch_size=4)
    assert score.scenes == COUNT
    assert score.correct >= score.limit - 1 / COUNT and score.changed >= score.correct
    assert score.psnr_outside > 35
    idle = score_editing(model_of(pictures, Idle), COUNT, EXACT, split="validation", batch_size=4)
    assert idle.changed == idle.correct == 0
    assert idle.limit == score.limit > 0.5


def test_inpainting():
    cases = list(holes("validation", COUNT))
    pictures = {caption(hole.scene): drawn(hole.scene) for hole in cases}
    score = score_inpainting(model_of(pictures), COUNT, EXACT, split="validation", batch_size=4)
    assert score.inside == score.limit > 0.5
    assert score.psnr_outside == 100.0
    idle = score_inpainting(model_of(pictures, Idle), COUNT, EXACT, split="validation", batch_size=4)
    assert idle.inside == 0


def test_enlargement():
    cases = [edit_case(seed).scene for seed in split_seeds("validation", COUNT)]
    pictures = {caption(scene): drawn(scene) for scene in cases}
    seen: list[int] = []
    score = score_enlargement(model_of(pictures), COUNT, EXACT, split="validation", batch_size=4, on_batch=seen.append)
    assert score.psnr > score.psnr_bicubic + 3
    assert score.epd is None and score.epd_bicubic is None
    assert seen == [4, 2]

    def distance(images: Tensor, originals: Tensor) -> Tensor:
        return (images - originals).abs().mean(dim=(1, 2, 3))

    again = score_enlargement(model_of(pictures), COUNT, EXACT, split="validation", batch_size=6, epd=distance)
    assert again.epd is not None and again.epd_bicubic is not None and again.epd < again.epd_bicubic


def test_the_command_takes_a_pipeline_and_a_student(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # pictures of 16 pixels are too small for EPD
    pipe = tiny.stable_diffusion("v_prediction")
    pipe.save_pretrained(tmp_path / "teacher")
    student = networks_for(denoiser_from_pipeline(pipe), LoraSettings(2, 2.0, ("to_q", "to_v"))).student
    for parameter in student.parameters_of_view():  # type: ignore[attr-defined]
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    save_distilled(student, tmp_path / "student", FewStepSampling(times=((999.0,),), prediction="v"))
    words = ["evaluate", "applications", "--pipeline", str(tmp_path / "teacher"), "--count", "2", "--scale", "2"]
    report = tmp_path / "scores.json"
    assert main([*words, "--student", str(tmp_path / "student"), "--json", str(report)]) == 0
    scores = json.loads(report.read_text())
    assert scores["run"]["image_size"] == 2 * tiny.SIZE
    assert scores["inpainting"]["psnr_outside"] == 100.0
    out = capsys.readouterr().out
    assert "editing: colour changed in" in out and "no EPD: timm" in out
    plain = load_one_step_model(str(tmp_path / "teacher"), None)
    adapted = load_one_step_model(str(tmp_path / "teacher"), str(tmp_path / "student"))
    assert plain.denoiser.schedule.terminal_t == adapted.denoiser.schedule.terminal_t == 999.0
    x_T, condition = torch.randn(1, 4, 8, 8), plain.condition_of(["a red circle"])
    first, second = (model.denoiser.predict(x_T, 999.0, condition).x_0 for model in (plain, adapted))
    assert not torch.allclose(first, second)
    save_distilled(student, tmp_path / "two", FewStepSampling(times=((999.0, 499.0),), prediction="v"))
    with pytest.raises(ValueError, match="trained for 2 steps"):
        load_one_step_model(str(tmp_path / "teacher"), str(tmp_path / "two"))
