"""Pairs of a pipeline are what its own text and network give, and another pipeline's lie beside them."""

from __future__ import annotations

import torch
from tiny_flow import pipeline, tiny_tokenizer
from torch.testing import assert_close

from distill.condition import Condition
from distill.methods.pairs import TeacherSolver
from distill.models import denoiser_from_pipeline
from layton.data.prompts import PromptFile, SceneCaptions
from layton.distillation.pair_data import TeacherPairs
from layton.distillation.pairs import PairPlan, captions_digest


def test_pairs_of_a_pipeline_follow_its_prompts_and_guidance(tmp_path, monkeypatch):
    pipe = pipeline(tiny_tokenizer())
    pipe.save_pretrained(tmp_path / "model")
    solver = TeacherSolver("ddim", 3, guidance_scale=2.0)

    def pairs(rule: TeacherSolver = solver) -> TeacherPairs:
        return TeacherPairs(
            SceneCaptions(length=3),
            pipeline=str(tmp_path / "model"),
            folder=str(tmp_path / "pairs"),
            solver=rule,
            batch_size=2,
        )

    source = pairs()
    assert len(source) == 3
    sample = source.sample(1, seed=0)
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.no_grad():
        text, empty = pipe.encode_prompt([sample["caption"]], **options)
    latent = solver.solve(
        denoiser_from_pipeline(pipe), sample["noise"][None], Condition(embeds=text), Condition(embeds=empty)
    )
    # made in bfloat16 where that is quicker
    assert (sample["latent"].float() - latent[0]).norm() < 0.02 * latent[0].norm()
    with monkeypatch.context() as patch:  # read, not made: the teacher is not even opened
        patch.setattr("layton.distillation.pair_data.open_pipeline", None)
        assert_close(pairs().sample(1, seed=3)["latent"], sample["latent"], rtol=0, atol=0)
    # Of another rule, or another teacher, they go beside the first: these stay what they are.
    guided = pairs(TeacherSolver("ddim", 3, guidance_scale=3.0))
    assert not torch.equal(guided.sample(1, seed=0)["latent"], sample["latent"])
    assert_close(pairs().sample(1, seed=3)["latent"], sample["latent"], rtol=0, atol=0)
    assert len(list(tmp_path.glob("pairs-*"))) == 1
    away = TeacherPairs(
        SceneCaptions(length=3),
        pipeline=str(tmp_path / "model"),
        folder=str(tmp_path / "away"),
        solver=solver,
        negative_prompt="a star",
        batch_size=2,
    )
    assert not torch.allclose(away.sample(1, seed=0)["latent"], sample["latent"], atol=1e-2)
    with torch.no_grad():
        next(pipe.unet.parameters()).add_(1.0)
    pipe.save_pretrained(tmp_path / "model")
    assert not torch.equal(pairs().sample(1, seed=0)["latent"], sample["latent"])
    assert len(list(tmp_path.glob("pairs-*"))) == 2


def test_any_change_of_a_prompts_file_is_another_set(tmp_path):
    lines = [f"star {number}" for number in range(700)]
    plan = PairPlan(700, (4, 8, 8), TeacherSolver("ddim", 3), 0, 64, 8)

    def digest(changed: int | None) -> str:
        path = tmp_path / "prompts.txt"
        path.write_text("\n".join(f"{line}!" if number == changed else line for number, line in enumerate(lines)))
        return captions_digest(PromptFile(str(path)), plan)

    assert len({digest(changed) for changed in (None, *range(0, 700, 7))}) == 101
