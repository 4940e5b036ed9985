from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from laytongen_parts import (
    CODES,
    LENGTH,
    SIZE,
    TOKENS,
    WIDTH,
    tiny_generator,
    tiny_planner,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_transformer,
)
from lightning.pytorch import Trainer
from torch.optim import AdamW

from generation.data.source import TokenShards, require_layouts
from generation.data.tokenizing import TokenizeJob, tokenize_dataset
from generation.evaluation.likelihood import score_next_codes
from generation.generator import Generator, load_generator, save_generator
from generation.model.cache import CachedDecoder
from generation.model.layout import LayoutControl, LayoutShape, PlacedObject, read_layout, scenes_layout
from generation.model.shapes import Dropout
from generation.model.transformer import LaytonGenTransformer
from generation.pipeline import LaytonGenPipeline
from generation.planner import LayoutPlanner
from generation.pretrained import laytongen_transformer
from generation.sampling.codes import SamplingOptions, seeded_generators
from generation.sampling.decoding import generate_codes
from generation.sampling.guidance import Guidance
from generation.tasks.laytongen import LaytonGenTask
from generation.tasks.planner import LayoutPlannerTask
from generation.text.encoders import TransformersTextEncoder
from layton.cli import main
from layton.data.loader import collate
from layton.data.module import ImageDataModule
from layton.data.prompts import SceneCaptions
from layton.data.sources import ScenesSource
from layton.scenes import caption, object_cells, objects_placed, objects_shown, sample_scene

SHAPE = scenes_layout()
STAR = PlacedObject(("star", "red"), 0.3, 0.4, 0.3)
RING = PlacedObject(("ring", "blue"), 0.8, 0.7, 0.25)
GREEDY, HOT = SamplingOptions(temperature=0.0), SamplingOptions(temperature=1.0)


def told_transformer(*, strength: float = 0.5) -> LaytonGenTransformer:
    """A transformer to whom layouts matter."""
    model = tiny_transformer()
    model.learn_layouts(SHAPE)
    assert model.layout_control is not None
    torch.nn.init.normal_(model.layout_control.out.weight, std=strength, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def planner() -> LayoutPlanner:
    """One that writes objects: of "two objects" now near each other and now far apart, of others always the same."""
    made, encoder = tiny_planner(SHAPE), tiny_text_encoder()
    near = replace(RING, x=0.35, y=0.45)
    said = {"two objects": [[STAR, RING], [STAR, near]], "a red star": [[STAR]], "two blue rings": [[RING, near]]}
    pairs = [(caption, layout) for caption, layouts in said.items() for layout in layouts]
    text = encoder.encode([caption for caption, _ in pairs])
    layouts = torch.stack([SHAPE.tensor(layout) for _, layout in pairs])
    optimizer = AdamW(made.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        made.losses(text, layouts).sum((1, 2)).mean().backward()
        optimizer.step()
    made.text_encoder = encoder.fingerprint()
    return made.eval().requires_grad_(False)


def told_generator(planner: LayoutPlanner | None) -> Generator:
    plain = tiny_generator(tiny_tokenizer())
    model = plain.transformer
    model.learn_layouts(SHAPE)
    assert model.layout_control is not None
    torch.nn.init.normal_(model.layout_control.out.weight, std=2.0, generator=torch.Generator().manual_seed(0))
    return replace(plain, planner=planner)


def some_layouts() -> torch.Tensor:
    return torch.stack([SHAPE.tensor([STAR, RING]), SHAPE.tensor([]), SHAPE.untold(1)[0]])


def test_objects_survive_their_numbers() -> None:
    layout = SHAPE.tensor([STAR, RING])
    found = SHAPE.objects_of(layout)
    assert found is not None
    assert [item.labels for item in found] == [STAR.labels, RING.labels]
    for item, known in zip(found, (STAR, RING), strict=True):
        assert (item.x, item.y, item.diameter) == pytest.approx((known.x, known.y, known.diameter), abs=0.5 / 64)
    assert SHAPE.tensor(found).equal(layout)
    assert SHAPE.objects_of(SHAPE.tensor([])) == []
    assert SHAPE.objects_of(SHAPE.untold(1)[0]) is None
    assert LayoutShape(**json.loads(json.dumps({"labels": SHAPE.labels, "objects": 5, "steps": 64}))) == SHAPE


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([STAR] * 6, "at most 5 objects, got 6"),
        ([replace(STAR, labels=("moon", "red"))], "got 'moon'"),
        ([replace(STAR, labels=("star",))], "has 2 labels"),
        ([replace(STAR, x=1.2)], r"in \[0, 1\], got \(1.2"),
    ],
)
def test_what_is_no_layout_is_refused(objects: list[PlacedObject], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SHAPE.tensor(objects)


def test_layouts_of_scenes_say_what_stands_where() -> None:
    for seed in range(40):
        scene = sample_scene(seed)
        found = SHAPE.objects_of(torch.from_numpy(objects_placed(scene, 64)))
        assert found is not None
        assert [item.labels for item in found] == [(item.shape, item.colour) for item in scene.objects]
        for item, known in zip(found, scene.objects, strict=True):
            assert (item.x, item.y, item.diameter) == pytest.approx((known.cx, known.cy, known.diameter), abs=1 / 64)


def test_cells_that_an_object_touches_are_told_of_it() -> None:
    control, told, touched_at_all = LayoutControl(SHAPE, 256, 8), 0, 0
    for seed in range(60):
        scene = sample_scene(seed)
        labels, numbers = control.seen(torch.from_numpy(objects_placed(scene, 64))[None])
        named = labels[0, :, 0].view(16, 16) > 0
        cells = torch.from_numpy(object_cells(scene, 16))
        told, touched_at_all = told + int((named & cells).sum()), touched_at_all + int(cells.sum())
        assert float(named.float().mean()) < 0.75  # and not simply all of them
        if len(scene.objects) == 1:
            shown = torch.from_numpy(objects_shown(scene, 16))
            touched = shown[:, 0] > 0
            both = touched & named.flatten()
            assert labels[0][both].equal(shown[both, :2])
        assert bool((numbers[0][~named.flatten()] == 0).all())
    assert told >= 0.99 * touched_at_all  # a corner may be missed by the rounding of places


def test_a_transformer_goes_on_as_it_was_until_it_has_learnt_to_be_told(tmp_path: Path) -> None:
    plain = tiny_transformer()
    plain.save_pretrained(tmp_path)
    model = laytongen_transformer(str(tmp_path), layout=SHAPE).eval()
    codes, features = torch.randint(CODES, (3, TOKENS)), torch.randn(3, LENGTH, WIDTH)
    assert model(codes, features, layout=some_layouts()).equal(plain(codes, features))
    with pytest.raises(ValueError, match="was not trained with layouts"):
        plain(codes, features, layout=some_layouts())
    with pytest.raises(ValueError, match=r"int64 \(3, 5, 5\)"):
        model(codes, features, layout=some_layouts()[:2])
    model.save_pretrained(tmp_path / "told")
    again = laytongen_transformer(str(tmp_path / "told"), layout=SHAPE).eval()
    assert model.dropout == again.dropout == Dropout()
    still = laytongen_transformer(str(tmp_path / "told"), dropout=Dropout(0.0, 0.0, 0.2))
    assert still.dropout.token == still.config["dropout"]["token"] == still.blocks[0].residual_dropout == 0.0  # type: ignore[index,call-overload]
    assert still.blocks[1].ffn_dropout == 0.2
    assert again(codes, features, layout=some_layouts()).equal(plain(codes, features))
    with pytest.raises(ValueError, match="is told layouts of"):
        laytongen_transformer(str(tmp_path / "told"), layout=replace(SHAPE, steps=32))


def test_what_is_told_matters_and_what_is_not_changes_nothing() -> None:
    model = told_transformer()
    codes, features = torch.randint(CODES, (3, TOKENS)), torch.randn(3, LENGTH, WIDTH)
    told, plain = model(codes, features, layout=some_layouts()), model(codes, features)
    assert (told - plain).abs().amax((1, 2))[:2].min() > 1e-3
    torch.testing.assert_close(told[2], plain[2])
    # an object in the last cell is not known of before it comes: control acts where a code is predicted
    late = replace(STAR, x=0.9, y=0.95, diameter=0.01)
    one, none = (model(codes[:1], features[:1], layout=SHAPE.tensor(each)[None]) for each in ([late], []))
    torch.testing.assert_close(one[:, :-1], none[:, :-1])
    assert (one[:, -1] - none[:, -1]).abs().max() > 1e-3


def test_cached_decoding_is_told_the_same() -> None:
    model, layout = told_transformer(), some_layouts()
    codes, features = torch.randint(CODES, (3, TOKENS)), torch.randn(3, LENGTH, WIDTH)
    whole = model(codes, features, layout=layout)
    decoder = CachedDecoder(model, features, layout=layout)
    steps = [decoder.prefill(codes[:, :3]), *(decoder.step(codes[:, place]) for place in range(3, TOKENS - 1))]
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, 3:], rtol=1e-4, atol=1e-5)
    positions = torch.arange(TOKENS).expand(3, TOKENS)
    torch.testing.assert_close(model(codes, features, layout=layout, positions=positions), whole)
    # two codes of a window, told what lies at their own places: the same object shifted by one row of the grid
    moved = torch.stack([SHAPE.tensor([replace(STAR, x=0.5, y=y, diameter=0.01)]) for y in (0.35, 0.6)])
    two, places = codes[:1, :2].expand(2, 2), torch.tensor([[5, 6], [9, 10]])
    control = model.control(moved, 2)
    assert control is not None
    torch.testing.assert_close(control[0, places[0]], control[1, places[1]])
    assert bool(control[0, places[0]].abs().sum() > 0)
    windows = model(two, features[:1].expand(2, -1, -1), layout=moved, positions=places)
    unplaced = model(two, features[:1].expand(2, -1, -1), layout=moved)
    assert not torch.allclose(windows, unplaced, atol=1e-3)


def test_guidance_compares_with_nothing_told() -> None:
    model, layout, features = told_transformer(), some_layouts(), torch.randn(3, LENGTH, WIDTH)

    def draw(layout: torch.Tensor | None, rows: slice = slice(None), **options: Any) -> torch.Tensor:
        chosen = None if layout is None else layout[rows]
        return generate_codes(model, features[rows], sampling=GREEDY, layout=chosen, **options)

    made = draw(layout, guidance=Guidance(3.0))
    first = model(made, features, layout=layout)[:, 0]
    null = model(made, model.null_condition(features))[:, 0]
    assert made[:, 0].equal((null + 3.0 * (first - null)).argmax(-1))
    assert made[1:2].equal(draw(layout, slice(1, 2), guidance=Guidance(3.0)))  # in any batch
    assert draw(layout)[2].equal(draw(None)[2])
    assert not draw(layout)[0].equal(draw(None)[0])


def test_token_shards_and_captions_bring_layouts(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenize_dataset(TokenizeJob(ScenesSource(length=4, size=SIZE), tokenizer, "scenes"), tmp_path)
    shards, said = TokenShards(str(tmp_path), placed=64), SceneCaptions(length=4, placed=64)
    for index in range(4):
        wanted = objects_placed(sample_scene(index), 64)
        for sample in (shards.sample(index, seed=1), said.sample(index, seed=1)):
            assert (sample["layout"].numpy() == wanted).all()
    assert "layout" not in TokenShards(str(tmp_path)).sample(0, seed=0)
    large = SceneCaptions(length=500, placed=64, min_diameter=0.18)
    for index in range(30):
        sample = large.sample(index, seed=0)
        _, task, seed = sample["key"].split("/")
        scene = sample_scene(int(seed), task=task)
        assert min(item.diameter for item in scene.objects) > 0.15
        assert sample["caption"] == caption(scene)
        assert (sample["layout"].numpy() == objects_placed(scene, 64)).all()
        assert scene.task == sample_scene(index).task


def planner_task(planner: LayoutPlanner, lr: float = 1e-2) -> LayoutPlannerTask:
    encoder = tiny_text_encoder()
    return LayoutPlannerTask(planner, encoder, optimizer=lambda parameters: AdamW(parameters, lr=lr)).train()


def test_a_planner_goes_on_with_its_own_text_encoder_and_layouts(tmp_path: Path) -> None:
    task, saved = planner_task(tiny_planner(SHAPE)), {}
    task.on_save_checkpoint(saved)
    planner_task(tiny_planner(SHAPE)).on_load_checkpoint(saved)
    other = LayoutPlannerTask(tiny_planner(SHAPE), tiny_text_encoder(seed=1), optimizer=AdamW)
    with pytest.raises(ValueError, match="another frozen text encoder"):
        other.on_load_checkpoint(saved)
    settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", max_steps=1, enable_checkpointing=False, **settings)
    with pytest.raises(ValueError, match="in 32 steps"):
        trainer.fit(task, datamodule=ImageDataModule(SceneCaptions(length=4, placed=32), batch_size=2))


def test_a_planner_learns_what_captions_ask_for(tmp_path: Path) -> None:
    task = planner_task(tiny_planner(SHAPE))
    captions = ["a red star", "two blue rings", ""]
    layouts = [[STAR], [RING, replace(RING, x=0.2)], []]
    batch = {"caption": captions, "layout": torch.stack([SHAPE.tensor(each) for each in layouts])}
    optimizer = AdamW(task.trainable_parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = task.training_step(batch, 0)
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.0
    task.export(tmp_path)
    planner = LayoutPlanner.from_pretrained(tmp_path / "planner")
    encoder = tiny_text_encoder()
    assert planner.text_encoder == encoder.fingerprint()
    text = encoder.encode(captions)
    drawn = planner.draw(text, seeded_generators([0, 1, 2]))
    assert drawn.equal(batch["layout"])
    alone = planner.draw(text.pick(torch.tensor([1])), seeded_generators([1]))
    assert alone.equal(drawn[1:2])


def test_a_text_encoder_that_learns_with_the_planner_is_exported_with_it(tmp_path: Path) -> None:
    encoder = tiny_text_encoder(trainable=True)
    before = encoder.fingerprint()
    task = LayoutPlannerTask(tiny_planner(SHAPE), encoder, optimizer=lambda parameters: AdamW(parameters, lr=1e-2))
    batch = {"caption": ["a red star"], "layout": SHAPE.tensor([STAR])[None]}
    optimizer = AdamW(task.trainable_parameters(), lr=1e-2)
    task.train().training_step(batch, 0).backward()
    optimizer.step()
    task.export(tmp_path)
    planner = LayoutPlanner.from_pretrained(tmp_path / "planner")
    saved = TransformersTextEncoder.from_pretrained(tmp_path / "text_encoder")
    assert planner.text_encoder == saved.fingerprint() == encoder.fingerprint() != before


def test_of_several_layouts_that_with_the_least_overlap_is_kept(
    planner: LayoutPlanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = replace(RING, x=RING.x - 0.1)
    layouts = torch.stack([SHAPE.tensor(each) for each in ([STAR, RING], [near, RING], [RING, RING], [])])
    overlap = SHAPE.overlap(layouts)
    assert overlap.tolist() == pytest.approx([0.0, 1 - 0.1 / 0.25, 1.0, 0.0], abs=0.05)
    text = tiny_text_encoder().encode(["two objects"] * 24)
    once = planner.draw(text, seeded_generators(list(range(24))))
    monkeypatch.setattr(planner, "tries", 6)
    best = planner.draw(text, seeded_generators(list(range(24))))
    assert SHAPE.overlap(once).max() > 0.1
    assert SHAPE.overlap(best).max() == 0
    assert SHAPE.alike(torch.stack([once, best])).all()
    other = torch.stack([layouts, layouts[[0, 1, 0, 0]]])  # two stars' names are not those of a star and a ring
    assert SHAPE.alike(other)[1].tolist() == [True, True, False, False]


def test_a_table_of_another_shape_is_planned_too() -> None:
    shape = LayoutShape((("a", "b"),), objects=8, steps=16)
    made, encoder = tiny_planner(shape), tiny_text_encoder()
    layouts = torch.stack(
        [shape.tensor([PlacedObject((name,), 0.2, 0.7, 0.3)] * n) for name, n in (("a", 7), ("b", 2))]
    )
    text = encoder.encode(["seven a", "two b"])
    optimizer = AdamW(made.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        made.losses(text, layouts).sum((1, 2)).mean().backward()
        optimizer.step()
    assert made.eval().draw(text, seeded_generators([0, 1])).equal(layouts)
    with pytest.raises(ValueError, match="that are given, some are not"):
        made.losses(text, shape.untold(2))


def test_what_ends_a_layout_is_learnt_and_nothing_behind_it() -> None:
    planner, encoder = tiny_planner(SHAPE), tiny_text_encoder()
    losses = planner.losses(encoder.encode(["a", "b"]), torch.stack([SHAPE.tensor([STAR, RING]), SHAPE.tensor([])]))
    counted = losses > 0
    assert counted[0].sum().item() == 2 * 5 + 1
    assert counted[1].sum().item() == 1
    assert bool(counted[0, 2, 0] & counted[1, 0, 0])


def test_rows_that_are_no_objects_end_a_drawn_layout() -> None:
    made, encoder = tiny_planner(SHAPE), tiny_text_encoder()
    for weight in made.transformer.parameters():  # nearly even: one row in fifty names an object
        torch.nn.init.normal_(weight, std=0.02)
    text = encoder.encode(["a red star"] * 400)
    drawn = made.draw(text, seeded_generators(list(range(400))))
    SHAPE.check(drawn, 400)
    there = (drawn[..., :2] > 0).all(-1)
    assert 0 < int(there[:, 0].sum()) < 100
    assert bool((there | (drawn == 0).all(-1)).all())
    assert bool((there[:, :-1] | ~there[:, 1:]).all())


@pytest.mark.filterwarnings("ignore:.*encoder's vocabulary")
def test_a_generator_learns_to_be_told(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenize_dataset(TokenizeJob(ScenesSource(length=8, size=SIZE), tokenizer, "scenes"), tmp_path / "tokens")
    shards = TokenShards(str(tmp_path / "tokens"), placed=64)
    model = tiny_transformer(dropout=0.0)
    model.learn_layouts(SHAPE)
    task = LaytonGenTask(
        model,
        tiny_text_encoder(),
        optimizer=lambda parameters: AdamW(parameters, lr=3e-3),
        tokenizer=str(tmp_path / "tokenizer"),
        layout_dropout=0.5,
    ).train()
    batch = collate([shards.sample(index, seed=0) for index in range(8)])
    batch["caption"] = ["a scene"] * 8  # what tells them apart is the layout alone
    optimizer = AdamW(task.trainable_parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        task.training_step(batch, 0).backward()
        optimizer.step()
    task.eval()
    untold = {name: value for name, value in batch.items() if name != "layout"}
    assert task.validation_step(batch, 0).item() < task.validation_step(untold, 0).item() - 0.1
    require_layouts([shards, SceneCaptions(length=4, placed=64), SceneCaptions(length=4)], SHAPE)
    for other in (TokenShards(str(tmp_path / "tokens"), placed=32), SceneCaptions(length=4, placed=32)):
        for shape in (SHAPE, None):
            with pytest.raises(ValueError, match="in 32 steps"):
                require_layouts([other], shape)
    same = {**batch, "contrary": batch["caption"]}  # a false caption that is the true one explains codes as well
    contrasted = LaytonGenTask(
        model.train(),
        task.text_encoder,
        optimizer=lambda parameters: AdamW(parameters, lr=3e-3),
        tokenizer=str(tmp_path / "tokenizer"),
        contrast=1.0,
        caption_dropout=0.0,
    )
    assert contrasted.supervised_terms(same)[0]["contrast"].item() == pytest.approx(math.log(2), abs=1e-3)
    task.eval()
    task.export(tmp_path / "export")
    generator = load_generator(tmp_path / "export")
    assert score_next_codes(generator, shards).cross_entropy != pytest.approx(
        score_next_codes(generator, TokenShards(str(tmp_path / "tokens"))).cross_entropy, abs=1e-3
    )


def test_a_pipeline_plans_and_obeys(planner: LayoutPlanner, tmp_path: Path) -> None:
    generator = told_generator(planner)
    pipe = LaytonGenPipeline(generator, tiny_tokenizer())
    prompts = ["a red star", "", "two blue rings"]

    def draw(pipeline: LaytonGenPipeline = pipe, **options: Any) -> Any:
        return pipeline(prompts, generator=seeded_generators([4, 5, 6]), output_type="codes", **options)

    planned = draw()
    assert planned.layouts[1] is None  # of no prompt nothing is planned
    assert [item.labels for item in planned.layouts[0]] == [STAR.labels]
    assert [item.labels for item in planned.layouts[2]] == [RING.labels, RING.labels]
    assert draw(batch_size=1).codes.equal(planned.codes)
    assert draw(batch_size=1).layouts == planned.layouts
    again = draw(layouts=planned.layouts)  # the same told by the user gives the same images
    assert again.codes.equal(planned.codes)
    assert again.layouts == planned.layouts
    silent = draw(layouts=[None, None, None])
    assert silent.layouts == (None, None, None)
    assert not silent.codes.equal(draw(layouts=[[STAR], [], [RING]]).codes)
    with pytest.raises(ValueError, match="3 prompts need as many layouts, a list of objects each"):
        draw(layouts=[[STAR]])
    free = torch.full((3, TOKENS), -1)
    assert draw(known_codes=free).codes.equal(planned.codes)
    some = torch.where(torch.arange(TOKENS) < 2, planned.codes, free)
    with pytest.warns(UserWarning, match="nobody plans"):  # a planner cannot look at what is known already
        kept = draw(known_codes=some)
    assert kept.layouts == (None, None, None)
    assert draw(known_codes=some, layouts=[None] * 3).codes.equal(kept.codes)
    with pytest.raises(ValueError, match="a list of objects each"):
        pipe("a red star", layouts=[STAR])  # type: ignore[list-item]
    pipe.save_pretrained(tmp_path)
    assert draw(LaytonGenPipeline.from_pretrained(tmp_path)).codes.equal(planned.codes)
    without = LaytonGenPipeline(replace(generator, planner=None), tiny_tokenizer())
    with pytest.warns(UserWarning, match="nothing tells it: its pictures may stay empty"):
        assert draw(without).codes.equal(silent.codes)
    assert draw(without, layouts=[None] * 3).codes.equal(silent.codes)
    assert draw(without, layouts=planned.layouts).codes.equal(planned.codes)
    without.save_pretrained(tmp_path)  # over the other
    assert LaytonGenPipeline.from_pretrained(tmp_path).planner is None
    plain = LaytonGenPipeline(tiny_generator(tiny_tokenizer()), tiny_tokenizer())
    assert draw(plain).layouts == (None, None, None)
    with pytest.raises(ValueError, match="was not trained with any"):
        draw(plain, layouts=[[STAR], None, None])


def test_a_planner_goes_along_with_what_learnt_beside_it(planner: LayoutPlanner, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    settings = {"optimizer": AdamW, "tokenizer": str(tmp_path / "tokenizer"), "planner": planner}
    model = tiny_transformer(dropout=0.0)
    with pytest.raises(ValueError, match="the planner makes"):
        LaytonGenTask(model, tiny_text_encoder(), **settings)
    model.learn_layouts(SHAPE)
    with pytest.raises(ValueError, match="that must not learn"):
        LaytonGenTask(model, tiny_text_encoder(trainable=True), **settings)
    with pytest.raises(ValueError, match="another text encoder"):
        LaytonGenTask(model, tiny_text_encoder(seed=1), **settings)
    task = LaytonGenTask(model, tiny_text_encoder(), **settings)
    assert not any("planner" in name for name in task.state_dict())
    task.export(tmp_path / "export")
    pipe = LaytonGenPipeline.from_pretrained(tmp_path / "export", tokenizer=tmp_path / "tokenizer")
    assert pipe("a red star", output_type="codes").layouts[0] is not None


def test_a_planner_for_another_generator_is_refused(planner: LayoutPlanner) -> None:
    generator = told_generator(planner)
    assert generator.planner is not None
    with pytest.raises(ValueError, match="is told layouts of None"):
        replace(tiny_generator(tiny_tokenizer()), planner=generator.planner)
    other = tiny_planner(SHAPE)
    with pytest.raises(ValueError, match="of another text encoder"):
        replace(generator, planner=other)


def test_generate_takes_a_layout_and_says_which_was_drawn(
    planner: LayoutPlanner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    save_generator(tmp_path / "model" / "laytongen", told_generator(planner))
    words = ["generate", "a red star", "--model", str(tmp_path / "model"), "--json"]
    wanted = [{"labels": ["star", "red"], "x": 0.3, "y": 0.4, "diameter": 0.3}]
    (tmp_path / "layout.json").write_text(json.dumps(wanted))
    given = ["--layout", str(tmp_path / "layout.json")]
    for name, more in (("own", given), ("none", ["--no-layout"]), ("planned", [])):
        assert main([*words, str(tmp_path / f"{name}.json"), "--out", str(tmp_path / name), *more]) == 0
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("own", "none", "planned")}
    assert found["own"]["layouts"][0][0]["labels"] == ["star", "red"]
    assert found["none"]["layouts"] == [None]
    assert found["planned"]["settings"]["planner"] is not None
    assert found["own"]["settings"]["planner"] is found["none"]["settings"]["planner"] is None  # nobody planned
    pictures = [(tmp_path / name / found[name]["files"][0]).read_bytes() for name in found]
    assert pictures[0] != pictures[1]
    again = ["--layout", str(tmp_path / "own.json")]  # what was written is read
    assert main([*words, str(tmp_path / "again.json"), "--out", str(tmp_path / "again"), *again]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["layouts"] == found["own"]["layouts"]
    (tmp_path / "two.json").write_text(json.dumps({"layouts": [[], []]}))
    with pytest.raises(ValueError, match="tells of 2 images"):
        read_layout(tmp_path / "two.json")
    (tmp_path / "layout.json").write_text('[{"labels": ["star"], "x": true, "y": 0, "diameter": 0}]')
    assert main([*words, str(tmp_path / "x.json"), "--out", str(tmp_path / "x"), *given]) == 1
    assert "x, y and diameter are numbers in [0, 1]" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("text", ["{}", "[1]", "no", '[{"labels": "star", "x": 0, "y": 0, "diameter": 0}]'])
def test_files_that_hold_no_layout_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "layout.json").write_text(text)
    with pytest.raises(ValueError, match=r"layout\.json"):
        read_layout(tmp_path / "layout.json")
