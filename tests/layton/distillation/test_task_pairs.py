"""Students that change pictures: what they are given, how they are trained, and what plain diffusers makes of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_pipelines as tiny
import torch
from lightning.pytorch import Trainer
from torch.testing import assert_close

from distill.adapters import LoraSettings
from distill.methods.hipa import HiPA
from distill.methods.lcm import LCM
from distill.methods.one_step import OneStepDistillation
from layton.data.folder import ImageFolderSource
from layton.data.images import to_image
from layton.data.module import ImageDataModule
from layton.data.sources import ScenesSource
from layton.data.transforms import Fit
from layton.data.types import ImageSample
from layton.distillation.distilled import load_distilled, load_sampling
from layton.distillation.one_step_model import load_one_step_model
from layton.distillation.one_step_tasks import edit, resize
from layton.distillation.pair_data import TeacherPairs
from layton.distillation.task_pairs import TaskPairs
from layton.distillation.task_sources import Reduced, SceneCases, WithHoles
from layton.ldm.autoencoder import Autoencoder
from layton.ldm.cache import CachedLatents
from layton.ldm.drawing import TextToImage
from layton.ldm.teacher import open_pipeline
from layton.scenes import caption, is_unseen, sample_scene, seed_of_key
from layton.scenes.cases import edit_case, hole_of
from layton.tasks.distill import DistillTask

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]
PIXELS = 2 * tiny.SIZE  # the small autoencoders halve the side
ADAPTER = LoraSettings(rank=4, alpha=4.0, targets=("to_q", "to_v", "conv1", "conv2", "conv_in"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipe")
    tiny.stable_diffusion("v_prediction").save_pretrained(path)
    return path


def sides(task: Any, **options: Any) -> tuple[SceneCases, SceneCases]:
    settings = {"split": "validation", "length": 8, "size": 64} | options
    return SceneCases(task, "before", **settings), SceneCases(task, "after", **settings)


def pairs(folder: Path, cache: Path, length: int = 8) -> TaskPairs:
    before, after = sides("edit", length=length, size=PIXELS)
    return TaskPairs(before, after, autoencoder=str(folder / "vae"), folder=str(cache), batch_size=3)


def test_both_sides_of_an_edit_show_the_same_scene_but_for_a_colour():
    before, after = sides("edit")
    for index in range(8):
        given, wanted = (side.sample(index, seed=5) for side in (before, after))
        seed = seed_of_key(wanted["key"])
        assert seed is not None and given["key"] == wanted["key"]
        assert given["caption"] == wanted["caption"] == caption(edit_case(seed).wanted) == after.caption(index, seed=5)
        changed = (given["image"] != wanted["image"]).any(dim=0)
        assert 0 < changed.float().mean() < 0.5


def test_a_hole_hides_the_object_that_the_caption_names():
    before, after = sides("inpaint")
    for index in range(8):
        given, wanted = before.sample(index, seed=0), after.sample(index, seed=0)
        seed = seed_of_key(wanted["key"])
        hole = None if seed is None else hole_of(seed)
        assert hole is not None and wanted["caption"] == caption(hole.scene)
        rows, columns = hole.box(64)
        assert (given["image"][:, rows, columns] == 0).all()
        difference = (given["image"] - wanted["image"]).abs()
        difference[:, rows, columns] = 0
        assert difference.max() == 0


def test_what_was_missing_can_come_back_upright():
    turned, upright = (sides("inpaint", upright=choice) for choice in (False, True))
    differ = 0
    for index in range(8):
        (given, wanted), (same, straight) = (
            [side.sample(index, seed=0) for side in pair] for pair in (turned, upright)
        )
        assert torch.equal(given["image"], same["image"]) and wanted["caption"] == straight["caption"]
        hole = hole_of(seed_of_key(wanted["key"]) or 0)
        assert hole is not None
        rows, columns = hole.box(64)
        difference = (wanted["image"] - straight["image"]).abs()
        differ += bool(difference.max() > 0)
        difference[:, rows, columns] = 0
        assert difference.max() == 0
    assert differ > 0
    assert turned[0].settings() == upright[0].settings() and turned[1].settings() != upright[1].settings()


def test_training_sees_no_combination_that_is_held_out():
    plain = [edit_case(seed).wanted for seed in range(300)]
    assert any(is_unseen(scene) for scene in plain)
    after = SceneCases("edit", "after", split="train", length=200)
    assert not any(is_unseen(edit_case(seed).wanted) for seed in after.seeds)
    assert len(after) == 200 == len(set(after.seeds))
    later = SceneCases("edit", "after", split="train", length=100, offset=100)
    assert later.seeds == after.seeds[100:]
    assert all(is_unseen(sample_scene(seed)) is False for seed in after.seeds)


def test_holes_of_any_pictures_are_grey_rectangles_of_the_sizes_asked_for():
    source = ScenesSource(split="validation", length=4, size=40)
    holes = WithHoles(source, smallest=0.25, largest=0.5)
    for index in range(4):
        given, wanted = holes.sample(index, seed=9), source.sample(index, seed=9)
        assert (given["key"], given["caption"]) == (wanted["key"], wanted["caption"])
        changed = (given["image"] != wanted["image"]).any(dim=0).nonzero()
        extents = (changed.amax(dim=0) - changed.amin(dim=0) + 1).tolist()
        assert all(10 <= extent <= 20 for extent in extents)
        assert (given["image"][:, changed[:, 0], changed[:, 1]] == 0).all()
        assert_close(given["image"], holes.sample(index, seed=9)["image"], rtol=0, atol=0)
    with pytest.raises(ValueError, match="smallest"):
        WithHoles(source, smallest=0.6, largest=0.5)


def test_reduced_pictures_have_their_size_and_lack_detail():
    source = ScenesSource(split="validation", length=2, size=64)
    given, wanted = Reduced(source, scale=4).sample(0, seed=0)["image"], source.sample(0, seed=0)["image"]
    assert given.shape == wanted.shape
    assert 0 < (given - wanted).abs().mean() < 0.1
    assert (resize(given[None], 0.25) - resize(wanted[None], 0.25)).abs().mean() < 0.01
    with pytest.raises(ValueError, match="scale"):
        Reduced(source, scale=1)
    with pytest.raises(ValueError, match="no multiple of 5"):
        Reduced(source, scale=5).sample(0, seed=0)


def test_pairs_hold_both_sides_as_the_autoencoder_sees_them(folder: Path, tmp_path: Path):
    source = pairs(folder, tmp_path)
    assert len(source) == 8
    before, after = sides("edit", size=PIXELS)
    autoencoder = Autoencoder.from_pretrained(folder / "vae")
    sample = source.sample(5, seed=1)
    assert (sample["caption"], sample["key"]) == (after[5]["caption"], after[5]["key"])
    for name, side in (("noise", before), ("latent", after)):
        with torch.no_grad():
            wanted = autoencoder.encode(side[5]["image"][None])[0]
        # encoded in bfloat16 where that is quicker
        assert (sample[name].float() - wanted).norm() < 0.02 * wanted.norm()


def test_pictures_that_are_no_pairs_are_refused(folder: Path, tmp_path: Path):
    before, _ = sides("edit", size=PIXELS)
    options = {"autoencoder": str(folder / "vae"), "folder": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match="8 pictures are given and 4 are wanted"):
        TaskPairs(before, sides("edit", length=4, size=PIXELS)[1], **options)
    with pytest.raises(ValueError, match="no pair"):
        TaskPairs(before, sides("edit", offset=1, size=PIXELS)[1], **options)


def test_a_few_that_are_no_pairs_are_left_out_and_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Replaced(SceneCases):
        def sample(self, index: int, *, seed: int) -> ImageSample:
            return super().sample(4 if index == 2 else index, seed=seed)  # as a broken file is

    options = {"split": "validation", "length": 8, "size": PIXELS}
    found = TaskPairs(
        Replaced("edit", "before", **options),
        SceneCases("edit", "after", **options),
        autoencoder=str(folder / "vae"),
        folder=str(tmp_path / "cache"),
    )
    assert len(found) == 7 and "1 of 8 are no pairs" in capsys.readouterr().err
    wanted = SceneCases("edit", "after", **options)
    assert [found[place]["key"] for place in range(7)] == [wanted[place]["key"] for place in (0, 1, 3, 4, 5, 6, 7)]


def test_caches_know_what_their_pictures_were_altered_by(folder: Path, tmp_path: Path):
    source = ScenesSource(split="validation", length=3, size=PIXELS)
    for name, one, other in (
        ("a", Reduced(source, scale=2), Reduced(source, scale=4)),
        ("b", WithHoles(source, smallest=0.2), WithHoles(source, smallest=0.21)),
    ):
        options = {"autoencoder": str(folder / "vae"), "folder": str(tmp_path / name)}
        CachedLatents(one, **options)
        with pytest.raises(ValueError, match="settings"):
            CachedLatents(other, **options)


def test_two_folders_of_files_with_equal_names_are_pairs(folder: Path, tmp_path: Path):
    sources = []
    for name, side in zip(("before", "after"), sides("edit", length=2, size=PIXELS), strict=True):
        (tmp_path / name).mkdir()
        for index in range(2):
            to_image(side[index]["image"]).save(tmp_path / name / f"{index}.png")
            (tmp_path / name / f"{index}.txt").write_text(f"{name} {index}")
        sources.append(ImageFolderSource(str(tmp_path / name), split=None, transform=Fit(PIXELS)))
    found = TaskPairs(*sources, autoencoder=str(folder / "vae"), folder=str(tmp_path / "cache"))
    assert [found[index]["caption"] for index in range(2)] == ["after 0", "after 1"]


@pytest.mark.parametrize("method", [HiPA(spatial_weight=0, frequency_weight=0, edge_weight=0, l2_weight=1.0), None])
def test_a_student_of_picture_pairs_learns_is_recorded_and_is_plain_diffusers(
    folder: Path, tmp_path: Path, method: HiPA | None
):
    torch.manual_seed(0)
    task = DistillTask(
        str(folder),
        method or OneStepDistillation(),
        optimizer=partial(torch.optim.AdamW, lr=2e-2),
        adapter=ADAPTER,
        preview_steps=(1,),
        reference_steps=2,
    )
    data = ImageDataModule(pairs(folder, tmp_path / "c"), validation=pairs(folder, tmp_path / "c"), batch_size=8)
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=40,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    losses = [float(trainer.validate(task, data, verbose=False)[0]["val/loss"])]
    trainer.fit(task, data)
    losses.append(float(trainer.validate(task, data, verbose=False)[0]["val/loss"]))
    assert losses[1] < 0.7 * losses[0]
    batch = next(iter(data.val_dataloader()))
    assert list(task.picture_grid(batch)) == ["given", "wanted", "1 step"]
    task.export(tmp_path / "student")
    assert load_sampling(tmp_path / "student").start == "image"
    _require_equal_to_diffusers(folder, tmp_path / "student")
    with pytest.raises(ValueError, match="draws none from text"):
        TextToImage.load_student(folder, tmp_path / "student")


def _require_equal_to_diffusers(folder: Path, student: Path) -> None:
    """One step of the student here, and of diffusers' pipeline that is given the picture's latent as its noise."""
    model = load_one_step_model(str(folder), str(student), device="cpu")
    assert model.start == "image"
    before, after = sides("edit", length=1, size=PIXELS)
    image, prompt = before[0]["image"][None], after[0]["caption"]
    condition = model.condition_of([prompt])
    generator = torch.Generator().manual_seed(0)
    ours = edit(
        model.denoiser,
        image,
        condition,
        condition,
        encode=model.encode,
        decode=model.decode,
        generator=generator,
        start=model.start,
        threshold=0.0,
    )
    pipe = open_pipeline(folder)
    load_distilled(pipe, student)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        prompt, latents=model.encode(image), num_inference_steps=1, guidance_scale=1.0, output_type="pt"
    ).images
    assert_close(drawn * 2 - 1, ours, rtol=1e-4, atol=1e-4)


def test_a_run_starts_from_pictures_or_from_noise_and_learns_from_pairs(folder: Path, tmp_path: Path):
    def make(method: Any) -> DistillTask:
        return DistillTask(str(folder), method, optimizer=torch.optim.SGD, adapter=ADAPTER, reference_steps=2)

    drawn = TeacherPairs(ScenesSource(length=2, size=PIXELS), pipeline=str(folder), folder=str(tmp_path / "p"))
    data = ImageDataModule([pairs(folder, tmp_path / "c"), drawn], batch_size=2)
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="from pictures or from noise"):
        trainer.fit(make(OneStepDistillation()), data)
    with pytest.raises(ValueError, match="LCM does not learn from pairs"):
        trainer.fit(make(LCM()), ImageDataModule(pairs(folder, tmp_path / "c"), batch_size=2))
