"""The embedded `mini`: what is shipped loads without network and does what its card says, on test scenes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import layton
from generation.drawers import DrawerOptions, load_drawer
from generation.generator import find_generator, load_generator
from generation.pipeline import LaytonGenPipeline
from generation.placed_prompts import PlacedPrompts
from layton import pretrained
from layton.data.sources import ScenesSource
from layton.metrics.image import psnr
from layton.scenes import objects_placed, sample_scene
from layton.scenes.placed import SQUARE_TOKENS
from layton.sceneval.detection import find_objects
from layton.tokenizer import LaytonTokenizer

ASSETS = Path(layton.__file__).parent / "assets"
MINI = ASSETS / "mini"


@pytest.fixture(scope="module")
def mini() -> LaytonTokenizer:
    return LaytonTokenizer.from_pretrained("mini")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    source = ScenesSource(split="test", length=4)
    return torch.stack([source.sample(index, seed=0)["image"] for index in range(4)])


def test_everything_shipped_fits_the_budget() -> None:
    sizes = [path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(sizes) <= 64e6 and max(sizes) <= 40e6


@pytest.mark.parametrize(
    ("decoder", "steps", "decibels"),
    [("light", None, 5.0), ("consistency", 1, 3.0), ("consistency", 3, 2.0), ("hipa", 1, 2.0), ("instaflow", 1, 2.0)],
)
def test_tokens_keep_more_than_the_mean_of_each_cell(
    mini: LaytonTokenizer, images: torch.Tensor, decoder: str, steps: int | None, decibels: float
) -> None:
    palette = F.interpolate(F.avg_pool2d(images, 16), scale_factor=16, mode="bicubic").clamp(-1, 1)
    codes = mini.encode(images)
    assert codes.shape == (4, 256)
    decoded = mini.decode(codes, decoder=decoder, num_steps=steps)
    assert float((psnr(decoded, images) - psnr(palette, images)).mean()) > decibels


def test_the_default_decoder_is_the_distilled_one(mini: LaytonTokenizer) -> None:
    assert mini.default_decoder == "consistency"
    assert set(mini.decoders) == {"light", "diffusion", "consistency", "instaflow", "hipa"}


def test_saved_in_any_type_it_loads_again_and_trained_decoders_are_not_saved_under_others(
    mini: LaytonTokenizer, tmp_path: Path
) -> None:
    mini.save_pretrained(tmp_path / "narrow", dtype=torch.bfloat16)  # from fp16: rounded twice
    narrow = LaytonTokenizer.from_pretrained(tmp_path / "narrow")
    assert set(narrow.decoders) == set(mini.decoders)
    for name, first in (("diffusion", "consistency"), ("light", "diffusion")):
        weights = next(p for n, p in narrow.decoder(name).named_parameters() if "transformer" in n or "controlnet" in n)
        weights.data.add_(1.0)
        with pytest.raises(ValueError, match=rf"'{first}' cannot be saved so: it learnt by a decoder '{name}'"):
            narrow.save_pretrained(tmp_path / "none")
        for other in ("consistency", "instaflow", "hipa") if name == "diffusion" else ():
            del narrow.decoders[other]
    assert not (tmp_path / "none").exists()


def test_plain_diffusers_draws_with_the_text_to_image_model() -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(MINI / "ldm", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("a red star", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt")
    assert drawn.images.shape == (1, 3, 256, 256) and bool(drawn.images.isfinite().all())


def test_the_text_to_image_model_draws_objects_where_its_prompts_say() -> None:
    prompts, seeds = ["a red circle", "two green squares", "a blue ring left of a yellow heart"], [20, 21, 22]
    said = PlacedPrompts.from_pretrained("mini")(prompts, seeds)
    images = load_drawer(DrawerOptions("mini", "diffusion", planner="mini")).draw(prompts, seeds)
    for phrases, image in zip(said, images, strict=True):
        found = {(item.colour, item.shape, item.cx, item.cy) for item in find_objects(image)}
        assert len(found) == len(phrases.split(", "))
        for phrase in phrases.split(", "):
            colour, shape, _, square = phrase.split()
            x, y = SQUARE_TOKENS[square]
            near = {(c, s) for c, s, cx, cy in found if abs(cx - x) < 0.08 and abs(cy - y) < 0.08}
            assert near == {(colour, shape)}, phrase


def test_its_few_step_student_does_so_in_four_steps() -> None:
    prompts = ["red circle <30> <h8>", "green square <28> <e6>", "blue ring <30> <i9>"]
    drawer = load_drawer(DrawerOptions("mini", "diffusion", student="mini", steps=4))
    assert drawer.settings["num_inference_steps"] == 4 and drawer.settings["guidance_scale"] == 1.0
    images = drawer.draw(prompts, [0, 1, 2])
    found = [[(item.colour, item.shape) for item in find_objects(image)] for image in images]
    assert sum(each == [tuple(prompt.split()[:2])] for each, prompt in zip(found, prompts, strict=True)) >= 2


def test_the_embedded_laytongen_draws_what_it_plans_the_same_in_any_batch() -> None:
    pipe = LaytonGenPipeline.from_pretrained("mini", decoders=["light"])
    prompts = ["a yellow ring", "two green squares", "a red circle left of a blue star"]
    alone = [
        pipe(prompt, generator=torch.Generator().manual_seed(number), output_type="codes").codes
        for number, prompt in enumerate(prompts)
    ]
    seeds = [torch.Generator().manual_seed(number) for number in range(3)]
    both = pipe(prompts, generator=seeds, decoder="light", output_type="np")
    assert both.codes.equal(torch.cat(alone)) and both.codes.unique().numel() > 50
    planned = [[item.labels for item in layout] for layout in both.layouts if layout is not None]
    assert planned == [[("ring", "yellow")], [("square", "green")] * 2, planned[2]]
    assert sorted(planned[2]) == [("circle", "red"), ("star", "blue")]
    found = [find_objects((image * 255).round().astype("uint8")) for image in both.images]
    assert [sorted((item.shape, item.colour) for item in each) for each in found] == [sorted(each) for each in planned]


def test_the_embedded_laytongen_foresees_codes_and_listens() -> None:
    generator = load_generator(find_generator("mini"))
    tokenizer = LaytonTokenizer.from_pretrained("mini", decoders=[])
    generator.card.require_tokenizer(tokenizer)
    source = ScenesSource(split="test", length=8, textures=["plain"])  # all that it is trained to paint
    samples = [source.sample(index, seed=0) for index in range(8)]
    codes = tokenizer.encode(torch.stack([sample["image"] for sample in samples]))
    scenes = [sample_scene(int(sample["key"].removeprefix("scenes/"))) for sample in samples]
    layout = torch.stack([torch.from_numpy(objects_placed(scene, 64)) for scene in scenes])
    text = generator.text_encoder.encode([sample["caption"] for sample in samples])
    losses = []
    for told in (layout, None, layout.roll(1, 0)):
        with torch.no_grad():
            logits = generator.transformer(codes, text.features, text.mask, layout=told)
        losses.append(float(F.cross_entropy(logits.flatten(0, 1), codes.flatten())))
    assert losses[0] < 1.6 and losses[0] + 0.05 < losses[1] < losses[2]  # nothing known would be 9.7


def test_runs_can_start_from_its_parts_by_name() -> None:
    whole = LaytonTokenizer.from_pretrained("mini", decoders=["light"])
    parts = (
        pretrained.vit_encoder("mini"),
        pretrained.quantizer("mini", frozen=True),
        pretrained.pixel_decoder("mini"),
    )
    light = whole.decoder("light").network
    for part, own in zip(parts, (whole.encoder, whole.quantizer, light), strict=True):
        mine, wanted = part.state_dict(), own.state_dict()  # type: ignore[attr-defined,union-attr,operator]
        assert mine.keys() == wanted.keys() and all(torch.equal(mine[name], wanted[name]) for name in mine)
