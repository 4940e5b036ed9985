"""`layton reproduce` on a tiny teacher: whole measurements, resumed ones, refused ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from reproduce_tools import CONFIGS, save_teacher, save_tokenizer, tiny_configs
from safetensors.torch import save_file

from layton.cli import main
from layton.reproduce import mlcm_ablation, scott_ablation
from layton.reproduce.budget import IMAGES
from layton.reproduce.evaluation import Evaluator

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:loss spike:UserWarning"),  # of random networks
]
QUICK_LABEL = "quick, 5 images: not the figure of record"
MOST = {"lcm": 2 * 6, "mlcm": 2 * 20}  # forward-equivalents that one step of two samples costs at most


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def reproduce(claim: str, teacher: Path, *more: str) -> int:
    return main(["--debug", "reproduce", claim, "--quick=true", "--out=out", "--pipeline", str(teacher), *more])


def test_mlcm_against_lcm_and_again_after_an_interruption(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_configs(tmp_path, "mlcm", budget=40)
    with monkeypatch.context() as patch:

        def give_up(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(Evaluator, "scene_scores", give_up)
        assert reproduce("mlcm", teacher, "--count=5") == 130  # the first arm is trained, and its features drawn
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/**/*.safetensors")}
    assert sum("export" in path.parts for path in done) == 1 and any("features" in path.name for path in done)
    assert reproduce("mlcm", teacher, "--count=5", "--json=result.json") == 0  # claims that do not hold are results
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    result = json.loads(Path("result.json").read_text())
    assert result == json.loads(Path("out/result.json").read_text())
    for arm, most in MOST.items():
        made = result["arms"][arm]
        assert 40 <= made["forwards"] < 40 + most, arm
        assert made["stages"]["train"]["steps"] >= 2 or arm == "mlcm"
    assert set(result["figures"]) == {"mlcm-2", "mlcm-4", "mlcm-8", "lcm-4", "teacher-25"}
    assert len(result["figures"]["lcm-4"]["sceneval"]["overall"]) == 2
    assert result["figures"]["mlcm-4"]["num_images"] == 5 and result["label"] == QUICK_LABEL
    assert len(result["checks"]) == 3 and result["protocol"]["teacher"] and result["versions"]["diffusers"]
    shown = capsys.readouterr()
    assert QUICK_LABEL in shown.out and "floor at least 3" in shown.out and "trained already" in shown.err
    # another measurement does not mix with this one
    scale = yaml.safe_load((folder / "scale.yaml").read_text())
    scale["quick"]["budget"] = 50
    (folder / "scale.yaml").write_text(yaml.safe_dump(scale))
    with pytest.raises(ValueError, match="another configs, scale"):
        reproduce("mlcm", teacher)


def test_an_ablation_table_has_a_row_for_every_part(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_configs(tmp_path, "scott_ablation", budget=30, seeds=[0])
    monkeypatch.setattr(scott_ablation, "SETTINGS", [s for s in scott_ablation.SETTINGS if s.name in ("ode", "eta")])
    assert reproduce("scott_ablation", teacher, "--json=result.json") == 0
    result = json.loads(Path("result.json").read_text())
    assert [set(row["ours"]) for row in result["rows"]] == 2 * [{"SceneEval", "FD-effnet", "coverage"}]
    assert result["rows"][0]["ours"]["FD-effnet"] == result["figures"]["ode-2"]["fd_effnet"] > 0
    solvers = [yaml.safe_load(Path(f"out/arms/{name}/train/run.yaml").read_text()) for name in ("ode", "eta")]
    solvers = [run["model"]["init_args"]["method"]["init_args"]["solver"] for run in solvers]
    assert solvers == [{"kind": "ddim"}, {"kind": "ddim", "eta": 0.2}]
    assert "an ODE solver in place of the SDE: SceneEval" in capsys.readouterr().out


def test_rows_whose_networks_are_not_there_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needing = {setting.name: setting for setting in mlcm_ablation.SETTINGS if setting.needs}
    assert set(needing) == {"perceptual", "preference"} and all(setting.missing for setting in needing.values())
    (tmp_path / needing["preference"].needs).mkdir(parents=True)
    assert not needing["preference"].missing
    names = []
    for value in (0.0, 1.0):  # trained anew, a network has a row of its own
        save_file({"weight": torch.full((1,), value)}, tmp_path / needing["preference"].needs / "model.safetensors")
        names.append(needing["preference"].arm(4).name)
    assert names[0] != names[1] and all(name.startswith("preference-") for name in names)
    for setting in needing.values():
        run, option, data = setting.made_by.split()
        assert option == "--data" and all((CONFIGS.parent / path).is_file() for path in (run, data))


def test_terms_of_the_second_stage_begin_with_it_and_missing_rows_are_told(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_configs(tmp_path, "mlcm_ablation", budget=110, seeds=[0])
    kept = [setting for setting in mlcm_ablation.SETTINGS if setting.name in ("perceptual", "matching")]
    monkeypatch.setattr(mlcm_ablation, "SETTINGS", kept)
    assert reproduce("mlcm_ablation", teacher, "--json=result.json") == 0
    result = json.loads(Path("result.json").read_text())
    assert [row["name"] for row in result["rows"]] == [kept[1].title]
    assert "no runs/latent_perceptual/export: layton fit" in result["not_measured"][0]
    method = yaml.safe_load(Path("out/arms/matching/train/run.yaml").read_text())["model"]["init_args"]["method"]
    start = method["init_args"]["refinement"]["start"]
    assert method["init_args"]["extras"][0]["init_args"]["start"] == start == 2
    # the budget lasts into the second stage
    assert result["arms"]["matching"]["stages"]["train"]["steps"] > start


def test_one_scale_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "mlcm", "--quick=true", "--scale=small"]) == 2
    assert "--quick is --scale quick" in capsys.readouterr().err


def test_what_is_missing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for claim in ("mlcm", "layton", "laytongen"):
        arguments = ["--quick=true", "--out=out", "--pipeline=empty", "--tokenizer=empty"]
        assert main(["reproduce", claim, *arguments]) == 1
        error = capsys.readouterr().err
        assert ("this claim needs" in error and "--pipeline" in error) or "--tokenizer" in error
    assert main(["reproduce", "nothing"]) == 2
    assert main(["reproduce", "mlcm", "--photographs", "x"]) == 2
    assert main(["reproduce", "mlcm", "--count", "1"]) == 1
    assert "images=1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("claim", "budget"), [("scott", 60), ("instaflow", 1200), ("hipa", 4000)])
def test_other_claims_about_students(tmp_path: Path, teacher: Path, claim: str, budget: float) -> None:
    tiny_configs(tmp_path, claim, budget=budget, seeds=[0])
    assert reproduce(claim, teacher) == 0
    result = json.loads(Path("out/result.json").read_text())
    shares = {name: arm["forwards"] / budget for name, arm in result["arms"].items() if arm["forwards"]}
    for name, share in shares.items():
        wanted = 0.095 if name.startswith("hipa") else 1.0
        over = sum(stage["last_step"] for stage in result["arms"][name]["stages"].values()) / budget
        assert wanted <= share < wanted + over + 1e-9, name
    if claim == "instaflow":
        accounts = result["arms"]["instaflow"]["stages"]["one_step"]["accounts"]
        assert accounts["data"] == 150 and accounts[IMAGES] > 0
        assert not Path("out/arms/reflow_alone").exists()  # a quick measurement takes the method's own flow


@pytest.mark.slow
def test_layton_against_its_diffusion_decoder(tmp_path: Path, teacher: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    tiny_configs(tmp_path, "layton", budget=60)
    assert reproduce("layton", teacher, "--tokenizer", str(tokenizer)) == 0
    result = json.loads(Path("out/result.json").read_text())
    assert set(result["figures"]) == {"diffusion-25", "consistency-1", "consistency-2", "consistency-3"}
    assert all(arm["forwards"] >= 60 for arm in result["arms"].values())
    assert IMAGES in result["arms"]["consistency"]["stages"]["pixels"]["accounts"]
    assert len(result["checks"]) == 6 and not result["met"] and result["not_measured"]  # no photographs
