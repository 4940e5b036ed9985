"""Committed run files: they parse, and what is changed in them is what was meant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from distill.methods.pairs import TeacherSolver
from layton.cli import main
from layton.commands.reproduce import CLAIMS, find_claim_configs
from layton.ldm.text import build_text_encoder, build_tokenizer, tell_places
from layton.reproduce import hipa, instaflow, layton_claim, mlcm, mlcm_ablation, scott, scott_ablation
from layton.reproduce.claim import SCALE_FILE, Arm, Context, Pairs, Phase, Scale, ScaleName, Stage
from layton.reproduce.run_files import assign, read_run
from layton.reproduce.training import TEACHER_PLACE, resolved_run
from layton.run.files import moved, set_scenes

CONFIGS = Path(__file__).parents[3] / "configs" / "reproduce"
ARMS = {
    "mlcm": mlcm.CLAIM.arms,
    "scott": scott.CLAIM.arms,
    "instaflow": instaflow.CLAIM.arms,
    "hipa": hipa.CLAIM.arms,
    "layton": (layton_claim.METHOD, layton_claim.BASELINE),
    "mlcm_ablation": tuple(setting.arm(4) for setting in mlcm_ablation.SETTINGS),
    "scott_ablation": tuple(setting.arm(2) for setting in scott_ablation.SETTINGS),
}
STAGES = [(claim, arm, stage) for claim, arms in ARMS.items() for arm in arms for stage in arm.stages]


def context(claim: str, out: Path, scale: ScaleName = "full") -> Context:
    folder = CONFIGS / claim
    return Context(out, folder, Scale.read(folder / SCALE_FILE, scale))


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_claim_has_all_scales(claim: str) -> None:
    folder = find_claim_configs(claim)
    full, small, quick = (Scale.read(folder / SCALE_FILE, name) for name in get_args(ScaleName))
    assert full.images == 5000 and full.seeds == (0, 1, 2) and full.per_task * 6 == 300 and full.images_per_prompt == 4
    assert quick.budget <= full.budget / 10 and quick.images < small.images < full.images
    assert quick.budget <= small.budget <= full.budget


@pytest.mark.parametrize(("claim", "arm", "stage"), STAGES, ids=lambda part: getattr(part, "name", part))
def test_resolved_run_files_parse(tmp_path: Path, claim: str, arm: Arm, stage: Stage) -> None:
    measurement = context(claim, tmp_path, "quick")
    places = {TEACHER_PLACE: tmp_path / "teacher", "runs/tokenizer_long/export": tmp_path / "tokenizer"}
    run = resolved_run(arm, stage, measurement, places, image_size=64)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    assert main(["--debug", "fit", "--config", str(path), "--run_dir", str(tmp_path), "--print_config"]) == 0
    assert TEACHER_PLACE not in path.read_text() and "runs/cache" not in path.read_text()
    (stop,) = [c for c in run["trainer"]["callbacks"] if c["class_path"].endswith("BudgetStop")]
    share = measurement.scale.budget * arm.budget * stage.share
    assert stop["init_args"]["forwards"] == share and 0 <= stop["init_args"]["prepaid"] <= share
    assert run["trainer"]["max_steps"] == run["trainer"]["max_epochs"] == -1


def test_straightness_is_measured_of_a_flow_that_had_enough(tmp_path: Path) -> None:
    for name in get_args(ScaleName):
        measurement = context("instaflow", tmp_path, name)
        arm = instaflow.reflow_alone(measurement.scale)
        own = instaflow.REFLOW.share * measurement.scale.budget
        assert (arm is None) == (name == "quick" or own >= instaflow.STRAIGHT_FORWARDS)
        if arm is None:
            continue
        run = resolved_run(arm, arm.stages[0], measurement, {TEACHER_PLACE: tmp_path}, image_size=64)
        stop = run["trainer"]["callbacks"][0]["init_args"]
        assert stop["forwards"] == pytest.approx(instaflow.STRAIGHT_FORWARDS)
        pairs = run["data"]["init_args"]["train"][0]["init_args"]["num_pairs"]
        assert stop["prepaid"] == pytest.approx(0.4 * stop["forwards"], rel=1e-3) == pairs * 20


@pytest.mark.parametrize("claim", ARMS)
def test_arms_of_a_claim_differ_in_what_they_claim_only(claim: str) -> None:
    files = [read_run(CONFIGS / claim / stage.config) for arm in ARMS[claim] for stage in arm.stages]
    assert {run["seed_everything"] for run in files} == {0}
    assert {run["model"]["class_path"] for run in files} == {files[0]["model"]["class_path"]}
    roles = [arm.role for arm in ARMS[claim]]
    if claim.endswith("_ablation"):
        assert set(roles) == {"method"}
        return
    assert roles.count("method") == 1 and "baseline" in roles
    if claim in ("mlcm", "scott"):
        parts = [{k: v for k, v in run["model"]["init_args"].items() if "critic" not in k} for run in files]
        for part in parts:
            part.pop("method")
        if claim == "mlcm":  # rate and schedule were chosen on validation scenes for each: LCM bears no higher rate
            for part in parts:
                part.pop("lr_scheduler", None)
                part["optimizer"]["init_args"].pop("lr")
        assert parts[0] == parts[1]  # adapter, optimizer, clipping
    budgets = {arm.budget for arm in ARMS[claim] if arm.stages}
    assert budgets == {1.0} or claim == "hipa"


@pytest.mark.parametrize(("claim", "arm", "stage"), STAGES, ids=lambda part: getattr(part, "name", part))
def test_smaller_scales_train_alike_without_validation_and_pictures(
    tmp_path: Path, claim: str, arm: Arm, stage: Stage
) -> None:
    full, small = (
        resolved_run(arm, stage, context(claim, tmp_path, name), {TEACHER_PLACE: tmp_path}, image_size=32)["trainer"]
        for name in ("full", "small")
    )
    assert small["limit_val_batches"] == 0
    lengths = ("val_check_interval", "gradient_clip_val", "accumulate_grad_batches", "precision")
    assert [small.get(name) for name in lengths] == [full.get(name) for name in lengths]
    ours, theirs = (callbacks_of(trainer) for trainer in (small, full))
    assert ours[1:] == [callback for callback in theirs[1:] if "PictureGrid" not in callback["class_path"]]
    assert ("BudgetStop" in ours[0]["class_path"]) and len(ours) >= 2


def callbacks_of(trainer: dict[str, Any]) -> list[dict[str, Any]]:
    callbacks: list[dict[str, Any]] = trainer["callbacks"]
    return callbacks


def test_hipa_spends_a_tenth_with_its_last_step() -> None:
    step = 209.0  # forward-equivalents of one step of 16 on the embedded model, losses in images included
    for name in ("full", "small"):
        budget = context("hipa", Path(), name).scale.budget
        assert hipa.METHOD.budget * budget + step <= budget / 10 and hipa.METHOD.budget >= 0.09


def test_pairs_and_phases_come_out_of_the_budget(tmp_path: Path) -> None:
    measurement = context("instaflow", tmp_path)
    stage = instaflow.DIRECT.stages[0]
    run = resolved_run(instaflow.DIRECT, stage, measurement, {TEACHER_PLACE: tmp_path}, image_size=256)
    source = run["data"]["init_args"]["train"][0]["init_args"]
    budget, share, each = measurement.scale.budget, stage.pairs.share, TeacherSolver(**source["solver"]).evaluations()
    assert each == stage.pairs.forwards
    assert source["num_pairs"] == source["prompts"]["init_args"]["length"] == budget * share // each
    assert run["trainer"]["callbacks"][0]["init_args"]["prepaid"] == pytest.approx(share * budget, rel=1e-3)
    rest = (1 - share) * budget
    steps = rest / (run["data"]["init_args"]["batch_size"] * 3)  # that could be trained if the losses cost nothing
    assert run["model"]["init_args"]["method"]["init_args"]["perceptual_start"] == pytest.approx(0.6 * steps, rel=1e-2)
    assert source["folder"].startswith(str(tmp_path / "arms" / "direct"))
    assert Phase("x", 5.0).step(1000, 10) == 20 and Phase("x", 5.0).step(1, 10) == 1 and Pairs(0.5, 50).count(10) == 1


def test_moved_assign_and_size() -> None:
    places = {"runs/a": Path("/x"), "runs/a/b": Path("/y")}
    assert moved({"p": ["runs/a/c", "runs/a/b/d", "runs/ab", 1]}, places) == {"p": ["/x/c", "/y/d", "runs/ab", 1]}
    run: dict[str, Any] = {"a": [{"b": {}}]}
    assign(run, "a.0.b.c", 5)
    assert run == {"a": [{"b": {"c": 5}}]}
    for option in ("a.1.b", "x.y", "a.b.c"):
        with pytest.raises(ValueError, match="no place"):
            assign(run, option, 1)
    source, captions = "layton.data.sources.ScenesSource", "layton.data.prompts.SceneCaptions"
    scenes: dict[str, Any] = {"t": [{"class_path": source, "init_args": {"size": 8}}, {"size": 9}]}
    scenes["u"] = {"class_path": captions}
    set_scenes(scenes, size=32, places=False)
    assert scenes["t"] == [{"class_path": source, "init_args": {"size": 32}}, {"size": 9}]
    assert scenes["u"]["init_args"] == {}
    set_scenes(scenes, size=None, places=True)
    assert scenes["t"][0]["init_args"] == {"size": 32, "places": 1.0} and scenes["u"]["init_args"] == {"places": 1.0}


def test_a_teacher_that_hears_places_is_told_them(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["a red star"])
    tokenizer.save_pretrained(tmp_path / "plain" / "tokenizer")
    tell_places(tokenizer, build_text_encoder(tokenizer, width=8, depth=1))
    tokenizer.save_pretrained(tmp_path / "told" / "tokenizer")
    for name, places in (("plain", None), ("told", 1.0)):
        # The one learns from latents of scenes, the other from captions alone
        for claim, arm in (("mlcm", mlcm.BASELINE), ("instaflow", instaflow.DIRECT)):
            teacher = {TEACHER_PLACE: tmp_path / name}
            run = resolved_run(arm, arm.stages[0], context(claim, tmp_path), teacher, image_size=32)
            source = run["data"]["init_args"]["train"][0]["init_args"]
            assert source.get("prompts", {"init_args": source})["init_args"].get("places") == places


def test_shares_of_an_arm_are_its_whole_budget() -> None:
    with pytest.raises(ValueError, match="share"):
        Arm("x", "method", (Stage("a", "a.yaml", share=0.5),))
    with pytest.raises(ValueError, match="scale 'full'"):
        Scale.read(Path(sys.executable).parent / "none.yaml", "full")
