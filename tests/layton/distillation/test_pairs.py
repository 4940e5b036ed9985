"""Sets of pairs: the same bytes however they were made, rebuilt from seeds, refused when something else made them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from distill.condition import Condition
from distill.methods.pairs import TeacherSolver
from distill.schedules import VPSchedule
from distill.toy import GaussianMixtureDenoiser
from layton.data.cache import CacheMismatchError
from layton.data.sources import SampleSource
from layton.distillation.pairs import PairPlan, PairSource, generate_pairs, noise_of, rebuild_pairs

SHAPE = (2, 2, 2)
PLAN = PairPlan(10, SHAPE, TeacherSolver("ddim", 3), seed=5, part_size=4, batch_size=3, keep=("codes",))


class Prompts(SampleSource):
    """Six captioned samples with two codes each."""

    def __len__(self) -> int:
        return 6

    def sample(self, index: int, *, seed: int) -> dict[str, Any]:
        return {"key": f"p/{index}", "caption": f"prompt {index}", "codes": torch.tensor([index, index + 1])}


def teacher() -> GaussianMixtureDenoiser:
    means = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    return GaussianMixtureDenoiser(means, 0.3, VPSchedule())


def condition_of(batch: Any) -> Condition:
    return Condition(pooled=batch["codes"].float())


def make(folder: Path, plan: PairPlan = PLAN, **options: Any) -> PairSource | None:
    return generate_pairs(teacher(), Prompts(), condition_of, folder, plan, teacher_id="t", **options)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_a_pair_is_its_seeds_noise_and_what_the_teacher_makes_of_it(tmp_path):
    source = make(tmp_path)
    assert source is not None and len(source) == 10
    sample = source.sample(7)
    assert sample["key"] == "p/1~1" and sample["caption"] == "prompt 1" and sample["codes"].tolist() == [1, 2]
    assert_close(sample["noise"], noise_of([int(sample["seed"])], SHAPE)[0], rtol=0, atol=0)
    latent = PLAN.solver.solve(teacher(), sample["noise"][None], Condition())
    assert_close(sample["latent"].float(), latent[0], rtol=2e-3, atol=2e-3)
    assert len({source.sample(i)["key"] for i in range(10)}) == 10
    assert len({int(source.sample(i)["seed"]) for i in range(10)}) == 10


def test_latents_can_be_rebuilt_from_what_is_stored(tmp_path):
    source = make(tmp_path)
    assert source is not None
    rebuilt = rebuild_pairs(source, teacher(), condition_of, [0, 9])
    stored = torch.stack([source.sample(i)["latent"] for i in (0, 9)])
    assert_close(rebuilt.half(), stored, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("lost", ["part-00001.safetensors", "cache.json"])
def test_a_run_that_was_killed_ends_with_the_same_bytes(tmp_path, lost):
    make(tmp_path)
    wanted = digests(tmp_path)
    before = (tmp_path / "part-00000.safetensors").stat().st_mtime_ns
    (tmp_path / lost).unlink()
    make(tmp_path)
    assert digests(tmp_path) == wanted
    assert (tmp_path / "part-00000.safetensors").stat().st_mtime_ns == before  # not made again


def test_a_killed_run_leaves_no_set(tmp_path):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, progress=stop)
    with pytest.raises(ValueError, match="no finished"):
        PairSource(str(tmp_path))


def test_two_workers_make_what_one_makes(tmp_path):
    make(tmp_path / "one")
    assert make(tmp_path / "two", worker=1, num_workers=2) is None
    finished = make(tmp_path / "two", worker=0, num_workers=2)
    assert finished is not None
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 6},
        {"num_pairs": 9},
        {"solver": TeacherSolver("ddim", 4)},
        {"solver": TeacherSolver("ddim", 3, 2.0)},
        {"keep": ()},
        {"batch_size": 2},
    ],
)
def test_parts_of_another_plan_are_refused(tmp_path, changes):
    make(tmp_path)
    values = {name: getattr(PLAN, name) for name in PLAN.__slots__} | changes
    with pytest.raises(CacheMismatchError):
        make(tmp_path, PairPlan(**values))


def test_parts_of_another_teacher_are_refused(tmp_path):
    make(tmp_path)
    with pytest.raises(CacheMismatchError, match="teacher"):
        generate_pairs(teacher(), Prompts(), condition_of, tmp_path, PLAN, teacher_id="other")


def test_parts_that_do_not_say_what_made_them_are_refused(tmp_path):
    make(tmp_path)
    (tmp_path / "plan.json").unlink()
    with pytest.raises(CacheMismatchError, match=r"plan\.json"):
        make(tmp_path)


def test_a_damaged_part_is_named(tmp_path):
    make(tmp_path)
    path = tmp_path / "part-00002.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="part-00002"):
        make(tmp_path)


def test_latents_that_are_not_finite_stop_the_run(tmp_path):
    broken = teacher()
    broken.means.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        generate_pairs(broken, Prompts(), condition_of, tmp_path, PLAN, teacher_id="t")
    assert not list(tmp_path.glob("*.safetensors"))


def test_progress_and_the_manifest_count_every_pair(tmp_path):
    seen: list[tuple[int, int]] = []
    make(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 10), (8, 10), (10, 10)]
    manifest = json.loads((tmp_path / "cache.json").read_text())
    assert sum(part["samples"] for part in manifest["parts"]) == 10


def test_nonsense_is_refused(tmp_path):
    with pytest.raises(ValueError, match="worker"):
        make(tmp_path, worker=2, num_workers=2)
    with pytest.raises(ValueError, match="num_pairs"):
        PairPlan(0, SHAPE)
