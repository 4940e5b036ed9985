"""The distillation task by hand: what is counted, kept, skipped and given out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_pipelines as tiny
import torch
from diffusers import AutoencoderKL
from lightning.pytorch import Callback, Trainer

from distill.adapters import STUDENT, LoraSettings, adapter_state_dict
from distill.method import MethodOutput
from distill.methods.adversarial import Adversarial
from distill.methods.distribution_matching import DistributionMatching
from distill.methods.lcm import LCM
from distill.methods.mlcm import MLCM, Progression
from distill.methods.one_step import OneStepDistillation
from distill.methods.scott import SCott
from distill.moves import SolverSettings
from layton.callbacks import SafeCheckpoint
from layton.data.module import ImageDataModule
from layton.data.prompts import SceneCaptions
from layton.data.sources import SampleSource, ScenesSource
from layton.distillation.distilled import LORA_NAME, load_distilled, network_of, pipeline_arguments
from layton.distillation.instaflow import InstaFlowPipeline
from layton.distillation.pair_data import TeacherPairs
from layton.folder import load_tensors
from layton.ldm.cache import CachedLatents
from layton.ldm.prompt_cache import CachedPrompts
from layton.ldm.teacher import open_pipeline
from layton.tasks.critics import CriticSettings
from layton.tasks.distill import DistillTask
from layton.tasks.guard import NonFiniteError
from layton.tasks.latent_score import sliced_wasserstein

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*"),
]
RANK = LoraSettings(rank=2, targets=("to_q", "to_v", "conv1"))


class Latents(SampleSource):
    def __len__(self) -> int:
        return 6

    def sample(self, index: int, *, seed: int) -> Mapping[str, Any]:
        latent = torch.randn(4, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(index))
        return {"latent": latent, "caption": f"{index} red stars", "key": f"toy/{index}"}


class Longer(Latents):
    def sample(self, index: int, *, seed: int) -> Mapping[str, Any]:
        return {**super().sample(index, seed=seed), "caption": "a blue ring above a green cross"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipe")
    tiny.build("sd").save_pretrained(path)
    return path


def make(folder: Path, method: Any, **options: Any) -> DistillTask:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"adapter": RANK, "reference_steps": 2, "preview_steps": (1, 2)}
    return DistillTask(str(folder), method, optimizer=partial(torch.optim.AdamW, lr=1e-2), **(settings | options))


def fit(task: DistillTask, steps: int, root: Path, *callbacks: Callback, **options: Any) -> Trainer:
    trainer = Trainer(
        default_root_dir=root,
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, SafeCheckpoint) for c in callbacks),
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(task, ImageDataModule(Latents(), validation=Latents(), batch_size=2, eval_batch_size=3))
    return trainer


def weights(task: DistillTask, name: str = "student") -> dict[str, torch.Tensor]:
    network = task.networks.teacher.denoiser
    return {key: value.cpu().clone() for key, value in adapter_state_dict(network, name).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_forwards_are_counted_and_checkpoints_hold_only_what_is_learnt(folder: Path, tmp_path: Path) -> None:
    task = make(folder, LCM(target_decay=0.9))
    start = weights(task)
    trainer = fit(task, 3, tmp_path, SafeCheckpoint(every_n_train_steps=3))
    assert task.budget.total == 3 * 2 * 6  # steps x batch x (student 3, guided teacher 2, target 1); validation is free
    assert not same(start, weights(task))
    for key, value in weights(task, "target").items():
        assert not torch.equal(value, start[key]) or torch.equal(weights(task)[key], start[key])
        assert (value - start[key]).norm() <= (weights(task)[key] - start[key]).norm() + 1e-6  # the average lags
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    saved = torch.load(path, weights_only=True)
    assert saved["state_dict"] and all(".lora_" in name for name in saved["state_dict"])
    trained = sum(p.numel() for p in task.trainable_parameters())
    assert sum(value.numel() for value in saved["state_dict"].values()) == 2 * trained  # student and target
    assert set(trainer.callback_metrics) >= {"train/loss", "val/score", "val/score_1", "val/score_2", "val/loss"}
    other = make(folder, LCM(target_decay=None))
    with pytest.raises(ValueError, match="other weights"):
        other.on_load_checkpoint(saved)


def test_a_student_begins_with_an_earlier_one(folder: Path, tmp_path: Path) -> None:
    first = make(folder, LCM(target_decay=None), adapter=replace(RANK, alpha=4.0))
    for parameter in first.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    first.export(tmp_path / "first")
    larger = make(
        folder, LCM(target_decay=0.9), adapter=replace(RANK, rank=4, alpha=4.0), initial=str(tmp_path / "first")
    )
    inputs = first.distill_batch(
        {"caption": ["a red star", "two rings"], "latent": torch.zeros(2, *first.latent_shape)}
    )
    x_t = torch.randn(2, *first.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = first.student(x_t, torch.full((2,), 500.0), inputs.condition)
        for network in (larger.student, larger.networks.target):
            torch.testing.assert_close(network(x_t, torch.full((2,), 500.0), inputs.condition), wanted)
        assert not torch.allclose(larger.teacher(x_t, torch.full((2,), 500.0), inputs.condition), wanted)
    with pytest.raises(ValueError, match="does not fit into"):
        make(folder, LCM(), adapter=replace(RANK, rank=1), initial=str(tmp_path / "first"))
    with pytest.raises(ValueError, match="which this student could begin with"):
        make(folder, LCM(), adapter=None, initial=str(tmp_path / "first"))
    whole = make(folder, LCM(target_decay=None), adapter=None)
    for parameter in whole.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    whole.export(tmp_path / "whole")
    again = make(folder, LCM(target_decay=0.9), adapter=None, initial=str(tmp_path / "whole"))
    for network in (again.student, again.networks.target):
        assert same(network_of(whole.student).state_dict(), network_of(network).state_dict())


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_frozen_weights_may_be_of_half_the_bytes(kind: str, tmp_path: Path) -> None:
    tiny.build(kind).save_pretrained(tmp_path / "teacher")
    method = MLCM(guidance_scale=1.5 if kind != "flux" else 1.0, progression=Progression((2,), (0,)))
    task = make(tmp_path / "teacher", method, frozen_dtype="bfloat16", preview_steps=(1,), latent_size=tiny.SIZE)
    assert {p.dtype for p in task.trainable_parameters()} == {torch.float32}
    frozen = [p.dtype for p in task.networks.teacher.denoiser.parameters() if not p.requires_grad]
    assert frozen.count(torch.bfloat16) > len(frozen) / 2
    start = weights(task)
    fit(task, 2, tmp_path)
    assert not same(start, weights(task)) and all(value.isfinite().all() for value in weights(task).values())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_so_may_the_teacher_of_a_student_of_all_weights(folder: Path, tmp_path: Path, kind: str) -> None:
    critic = CriticSettings(kind=kind, lora=RANK)
    options = {"adapter": None, "critic": critic, "critic_optimizer": partial(torch.optim.SGD, lr=1e-3)}
    whole, half = (make(folder, scott(), frozen_dtype=dtype, **options) for dtype in ("float32", "bfloat16"))
    assert {p.dtype for p in half.teacher.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for encoder in half.prompts.encoders for p in encoder.parameters()} == {torch.bfloat16}
    learning = [*half.trainable_parameters(), *half.critic_parameters(), *half.networks.target.parameters()]
    assert {p.dtype for p in learning} == {torch.float32}
    start = {name: value.clone() for name, value in network_of(half.student).state_dict().items()}
    assert same(start, network_of(whole.student).state_dict())  # not rounded
    fit(half, 2, tmp_path)
    learnt = network_of(half.student).state_dict()
    assert not same(start, learnt) and all(bool(value.isfinite().all()) for value in learnt.values())


def test_a_student_can_be_exported_in_half_the_bytes(folder: Path, tmp_path: Path) -> None:
    task = make(folder, LCM(target_decay=None), export_half=True)
    for parameter in task.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    task.export(tmp_path)
    stored = load_tensors(tmp_path / LORA_NAME)
    assert stored and {value.dtype for value in stored.values()} == {torch.float16}
    pipe = tiny.build("sd")
    load_distilled(pipe, tmp_path)
    loaded = adapter_state_dict(pipe.unet, "distilled")
    own = adapter_state_dict(network_of(task.student), STUDENT)
    assert loaded.keys() == own.keys()
    assert all(torch.equal(loaded[name], value.half().float()) for name, value in own.items())


def test_a_student_that_hears_the_guidance_scale(folder: Path, tmp_path: Path) -> None:
    method = LCM(condition_on_guidance=True, guidance_range=(3.0, 7.0), target_decay=0.9)
    with pytest.raises(ValueError, match="train all weights"):
        make(folder, method)
    task = make(folder, method, adapter=None)
    teacher = {name: value.clone() for name, value in task.teacher.state_dict().items()}
    trainer = fit(task, 2, tmp_path)
    assert same(teacher, task.teacher.state_dict())
    assert task.budget.total == 2 * 2 * 6 and trainer.global_step == 2
    task.export(tmp_path / "export")
    pipe = tiny.build("sd")
    sampling = load_distilled(pipe, tmp_path / "export")
    assert sampling.guidance == 5.0 and pipe.unet.config.time_cond_proj_dim == 256
    inputs = task.distill_batch({"caption": ["a red star"], "latent": torch.zeros(1, 4, tiny.SIZE, tiny.SIZE)})
    x_T = torch.randn(1, 4, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(3))
    arguments = pipeline_arguments(sampling, 1)
    drawn = {
        scale: pipe(
            prompt_embeds=inputs.condition.embeds,
            negative_prompt_embeds=inputs.null.embeds,
            latents=x_T.clone(),
            output_type="latent",
            **(arguments | {"guidance_scale": scale}),
        ).images
        for scale in (5.0, 3.0)
    }
    with torch.no_grad():
        own = sampling.sample(task.student.eval(), x_T, inputs.condition, num_steps=1, generator=torch.Generator())
    assert torch.allclose(drawn[5.0], own, atol=1e-5)
    assert not torch.allclose(drawn[3.0], own, atol=1e-4)


def test_a_student_of_all_weights_becomes_the_next_teacher(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter=null"):
        make(folder, LCM(target_decay=None), export_pipeline=True)
    task = make(folder, LCM(target_decay=None), adapter=None, export_pipeline=True)
    fit(task, 1, tmp_path)
    task.export(tmp_path / "export")
    parts = {p.name for p in folder.iterdir()} | {"few_step.json"}
    assert {path.name for path in (tmp_path / "export" / "pipeline").iterdir()} == parts
    with pytest.raises(ValueError, match=r"no flow: see few_step\.json"):
        InstaFlowPipeline.from_pretrained(tmp_path / "export" / "pipeline")
    config = tmp_path / "export" / "pipeline" / "vae" / "config.json"
    before = (folder / "vae" / "config.json").read_text()
    config.write_text("{}")
    assert (folder / "vae" / "config.json").read_text() == before
    config.write_text(before)
    following = make(tmp_path / "export" / "pipeline", LCM(target_decay=None))
    own, teacher = task.student.state_dict(), tiny.build("sd").unet.state_dict()
    learnt = {name.removeprefix("unet."): value for name, value in own.items() if name.startswith("unet.")}
    network = open_pipeline(tmp_path / "export" / "pipeline").unet.state_dict()
    assert same(learnt, network) and not same(network, teacher)
    assert following.latent_shape == task.latent_shape


def test_one_copy_with_an_adapter_and_more_without(folder: Path) -> None:
    task = make(folder, LCM(target_decay=0.9))
    plain = sum(p.numel() for p in tiny.unet().parameters())
    assert sum(p.numel() for p in task.parameters()) == plain + 2 * sum(p.numel() for p in task.trainable_parameters())
    full = make(folder, LCM(target_decay=0.9), adapter=None)
    assert sum(p.numel() for p in full.parameters()) == 3 * plain
    assert sum(p.numel() for p in full.trainable_parameters()) == plain


class BadLCM(LCM):
    """NaN at the given steps."""

    bad: tuple[int, ...] = ()

    def losses(self, networks: Any, batch: Any, *, step: int, generator: torch.Generator) -> MethodOutput:
        output = super().losses(networks, batch, step=step, generator=generator)
        factor = float("nan") if step in self.bad else 1.0
        return MethodOutput({name: term * factor for name, term in output.terms.items()})


class BadOnce(SCott):
    """Student's and critic's losses of the first batch are NaN."""

    calls = 0

    def losses(self, networks: Any, batch: Any, *, step: int, generator: torch.Generator) -> MethodOutput:
        output = super().losses(networks, batch, step=step, generator=generator)
        self.calls += 1
        return replace(output, terms={name: self._spoilt(term) for name, term in output.terms.items()})

    def critic_losses(self, networks: Any, batch: Any, output: Any, *, step: int, generator: Any) -> dict[str, Any]:
        terms = super().critic_losses(networks, batch, output, step=step, generator=generator)
        return {name: self._spoilt(term) for name, term in terms.items()}

    def _spoilt(self, term: torch.Tensor) -> torch.Tensor:
        return term * (float("nan") if self.calls == 1 else 1.0)


class BadCritic(SCott):
    def critic_losses(self, networks: Any, batch: Any, output: Any, *, step: int, generator: Any) -> dict[str, Any]:
        terms = super().critic_losses(networks, batch, output, step=step, generator=generator)
        return {name: term * (float("nan") if step == 1 else 1.0) for name, term in terms.items()}


class Watch(Callback):
    def __init__(self) -> None:
        self.student: list[dict[str, torch.Tensor]] = []
        self.target: list[dict[str, torch.Tensor]] = []
        self.critic: list[list[torch.Tensor]] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, task: Any, *args: Any) -> None:
        self.student.append(weights(task))
        self.target.append(weights(task, "target"))
        self.critic.append([p.detach().cpu().clone() for p in task.critic_parameters()])
        self.steps.append(trainer.global_step)


def test_a_bad_step_changes_nothing_and_many_stop_the_run(folder: Path, tmp_path: Path) -> None:
    method, watch = BadLCM(target_decay=0.9), Watch()
    method.bad = (1,)
    task = make(folder, method)
    fit(task, 3, tmp_path, watch, limit_val_batches=0)
    assert task.skipped_steps == 1
    assert same(watch.student[0], watch.student[1]) and same(watch.target[0], watch.target[1])
    assert not same(watch.student[1], watch.student[2]) and not same(watch.target[1], watch.target[2])
    method = BadLCM()
    method.bad = tuple(range(9))
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        fit(make(folder, method, max_bad_steps=2), 9, tmp_path, limit_val_batches=0)


def scott(kind: type[SCott] = SCott) -> SCott:
    return kind(solver=SolverSettings("er_sde"), num_sub_steps=2, target_decay=0.9)


def test_critics_have_their_own_optimizer_and_steps_are_the_students(folder: Path, tmp_path: Path) -> None:
    watch = Watch()
    slow = partial(torch.optim.SGD, lr=1e-3)
    task = make(folder, scott(BadCritic), critic_optimizer=slow)
    trainer = fit(task, 3, tmp_path, watch, limit_val_batches=0)
    assert watch.steps == [1, 2, 3] and trainer.global_step == 3
    assert [type(one).__name__ for one in trainer.optimizers] == ["AdamW", "SGD"]
    critic = {id(p) for p in task.critic_parameters()}
    assert critic and not critic & {id(p) for p in task.trainable_parameters()}
    assert not same(watch.student[0], watch.student[1])  # the student was fine in the step that was bad for the critic
    assert all(torch.equal(a, b) for a, b in zip(watch.critic[0], watch.critic[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(watch.critic[1], watch.critic[2], strict=True))
    assert task.skipped_steps == 1
    names = adapter_state_dict(task.networks.teacher.denoiser, "discriminator")
    assert names and all(p.requires_grad for p in [*task.critic_parameters(), *task.trainable_parameters()])


def test_accumulated_batches_make_one_step_of_student_target_and_critic(folder: Path, tmp_path: Path) -> None:
    watch, saving = Watch(), SafeCheckpoint(every_n_train_steps=1, keep=-1)
    task = make(folder, scott(), critic_optimizer=partial(torch.optim.SGD, lr=1e-3))
    start = weights(task)
    fit(task, 3, tmp_path, watch, saving, limit_val_batches=0, accumulate_grad_batches=2)
    assert watch.steps == [0, 1, 2, 2, 3]  # an epoch has three batches, and a step its end
    assert len(list((tmp_path / "checkpoints").glob("*.ckpt"))) == 3
    assert same(watch.student[0], start) and same(watch.target[0], start)
    assert not same(watch.student[1], start) and same(watch.student[2], watch.student[3])
    for key, value in watch.target[1].items():
        torch.testing.assert_close(value, start[key] + 0.1 * (watch.student[1][key] - start[key]))
    assert same(watch.target[2], watch.target[3]) and not same(watch.target[3], watch.target[4])
    alike = [all(map(torch.equal, *pair)) for pair in zip(watch.critic, watch.critic[1:], strict=False)]
    assert alike == [False, False, True, False]


def test_one_bad_batch_of_those_accumulated_spoils_no_later_step(folder: Path, tmp_path: Path) -> None:
    watch = Watch()
    task = make(folder, scott(BadOnce), critic_optimizer=partial(torch.optim.SGD, lr=1e-3))
    start, critic = weights(task), [parameter.detach().clone() for parameter in task.critic_parameters()]
    fit(task, 2, tmp_path, watch, limit_val_batches=0, accumulate_grad_batches=2)
    assert task.skipped_steps == 1 and same(watch.student[1], start) and not same(watch.student[2], start)
    assert all(map(torch.equal, critic, watch.critic[1])) and not all(map(torch.equal, critic, watch.critic[2]))
    method = BadLCM()
    method.bad = tuple(range(9))
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        fit(make(folder, method, max_bad_steps=2), 9, tmp_path, limit_val_batches=0, accumulate_grad_batches=2)


def test_cached_prompts_train_as_live_ones_do(folder: Path, tmp_path: Path) -> None:
    cached = CachedPrompts(Latents(), pipeline=str(folder), folder=str(tmp_path / "text"))
    again = CachedPrompts(Latents(), pipeline=str(folder), folder=str(tmp_path / "text"))
    task = make(folder, MLCM())
    batch = {"caption": [cached[i]["caption"] for i in range(2)]}
    live = task.distill_batch(batch)
    stored = task.distill_batch(batch | {"embeds": torch.stack([again[i]["embeds"] for i in range(2)])})
    torch.testing.assert_close(live.condition.embeds, stored.condition.embeds, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="learns from pictures"):
        make(folder, LCM()).distill_batch(batch)
    images = make(folder, LCM()).distill_batch(batch | {"image": torch.zeros(2, 3, 16, 16)})
    assert images.x_0 is not None and images.x_0.shape == (2, 4, 8, 8)


def test_testing_scores_what_validation_scores(folder: Path, tmp_path: Path) -> None:
    task = make(folder, MLCM())
    trainer = fit(task, 1, tmp_path)
    data = ImageDataModule(Latents(), test=Latents(), batch_size=2, eval_batch_size=3)
    (found,) = trainer.test(task, data, verbose=False)
    assert {"test/loss", "test/score", "test/score_1", "test/score_2"} <= found.keys()
    assert not task.previews.scores()  # nothing is left for a later validation to mix with
    other = ImageDataModule(Latents(), test=Longer(), batch_size=2, eval_batch_size=3)
    (later,) = trainer.test(task, other, verbose=False)
    fresh = make(folder, MLCM())
    fit(fresh, 1, tmp_path / "fresh")
    (alone,) = fresh.trainer.test(fresh, other, verbose=False)
    assert later["test/score"] == pytest.approx(alone["test/score"], rel=1e-4)  # against its own teacher's samples


def test_data_without_captions_are_told_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    fit(make(folder, MLCM()), 1, tmp_path)
    assert not any("has a caption" in str(warning.message) for warning in recwarn)
    real = Latents.sample
    monkeypatch.setattr(Latents, "sample", lambda *a, **options: {**real(*a, **options), "caption": ""})
    with pytest.warns(match=r"no image of the first batch has a caption.*captions\.jsonl") as told:
        fit(make(folder, MLCM()), 2, tmp_path)
    assert sum("has a caption" in str(warning.message) for warning in told) == 1


def test_captions_in_words_that_the_vocabulary_lacks_are_told_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Latents.sample
    monkeypatch.setattr(Latents, "sample", lambda *a, **o: {**real(*a, **o), "caption": "a Maltese dog on a sofa"})
    with pytest.warns(match=r"2 of 2 captions of the first batch have words.*such as maltese, dog") as told:
        fit(make(folder, MLCM()), 2, tmp_path)
    assert sum("vocabulary" in str(warning.message) for warning in told) == 1


def test_critics_of_a_student_of_all_weights_recompute_and_have_nothing_of_each_other(folder: Path) -> None:
    matching = DistributionMatching(start=0)
    method = MLCM(extras=[matching, Adversarial(start=0)])
    task = make(folder, method, adapter=None, gradient_checkpointing=True)
    assert matching.fake is not None
    assert not any("lora" in name for name, _ in matching.fake.named_parameters())
    for network in (network_of(part) for part in (task.student, task.teacher, matching.fake)):
        assert any(getattr(module, "gradient_checkpointing", False) for module in network.modules())


def test_guidance_on_top_of_what_a_network_hears_is_told(tmp_path: Path) -> None:
    tiny.build("flux").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="asks for classifier-free guidance on top of it"):
        method = MLCM(guidance_scale=1.0, extras=[DistributionMatching(start=0)])
        make(tmp_path, method, adapter=LoraSettings(rank=2, targets=("to_q",)))


def test_pairs_of_another_teacher_are_refused_before_they_are_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny.build("sd")
    with torch.no_grad():
        next(other.unet.parameters()).add_(1.0)
    other.save_pretrained(tmp_path / "other")
    monkeypatch.setattr("layton.distillation.pair_data.open_pipeline", lambda *_, **__: pytest.fail("it was opened"))
    task = make(folder, OneStepDistillation())
    places = {"pipeline": str(tmp_path / "other"), "folder": str(tmp_path / "pairs")}
    pairs = TeacherPairs(SceneCaptions(length=3), solver=task.method.solver, **places)
    monkeypatch.setattr(task, "sources", lambda: [pairs])
    with pytest.raises(ValueError, match="pairs made with teacher"):
        task.setup("fit")


def test_grids_have_a_row_for_each_number_of_steps(folder: Path) -> None:
    task = make(folder, MLCM(), preview_steps=(1, 2, 4, 8, 50)).eval()
    with torch.no_grad():
        rows = task.picture_grid({"caption": ["a star", "two stars"], "key": ["a", "b"]})
        again = task.picture_grid({"caption": ["a star", "two stars"], "key": ["a", "b"]})
    assert list(rows) == ["teacher", "1 step", "2 steps", "4 steps", "8 steps"]
    assert all(row.shape == (2, 3, 16, 16) and torch.equal(row, again[name]) for name, row in rows.items())


def test_the_score_sees_blur_shift_and_nothing_else() -> None:
    x = torch.randn(16, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    other = torch.randn(16, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    assert sliced_wasserstein(x, x) == 0.0
    noise = sliced_wasserstein(x, other)
    assert noise < 0.2
    assert sliced_wasserstein(0.5 * x, other) > 2 * noise
    assert sliced_wasserstein(x + 1.0, other) > 2 * noise
    assert sliced_wasserstein(x[torch.randperm(16)], x) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="one shape"):
        sliced_wasserstein(x, other[:2])


@pytest.mark.parametrize("changed", [None, "decoder", "encoder"])
def test_latents_of_another_autoencoder_are_refused(folder: Path, tmp_path: Path, changed: str | None) -> None:
    other = AutoencoderKL.from_pretrained(folder / "vae")
    if changed is not None:
        torch.nn.init.normal_(getattr(other, changed).conv_out.weight, generator=torch.Generator().manual_seed(0))
    other.half().save_pretrained(tmp_path / "vae")
    scenes = ScenesSource(length=6, size=2 * tiny.SIZE)
    data = CachedLatents(scenes, autoencoder=str(tmp_path / "vae"), folder=str(tmp_path / "cache"))
    task = make(folder, LCM(target_decay=None))
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    refused = pytest.raises(ValueError, match="whose encoder is another")
    with refused if changed == "encoder" else nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(task, ImageDataModule(data, batch_size=2))
