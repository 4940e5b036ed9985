"""Stage 2: what is trained, where gradients go, what a crop of the loss is, and the whole run through the command."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from distill.denoiser import Condition
from distill.methods.distribution_matching import DistributionMatching
from distill.methods.lcm import LCM
from distill.methods.mlcm import MLCM
from distill.methods.scott import SCott
from distill.samplers import renoise_sample
from layton.callbacks import EMA
from layton.cli import main
from layton.data.sources import ScenesSource
from layton.decoders import ConsistencyDecoder, DiffusionDecoder
from layton.decoders.consistency import LAYTON_TIMES
from layton.decoders.difference import Adaptation
from layton.encoder import ViTEncoder
from layton.ladd import LADD
from layton.ldm.autoencoder import Autoencoder, build_autoencoder
from layton.ldm.cache import CachedLatents
from layton.ldm.crops import LatentCrop
from layton.ldm.pipeline import build_scheduler
from layton.ldm.unet import build_unet
from layton.losses.perceptual import PictureDistance
from layton.losses.pixel_supervision import PixelExample, PixelSupervision, last_step_sample
from layton.pixel_decoder import PixelDecoder
from layton.quantizers import CosineVQ
from layton.tasks.consistency_decoder import ConsistencyDecoderTask
from layton.tasks.critics import CriticSettings
from layton.tasks.decoder import DecoderTask

SIZE = 64  # pixels; 4 tokens and 4 latents along a side
FACTOR = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent diffusion model, a tokenizer and a stage-1 decoder, all tiny."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    unet = build_unet(latent_channels=4, latent_size=4, block_out_channels=(16, 16), text_width=16)
    unet.save_pretrained(root / "ldm/unet")
    vae = build_autoencoder(latent_channels=4, block_out_channels=(8,) * 5, norm_num_groups=4)
    vae.save_pretrained(root / "ldm/vae")
    build_scheduler().save_pretrained(root / "ldm/scheduler")
    ViTEncoder(code_dim=4, width=16, depth=1, num_heads=2, stem_width=8).save_pretrained(root / "tok/encoder")
    CosineVQ(vocab_size=32, code_dim=4, start_points=0).save_pretrained(root / "tok/quantizer")
    ladd = LADD.from_pipeline(root / "ldm", code_dim=4, embedding_channels=(8,))
    for parameter in ladd.controlnet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    DiffusionDecoder(ladd, Autoencoder(vae)).save_pretrained(root / "diffusion")
    PixelDecoder(4, 16, 1, 2, fine_width=8, num_fine_blocks=1).save_pretrained(root / "light")
    return root


def make_trainer(root: Path, **options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", default_root_dir=root, num_sanity_val_steps=0, **quiet, **options)


def make_task(world: Path, **options: Any) -> ConsistencyDecoderTask:
    return ConsistencyDecoderTask(
        str(world / "ldm"),
        str(world / "tok"),
        str(world / "diffusion"),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        **options,
    )


def test_parts_are_found_in_a_tokenizer(world: Path, tmp_path: Path) -> None:
    whole = tmp_path / "tokenizer"
    shutil.copytree(world / "tok", whole)
    shutil.copytree(world / "ldm", whole / "ldm")
    for name in ("diffusion", "light"):
        shutil.copytree(world / name, whole / "decoders" / name)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    task = ConsistencyDecoderTask(
        *[str(whole)] * 3, optimizer=optimizer, reader=str(whole), method=MLCM(guidance_scale=1.0)
    )
    apart = make_task(world, reader=str(world / "light"), method=MLCM(guidance_scale=1.0))
    for ours, theirs in zip(task.ladd.parameters(), apart.ladd.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    DecoderTask(*[str(whole)] * 2, optimizer=optimizer, embedding_channels=(8,), reader=str(whole))
    with pytest.raises(
        ValueError, match=r"learns from latent, codes, but batches hold image only: take .*CachedLatents"
    ):
        task.validation_step({"image": torch.zeros(1, 3, 8, 8)}, 0)


def make_batch(count: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "latent": torch.randn(count, 4, 4, 4, generator=generator).half(),
        "codes": torch.randint(32, (count, 16), generator=generator).to(torch.int16),
        "image": torch.rand(count, 3, SIZE, SIZE, generator=generator) * 2 - 1,
        "key": ["scenes/0"] * count,
    }


def count_evaluations(task: ConsistencyDecoderTask) -> list[tuple[float, bool]]:
    """Fills with the time of each evaluation of the student, and whether it had a gradient."""
    calls: list[tuple[float, bool]] = []
    task.ladd.register_forward_hook(lambda _, inputs, output: calls.append((float(inputs[1][0]), output.requires_grad)))
    return calls


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_gradients_flow_through_the_last_step_only_and_into_what_is_trained(world: Path, steps: int) -> None:
    task = make_task(world, pixels=PixelSupervision(steps=[steps], crop=2, margin=1))
    calls = count_evaluations(task)
    loss = task.training_step(make_batch(), 0)
    assert loss is not None
    loss.backward()
    assert calls == [(time, index == steps - 1) for index, time in enumerate(LAYTON_TIMES[steps])]
    chosen = {id(parameter) for parameter in task.trainable_parameters()}
    for name, parameter in task.named_parameters():
        if id(parameter) not in chosen:
            assert parameter.grad is None and not parameter.requires_grad, name
    gradients = task.difference.tensors(task.ladd)
    assert gradients["controlnet.conv_in.weight"].grad.abs().sum() > 0  # type: ignore[union-attr]
    ups = [value for name, value in gradients.items() if name.startswith("unet.") and name.endswith("lora_B.weight")]
    assert ups and sum(float(value.grad.abs().sum()) for value in ups if value.grad is not None) > 0
    assert all(parameter.grad is None for parameter in task._autoencoder.module.parameters())


def test_a_student_begins_to_listen_where_an_earlier_one_left_off(world: Path, tmp_path: Path) -> None:
    adaptation = Adaptation(unet="lora", branch="lora")
    pixels = PixelSupervision(steps=[1], l1_weight=0, l2_weight=0, latent_weight=1)
    earlier = make_task(world, adaptation=adaptation, pixels=pixels)
    with torch.no_grad():
        for parameter in earlier.trainable_parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    earlier.export(tmp_path)
    start, reader = str(tmp_path / "decoder"), str(world / "light")
    task = make_task(world, adaptation=adaptation, pixels=pixels, reader=reader, start=start)
    batch = make_batch()
    loss = task.training_step(batch, 0)
    assert loss is not None and torch.equal(loss, earlier.training_step(batch, 0))  # type: ignore[arg-type]
    loss.backward()
    heard = {name: value for name, value in task.difference.tensors(task.ladd).items() if "features" in name}
    assert len(heard) == 2 and all(value.grad is not None and value.grad.any() for value in heard.values())
    assert all(parameter.grad is None for parameter in task.ladd.reader.parameters())  # type: ignore[union-attr]
    assert task._teacher.module.reader is None  # stage 1 stays what it was
    with torch.no_grad():
        heard["controlnet.controlnet_cond_embedding.features.bias"].add_(0.5)
    task.export(tmp_path / "told")
    again = make_task(world, adaptation=adaptation, pixels=pixels, reader=reader, start=str(tmp_path / "told/decoder"))
    for name, value in again.difference.tensors(again.ladd).items():
        assert torch.equal(value, task.difference.tensors(task.ladd)[name])
    PixelDecoder(4, 16, 1, 2, fine_width=8, num_fine_blocks=1).save_pretrained(tmp_path / "light")
    with pytest.raises(ValueError, match="learnt by another 'light' decoder"):
        make_task(
            world,
            adaptation=adaptation,
            pixels=pixels,
            reader=str(tmp_path / "light"),
            start=str(tmp_path / "told/decoder"),
        )


def test_the_light_decoders_pictures_stand_for_the_originals(world: Path) -> None:
    pixels = PixelSupervision(steps=[1], crop=None, latent_weight=1)
    task = make_task(world, pixels=pixels, pixel_targets="light", reader=str(world / "light"))
    batch = make_batch()
    del batch["image"]  # codes are enough
    _, condition = task._inputs(batch)
    autoencoder, graphs = task._autoencoder.module, []
    with pytest.MonkeyPatch.context() as patch:
        encode = autoencoder.encode
        patch.setattr(autoencoder, "encode", lambda x: (graphs.append(torch.is_grad_enabled()), encode(x))[1])
        example = task._example(batch, batch["latent"].float(), condition)
    assert graphs == [False]  # or it would keep activations, of a whole batch at once
    pictures = PixelDecoder.from_pretrained(world / "light")(condition.spatial).detach().clamp(-1, 1)
    assert example.images is not None and torch.equal(example.images, pictures)
    assert torch.equal(example.latents, task._autoencoder.module.encode(pictures).detach())
    loss, other = (
        task.training_step({**batch, "latent": latent}, 0) for latent in (batch["latent"], batch["latent"] * 2)
    )
    assert loss is not None and other is not None and torch.equal(loss, other)
    assert not any(name.startswith("_light") for name in task.state_dict())
    with pytest.raises(ValueError, match=r"have latents \(4, 4\), and the data's are \(8, 8\)"):
        task._example(batch, torch.zeros(2, 4, 8, 8), condition)
    with pytest.raises(ValueError, match="give its folder as reader"):
        make_task(world, pixels=pixels, pixel_targets="light")


def test_training_samples_are_those_of_inference(world: Path) -> None:
    task = make_task(world, pixels=PixelSupervision(steps=[1]))
    x_T = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    condition = Condition(spatial=torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)))
    for times in LAYTON_TIMES.values():
        one, other = (torch.Generator().manual_seed(2) for _ in range(2))
        expected = renoise_sample(task.ladd, x_T, torch.tensor(times), condition, generator=one)
        found = last_step_sample(task.ladd, x_T, times, condition, generator=other)
        torch.testing.assert_close(found, expected)


class Flat(torch.nn.Module):
    """Eight-pixel patches, independent of one another: crops of what it decodes are exact."""

    downsample_factor = 8

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].repeat_interleave(8, dim=-1).repeat_interleave(8, dim=-2)


class FirstDraw(PictureDistance):
    """What a distance that chooses is given to choose by."""

    def forward(self, images: Tensor, targets: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return torch.rand((), generator=generator)


@pytest.mark.parametrize("place", [(0, 0), (3, 5), (8, 8)])
def test_a_crop_is_that_part_of_the_picture(place: tuple[int, int]) -> None:
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    crop = LatentCrop(*place, 8)
    whole = Flat().decode(latents)
    part = crop.decode(Flat(), latents, margin=2)  # type: ignore[arg-type]
    assert torch.equal(part, crop.of(whole, factor=8))
    target = torch.zeros_like(whole)
    example = PixelExample(latents, Condition(), target)
    loss = PixelSupervision(crop=8, margin=2, perceptual=FirstDraw())
    generator = torch.Generator().manual_seed(3)
    terms = loss.compare(Flat(), latents, example, crop=crop, generator=generator)  # type: ignore[arg-type]
    assert terms["perceptual"] == torch.rand((), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(terms["pixel_l2"], crop.of(whole - target, factor=8).square().mean())


@torch.no_grad()
def test_a_margin_brings_a_real_decoder_near_to_its_whole_picture() -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(build_autoencoder(latent_channels=4, block_out_channels=(16, 16, 16))).eval()
    for name, parameter in autoencoder.named_parameters():
        if name.endswith("conv2.weight"):  # zero at the start, so that no residual branch would look around
            torch.nn.init.normal_(parameter, std=0.02)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = autoencoder.decode(latents)
    crop = LatentCrop(4, 4, 8)
    wanted = crop.of(whole, factor=4)
    errors = [(crop.decode(autoencoder, latents, margin=m) - wanted).square().mean() for m in (0, 2, 4)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < 0.02 * wanted.var()
    torch.testing.assert_close(errors[2], torch.zeros(()), atol=1e-9, rtol=0)  # this window is the whole latent


def test_crops_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="a crop of 5 latents"):
        LatentCrop.draw((4, 8), 5, torch.Generator())
    with pytest.raises(ValueError, match="margin"):
        LatentCrop(0, 0, 1).decode(Flat(), torch.zeros(1, 4, 2, 2), margin=-1)  # type: ignore[arg-type]
    drawn = {(c.top, c.left) for c in (LatentCrop.draw((4, 4), 3, g) for g in [torch.Generator()] for _ in range(64))}
    assert drawn == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize(
    "adaptation", [Adaptation(), Adaptation(unet="full", branch="lora"), Adaptation(branch="lora")]
)
def test_the_teacher_stays_and_shares_what_stays(world: Path, adaptation: Adaptation) -> None:
    task = make_task(world, adaptation=adaptation, diffusion_weight=1.0)
    teacher = task._teacher.module
    x_t = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    condition = Condition(spatial=torch.ones(2, 4, 4, 4))
    with torch.no_grad():
        before = teacher(x_t, torch.tensor(500.0), condition)
        torch.testing.assert_close(task.ladd(x_t, torch.tensor(500.0), condition), before)
        for parameter in task.trainable_parameters():
            parameter.add_(0.1)
        assert torch.equal(teacher(x_t, torch.tensor(500.0), condition), before)
        assert not torch.allclose(task.ladd(x_t, torch.tensor(500.0), condition), before)
    own = {id(parameter) for parameter in task.ladd.parameters()}
    shared = [id(parameter) in own for parameter in teacher.unet.parameters()]
    assert all(shared) if adaptation.unet != "full" else not any(shared)


def test_distillation_trains_and_the_target_follows(world: Path) -> None:
    method = LCM(guidance_range=(1.0, 1.0), target_decay=0.5)
    task = make_task(world, method=method, adaptation=Adaptation(unet="lora", branch="lora"))
    name, start = next((n, p.detach().clone()) for n, p in task.difference.tensors(task._target.module).items())
    loss = task.training_step(make_batch(), 0)
    assert loss is not None and float(loss.detach()) > 0
    loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in task.trainable_parameters())
    with torch.no_grad():
        student = task.difference.tensors(task.ladd)[name]
        student.add_(1.0)
    task._follow()
    torch.testing.assert_close(task.difference.tensors(task._target.module)[name], start + 0.5)
    checkpoint: dict[str, Any] = {}
    task.on_save_checkpoint(checkpoint)
    again = make_task(world, method=method, adaptation=Adaptation(unet="lora", branch="lora"))
    again.on_load_checkpoint(checkpoint)
    torch.testing.assert_close(again.difference.tensors(again._target.module)[name], start + 0.5)


class AfterStep(Callback):
    """What those who save after a step find."""

    def __init__(self) -> None:
        self.student: list[dict[str, Tensor]] = []
        self.target: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, task: Any, *args: Any) -> None:
        for kept, network in ((self.student, task.ladd), (self.target, task._target.module)):
            kept.append({n: value.detach().cpu().clone() for n, value in task.difference.tensors(network).items()})


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("kind", ["lcm", "scott"])
def test_who_saves_after_a_step_finds_the_target_of_that_step(
    world: Path, tmp_path: Path, kind: str, bad: bool
) -> None:
    class BadCritic(SCott):
        def critic_losses(self, *args: Any, **options: Any) -> dict[str, Tensor]:
            terms = super().critic_losses(*args, **options)
            return {name: term * (float("nan") if bad else 1.0) for name, term in terms.items()}

    options = {"guidance_range": (1.0, 1.0), "target_decay": 0.5}
    task = make_task(
        world,
        method=LCM(**options) if kind == "lcm" else BadCritic(**options),
        adaptation=Adaptation(unet="lora", branch="lora"),
        critic_optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    assert task.automatic_optimization == (kind == "lcm")
    start = {name: value.detach().clone() for name, value in task.difference.tensors(task._target.module).items()}
    watch, average = AfterStep(), EMA(decay=0.5)
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[average, watch], limit_val_batches=0)
    trainer.fit(task, DataLoader([make_batch() for _ in range(2)], batch_size=None))
    assert any(not torch.equal(watch.student[0][name], start[name]) for name in start)
    before = start
    for student, target in zip(watch.student, watch.target, strict=True):
        for name, value in target.items():  # also where the critic's step was bad, which is none of the student's
            torch.testing.assert_close(value, (before[name] + student[name]) / 2)
        before = target
    assert average.state_dict()["average"]["optimization_step"] == 2


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_the_target_follows_steps_and_not_batches(world: Path, tmp_path: Path) -> None:
    method = LCM(guidance_range=(1.0, 1.0), target_decay=0.5)
    task = make_task(world, method=method, adaptation=Adaptation(unet="lora", branch="lora"))
    start = {name: value.detach().clone() for name, value in task.difference.tensors(task._target.module).items()}
    trainer = make_trainer(tmp_path, max_steps=1, accumulate_grad_batches=4)
    batches = DataLoader([make_batch() for _ in range(4)], batch_size=None)
    trainer.fit(task, batches, batches)
    learnt, followed = (task.difference.tensors(network) for network in (task.ladd, task._target.module))
    assert any(not learnt[name].cpu().equal(start[name]) for name in start)
    for name, value in followed.items():
        torch.testing.assert_close(value.detach().cpu(), (start[name] + learnt[name].detach().cpu()) / 2)


def test_every_head_of_the_default_critic_sees_the_codes(world: Path) -> None:
    method = SCott(guidance_range=(1.0, 1.0), target_decay=None)
    make_task(world, method=method, critic_optimizer=partial(torch.optim.SGD, lr=0.1))
    critic = method.discriminator
    assert critic is not None
    generator = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(1, 4, 4, 4, generator=generator), torch.full((1,), 500.0)
    codes = [Condition(spatial=torch.randn(1, 4, 4, 4, generator=generator)) for _ in range(2)]
    one, other = (critic(x_t, t, condition, Condition()) for condition in codes)
    assert one and all(not torch.allclose(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("kind", ["scott", "lora", "distribution matching"])
def test_a_critic_learns_in_turn(world: Path, tmp_path: Path, kind: str) -> None:
    method: SCott | MLCM = SCott(guidance_range=(1.0, 1.0), target_decay=None)
    if kind == "distribution matching":
        extra = DistributionMatching(guidance_scale=1.0, fake_updates=1)
        method = MLCM(guidance_scale=1.0, target_decay=None, extras=[extra])
    judge = CriticSettings(kind="lora") if kind == "lora" else None
    task = make_task(world, method=method, critic=judge, critic_optimizer=partial(torch.optim.SGD, lr=0.1))
    kept = {value.data_ptr() for value in task.state_dict().values()}
    assert all(parameter.data_ptr() in kept for parameter in method.critic_parameters())  # checkpoints have them
    before = [parameter.detach().clone() for parameter in (*task.trainable_parameters(), *method.critic_parameters())]
    trainer = make_trainer(tmp_path, max_steps=2)  # of the student
    batches = DataLoader([make_batch(), make_batch()], batch_size=None)
    trainer.fit(task, batches, batches)
    after = [*task.trainable_parameters(), *method.critic_parameters()]
    assert trainer.fit_loop.total_batch_idx == 1  # 0-based
    changed = [not torch.equal(a, b.cpu()) for a, b in zip(before, after, strict=True)]
    critic = len(list(method.critic_parameters()))
    assert any(changed[:-critic]) and any(changed[-critic:])
    chosen = {id(parameter) for parameter in after}
    assert all(parameter.grad is None for parameter in task.parameters() if id(parameter) not in chosen)


def test_what_cannot_be_trained(world: Path) -> None:
    with pytest.raises(ValueError, match="nothing to learn"):
        make_task(world)
    with pytest.raises(ValueError, match="LCM guides its teacher"):
        make_task(world, method=LCM())
    with pytest.raises(ValueError, match=r"\[4\] steps, but times are given for \[1, 2, 3\]"):
        make_task(world, pixels=PixelSupervision(steps=[4]))
    task = make_task(world, pixels=PixelSupervision(crop=2))
    batch = make_batch()
    del batch["image"]
    with pytest.raises(ValueError, match="images"):
        task.training_step(batch, 0)
    decoded = make_task(world, pixels=PixelSupervision(crop=2), pixel_targets="decoded")
    assert decoded.training_step(batch, 0) is not None
    with pytest.raises(ValueError, match="must be one of"):
        make_task(world, pixels=PixelSupervision(crop=2), pixel_targets="originals")
    with pytest.raises(ValueError, match="latents_per_token"):
        make_task(world, diffusion_weight=1.0, latents_per_token=2).training_step(make_batch(), 0)


def test_pixel_supervision_learns_the_picture(world: Path) -> None:
    task = make_task(world, pixels=PixelSupervision(steps=[1], crop=None, l1_weight=0.0), times={1: [999.0]})
    batch = make_batch(1)
    with torch.no_grad():
        batch["image"] = task._autoencoder.module.decode(batch["latent"].float())
    optimizer = torch.optim.Adam(task.trainable_parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = task.training_step(batch, 0)
        assert loss is not None
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_cached_images_are_those_of_the_latents(world: Path, tmp_path: Path) -> None:
    def make(name: str, images: Any) -> CachedLatents:
        return CachedLatents(
            ScenesSource(split="train", length=2, size=SIZE),
            autoencoder=str(world / "ldm/vae"),
            folder=str(tmp_path / name),
            num_samples=3,
            images=images,
        )

    plain, read = make("a", "none"), make("a", "read")  # one cache
    stored = make("b", "stored")
    autoencoder = Autoencoder.from_pretrained(world / "ldm/vae").eval()
    for index in range(3):
        assert "image" not in plain.sample(index, seed=0)
        sample, kept = read.sample(index, seed=0), stored.sample(index, seed=1)
        torch.testing.assert_close(kept["image"], sample["image"], atol=1.01 / 127.5, rtol=0)
        with torch.no_grad():
            latent = autoencoder.encode(sample["image"][None])[0]
        torch.testing.assert_close(latent, sample["latent"].float(), atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match="images must be one of"):
        make("c", "yes")


def test_codes_are_cached_as_the_tokenizer_makes_them(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, encoded = [], []

    @contextmanager
    def exactly() -> Iterator[None]:
        exact.append(True)
        yield
        exact.pop()

    real = ViTEncoder.forward
    monkeypatch.setattr("layton.ldm.cache.exact_float32", exactly)
    monkeypatch.setattr(ViTEncoder, "forward", lambda *given: (encoded.append(bool(exact)), real(*given))[1])
    places = {"autoencoder": str(world / "ldm/vae"), "tokenizer": str(world / "tok"), "folder": str(tmp_path)}
    CachedLatents(ScenesSource(split="train", length=2, size=SIZE), **places)
    assert encoded == [True]


def test_cached_codes_outlive_a_decoder_and_no_quantizer(world: Path, tmp_path: Path) -> None:
    tokenizer = shutil.copytree(world / "tok", tmp_path / "tok")

    def cache() -> CachedLatents:
        return CachedLatents(
            ScenesSource(split="train", length=2, size=SIZE),
            autoencoder=str(world / "ldm/vae"),
            tokenizer=str(tokenizer),
            folder=str(tmp_path / "cache"),
        )

    codes = cache()[1]["codes"]
    save_file({"weight": torch.ones(1)}, tokenizer / "another_decoder.safetensors")
    assert torch.equal(cache()[1]["codes"], codes)
    weights = load_file(tokenizer / "quantizer" / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, tokenizer / "quantizer" / "model.safetensors")
    with pytest.raises(ValueError, match="tokenizer: stored"):
        cache()


def test_the_whole_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cached = {
        "class_path": "layton.ldm.cache.CachedLatents",
        "init_args": {
            "source": {
                "class_path": "layton.data.sources.ScenesSource",
                "init_args": {"split": "train", "length": 4, "size": SIZE},
            },
            "autoencoder": str(world / "ldm/vae"),
            "tokenizer": str(world / "tok"),
            "folder": "cache",
            "images": "read",
        },
    }
    run = {
        "trainer": {
            "max_steps": 4,
            "accelerator": "cpu",
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "layton.callbacks.EMA", "init_args": {"decay": 0.9}},
                {"class_path": "layton.callbacks.PictureGrid", "init_args": {"every_n_steps": 2}},
            ],
        },
        "model": {
            "class_path": "layton.tasks.consistency_decoder.ConsistencyDecoderTask",
            "init_args": {
                "ldm": str(world / "ldm"),
                "tokenizer": str(world / "tok"),
                "decoder": str(world / "diffusion"),
                "adaptation": {"unet": "lora", "branch": "lora", "lora": {"rank": 4}},
                "method": {
                    "class_path": "distill.methods.lcm.LCM",
                    "init_args": {"guidance_range": [1.0, 1.0], "target_decay": 0.9},
                },
                "pixels": {
                    "class_path": "layton.losses.pixel_supervision.PixelSupervision",
                    "init_args": {"crop": 2, "margin": 1},
                },
                "diffusion_weight": 0.1,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            },
        },
        "data": {
            "class_path": "layton.data.module.ImageDataModule",
            "init_args": {"batch_size": 2, "train": [cached], "validation": [cached]},
        },
    }
    Path("run.yaml").write_text(yaml.safe_dump(run))
    assert main(["--debug", "fit", "--config", "run.yaml", "--run_dir", str(tmp_path / "run")]) == 0
    export = tmp_path / "run/export/decoder"
    decoder = ConsistencyDecoder.from_pretrained(export, ldm=world / "ldm", base=world / "diffusion")
    assert decoder.steps == (1, 2, 3) and decoder.default_steps == 3
    assert decoder.decode(torch.ones(1, 4, 4, 4)).shape == (1, 3, SIZE, SIZE)
    resumed = make_task(
        world,
        diffusion_weight=1.0,
        start=str(export),
        adaptation=Adaptation(unet="lora", branch="lora", lora=decoder.difference.adaptation.lora),  # type: ignore[union-attr]
    )
    for name, value in resumed.difference.tensors(resumed.ladd).items():
        assert torch.equal(value, decoder.difference.tensors(decoder.network)[name]), name  # type: ignore[union-attr]
