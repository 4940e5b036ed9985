from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from laytongen_parts import CODES, LENGTH, TOKENS, WIDTH, tiny_generator, tiny_text_encoder, tiny_tokenizer, write_model
from torch import Tensor
from torch.optim import AdamW
from torch.testing import assert_close

from generation.caption_judge import CaptionJudge
from generation.data.source import TokenShards
from generation.data.token_shards import verify
from generation.data.tokenizing import TokenizeJob, tokenize_dataset
from generation.editing import keep_first
from generation.generator import SamplingDefaults
from generation.judge import Judge
from generation.pipeline import LaytonGenPipeline
from generation.pretrained import judge as judge_from
from generation.sampling.seeding import child_generator
from generation.tasks.judge import JudgeTask, _told_apart
from generation.tasks.rewards import Reward, Scores
from generation.tasks.rollouts import draw_rollouts
from layton.cli import main
from layton.data.loader import collate
from layton.data.prompts import SceneCaptions
from layton.data.sources import ScenesSource
from layton.ldm.text import build_text_encoder
from layton.scenes import sample_scene
from layton.sceneval.prompts import spec_of_caption

GRID = 4


def tiny_judge(*, seed: int = 0) -> Judge:
    torch.manual_seed(seed)
    return Judge(
        code_dim=4,
        grid=GRID,
        text_width=WIDTH,
        text_length=LENGTH,
        width=32,
        image_depth=1,
        caption_depth=1,
        num_heads=2,
    ).eval()


def caption_judge() -> CaptionJudge:
    return CaptionJudge(tiny_judge(), tiny_text_encoder(), tiny_tokenizer().fingerprint())


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def test_the_verdict_depends_on_image_and_caption_alone() -> None:
    judge, generator = tiny_judge(), torch.Generator().manual_seed(0)
    images = torch.randn(3, 4, GRID, GRID, generator=generator)
    features = torch.randn(3, 6, WIDTH, generator=generator)
    mask = torch.tensor([[True] * 6, [False] * 2 + [True] * 4, [False] * 5 + [True]])
    with torch.no_grad():
        odds = judge(images, features, mask)
        alone = [judge(images[row : row + 1], features[row : row + 1], mask[row : row + 1]) for row in range(3)]
        assert_close(torch.cat(alone), odds)
        noisy = torch.where(mask[..., None], features, 9.0)
        assert_close(judge(images, noisy, mask), odds)
        more = torch.nn.functional.pad(features, (0, 0, 3, 0)), torch.nn.functional.pad(mask, (3, 0))
        assert_close(judge(images, *more), odds)
        assert not torch.allclose(judge(images.flip(0), features, mask), odds)
        assert not torch.allclose(judge(images.flip(3), features, mask), odds)  # left is not right
        assert not torch.allclose(judge(images, features.flip(1), mask)[0], odds[0])  # words have an order
    with pytest.raises(ValueError, match=f"captions of {LENGTH} tokens, got {LENGTH + 1}"):
        judge(images, torch.zeros(3, LENGTH + 1, WIDTH), torch.ones(3, LENGTH + 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="even, got 5"):
        Judge(grid=5)


def test_a_saved_judge_is_the_same_and_knows_its_tokenizer(tmp_path: Path) -> None:
    judge, tokenizer = caption_judge(), tiny_tokenizer()
    codes = torch.randint(CODES, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    captions = ["a red circle", "two blue stars"]
    judge.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert_close(
        CaptionJudge.from_pretrained(tmp_path / "half").odds(tokenizer, codes, captions),
        judge.odds(tokenizer, codes, captions),
        atol=0.05,
        rtol=0.05,
    )
    judge.save_pretrained(tmp_path / "judge")
    loaded = CaptionJudge.from_pretrained(tmp_path / "judge")
    assert_close(loaded.odds(tokenizer, codes, captions), judge.odds(tokenizer, codes, captions))
    with pytest.raises(ValueError, match="reads codes of another tokenizer"):
        loaded.require_tokenizer(tiny_tokenizer(seed=1))
    shutil.rmtree(tmp_path / "judge" / "text_encoder")
    ldm = tmp_path / "ldm"
    judge.text_encoder.tokenizer.save_pretrained(ldm)
    judge.text_encoder.model.save_pretrained(ldm)
    beside = CaptionJudge.from_pretrained(tmp_path / "judge")
    assert_close(beside.odds(tokenizer, codes, captions), judge.odds(tokenizer, codes, captions))
    build_text_encoder(judge.text_encoder.tokenizer, width=WIDTH, depth=2, num_heads=2).save_pretrained(ldm)
    with pytest.raises(ValueError, match="another text encoder"):
        CaptionJudge.from_pretrained(tmp_path / "judge")


class _LikesHigh(CaptionJudge):
    """Likes images of high codes, whatever their captions say."""

    __slots__ = ()

    def odds(self, tokenizer: Any, codes: Tensor, captions: Any) -> Tensor:
        return codes.float().sum(1)


def picky_pipeline(*, candidates: int = 1) -> LaytonGenPipeline:
    tokenizer = tiny_tokenizer()
    judge = caption_judge()
    pipe = LaytonGenPipeline(
        tiny_generator(tokenizer), tokenizer, _LikesHigh(judge.judge, judge.text_encoder, judge.fingerprint)
    )
    object.__setattr__(pipe.card, "sampling", SamplingDefaults(guidance_scale=1.5, candidates=candidates))
    return pipe


def test_the_best_candidate_is_kept_in_any_batch() -> None:
    pipe, prompts = picky_pipeline(), ["a red circle", "two blue stars", "three hearts"]
    chosen = pipe(prompts, candidates=5, generator=seeds(0, 1, 2), output_type="codes").codes
    sampling, guidance = pipe.options(None, temperature=None, top_k=None, top_p=None)
    for index, (prompt, generator) in enumerate(zip(prompts, seeds(0, 1, 2), strict=True)):
        child_generator(generator)  # the decoder's
        children = [child_generator(generator) for _ in range(5)]
        text = pipe.encode_prompt([prompt] * 5)
        every = pipe.draw_codes(text, generators=children, sampling=sampling, guidance=guidance)
        assert len(every.unique(dim=0)) == 5
        assert every[every.sum(1).argmax()].equal(chosen[index])
    for index, prompt in enumerate(prompts):
        alone = pipe(prompt, candidates=5, generator=seeds(index), output_type="codes", batch_size=1).codes
        assert alone.equal(chosen[index : index + 1])
    few = pipe(prompts, candidates=5, generator=seeds(0, 1, 2), output_type="codes", batch_size=7).codes
    assert few.equal(chosen)
    two = pipe(prompts[0], candidates=5, num_images_per_prompt=2, generator=seeds(0, 1), output_type="codes").codes
    assert two[:1].equal(chosen[:1])


def test_the_model_says_how_many_candidates_where_there_is_a_judge() -> None:
    pipe = picky_pipeline(candidates=4)
    asked = pipe("a red circle", candidates=4, generator=seeds(3), output_type="codes").codes
    assert pipe("a red circle", generator=seeds(3), output_type="codes").codes.equal(asked)
    once = pipe("a red circle", candidates=1, generator=seeds(3), output_type="codes").codes
    pipe.judge = None
    assert pipe("a red circle", generator=seeds(3), output_type="codes").codes.equal(once)
    with pytest.raises(ValueError, match="chosen by a judge, and the pipeline has none"):
        pipe("a red circle", candidates=2)
    for count in (0, 65):
        with pytest.raises(ValueError, match=f"candidates must be in .* got {count}"):
            pipe("a red circle", candidates=count)
    for count in (0, 65):
        with pytest.raises(ValueError, match=f"candidates must be in .* got {count}"):
            SamplingDefaults(candidates=count)


def test_an_empty_prompt_is_not_judged() -> None:
    pipe = picky_pipeline()
    empty = pipe(["", "a red circle"], candidates=4, generator=seeds(0, 1), output_type="codes").codes
    generator = seeds(0)[0]
    child_generator(generator)
    sampling, guidance = pipe.options(None, temperature=None, top_k=None, top_p=None)
    first = pipe.draw_codes(
        pipe.encode_prompt([""]), generators=[child_generator(generator)], sampling=sampling, guidance=guidance
    )
    assert empty[:1].equal(first)


def test_codes_are_drawn_again_by_candidates() -> None:
    pipe = picky_pipeline()
    codes = pipe("a red circle", generator=seeds(0), output_type="codes").codes
    options: dict[str, Any] = {"known_codes": keep_first(codes, 6), "output_type": "codes"}
    best = pipe("a red circle", candidates=8, generator=seeds(5), **options).codes
    assert best[:, :6].equal(codes[:, :6])
    once = pipe("a red circle", candidates=1, generator=seeds(5), **options).codes
    assert best.sum() > once.sum()


def test_the_rollouts_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = write_model(tmp_path / "tiny"), tmp_path / "drawn"
    words = ["rollouts", "--model", str(model), "--out", str(out), "--count", "3"]
    assert main(words) == 0
    assert "0 of 6 images right" in capsys.readouterr().out  # noise shows nothing
    assert [path.name for path in out.iterdir()] == ["wrong"]
    assert len(TokenShards(str(out / "wrong"), untrue=True)) == 6
    made = json.loads((out / "wrong" / "manifest.json").read_text())["made_by"]
    assert (made["seed"], made["count"], made["decoder"]) == (0, 3, "light") and made["weights"]
    assert main(words) == 2


def test_a_judge_goes_on_learning(tmp_path: Path) -> None:
    caption_judge().save_pretrained(tmp_path)
    found = judge_from(str(tmp_path))
    assert found.training and all(parameter.requires_grad for parameter in found.parameters())


def test_a_judge_lies_beside_its_tokenizer_and_goes_with_the_pipeline(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    assert LaytonGenPipeline.from_pretrained(model).judge is None
    (model / "judge").mkdir()  # of a copy that was interrupted
    assert LaytonGenPipeline.from_pretrained(model).judge is None
    caption_judge().save_pretrained(model / "judge")
    pipe = LaytonGenPipeline.from_pretrained(model)
    given = LaytonGenPipeline.from_pretrained(model, tokenizer=tiny_tokenizer(), judge=pipe.judge)
    assert given.judge is pipe.judge
    wanted = pipe("a red circle", candidates=3, output_type="codes").codes
    pipe.save_pretrained(tmp_path / "copy")
    again = LaytonGenPipeline.from_pretrained(tmp_path / "copy")
    assert again("a red circle", candidates=3, output_type="codes").codes.equal(wanted)
    out = tmp_path / "out"
    words = ["generate", "a red circle", "--model", str(model), "--out", str(out), "--candidates", "3"]
    assert main(words) == 0
    again("a red circle", candidates=3).images[0].save(tmp_path / "wanted.png")
    assert next(out.iterdir()).read_bytes() == (tmp_path / "wanted.png").read_bytes()


class _Half(Reward):
    """Likes every second image."""

    def score(self, images: Tensor, captions: Any, keys: Any, *, grid: tuple[int, int]) -> Scores:
        return Scores(torch.arange(len(images)) % 2)


def judge_task(place: Path, **options: Any) -> JudgeTask:
    return JudgeTask(
        tiny_judge(),
        text_encoder=tiny_text_encoder(),
        tokenizer=str(place),
        optimizer=lambda parameters: AdamW(parameters, lr=3e-3),
        **options,
    )


def test_rollouts_are_kept_apart_and_taught(tmp_path: Path) -> None:
    pipe, out = picky_pipeline(candidates=4), tmp_path / "drawn"
    pipe.tokenizer.save_pretrained(tmp_path / "tokenizer")
    report = draw_rollouts(pipe, SceneCaptions(length=5), _Half(), out, images_per_prompt=2, batch_size=4)
    assert (report.right, report.wrong) == (5, 5)
    right, wrong = TokenShards(str(out / "right"), shown=2), TokenShards(str(out / "wrong"), untrue=True, shown=2)
    assert verify(out / "right") == verify(out / "wrong") == []
    with pytest.raises(ValueError, match="pass untrue=True"):
        TokenShards(str(out / "wrong"))
    samples = [source.sample(index, seed=0) for source in (right, wrong) for index in range(5)]
    said = [sample["caption"] or sample["contrary"] for sample in samples]
    assert said[:5] == said[5:]  # of each prompt one image was right
    assert [bool(sample["caption"]) for sample in samples] == [True] * 5 + [False] * 5
    once = pipe(said[0], candidates=1, generator=seeds(0), output_type="codes").codes[0]
    assert wrong.codes()[0].equal(once)
    task = judge_task(tmp_path / "tokenizer", reading=0.5).train()
    batch = collate(samples)
    loss = task.training_step(batch, 0)
    loss.backward()
    assert torch.isfinite(loss)
    asked = task._asked(batch, torch.Generator())
    assert [name for _, _, name in asked if name != "foreign"] == ["true"] * 5 + ["false"] * 5
    with pytest.raises(ValueError, match="exists already"):
        draw_rollouts(pipe, SceneCaptions(length=1), _Half(), out)


def test_it_learns_which_captions_hold(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    source = ScenesSource(split="train", length=12, size=tokenizer.image_size)
    tokenize_dataset(TokenizeJob(source, tokenizer, "scenes"), tmp_path / "tokens")
    tokens = TokenShards(str(tmp_path / "tokens"), shown=2)
    batch = collate([tokens.sample(index, seed=index) for index in range(12)])
    task = judge_task(tmp_path, reading=0.3).train()
    before = task.training_step(batch, 0).item()
    optimizer = AdamW(task.trainable_parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        task.training_step(batch, 0).backward()
        optimizer.step()
    assert task.training_step(batch, 0).item() < 0.5 * before
    task.eval().export(tmp_path / "judge")
    judge = CaptionJudge.from_pretrained(tmp_path / "judge")
    rows, captions, kinds = zip(*task._asked(batch, task.step_generator("judge", device="cpu")), strict=True)
    assert {*kinds} == {"true", "false", "foreign"}
    odds = judge.odds(tokenizer, batch["codes"][list(rows)], captions)
    assert _told_apart(odds, rows, kinds) > 0.9
    assert ((odds > 0) == torch.tensor([kind == "true" for kind in kinds])).float().mean() > 0.9
    false = {caption for caption, kind in zip(captions, kinds, strict=True) if kind == "false"}
    for row, caption, kind in zip(rows, captions, kinds, strict=True):
        assert (kind == "true") == (caption not in false) or kind == "foreign"
        scene = sample_scene(int(batch["key"][row].removeprefix("scenes/")))
        if kind == "false" and " of " not in caption:
            with pytest.raises(ValueError, match="no caption of scene"):
                spec_of_caption(scene, caption)


def test_a_judge_task_that_cannot_be_is_refused(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    for options, found in (
        ({"code_dropout": 1.0}, r"got 1\.0"),
        ({"reading": -1.0}, r"-1\.0"),
        ({"chinese": 2.0}, r"2\.0"),
    ):
        with pytest.raises(ValueError, match=found):
            judge_task(tmp_path, **options)
    task = judge_task(tmp_path, reading=0.1)
    batch = {"codes": torch.zeros(2, TOKENS, dtype=torch.int64), "caption": ["", ""], "key": ["a/1", "a/2"]}
    with pytest.raises(ValueError, match=r"no caption at all: \['a/1'"):
        task.training_step(batch, 0)
    with pytest.raises(ValueError, match="give TokenShards shown"):
        task.training_step({**batch, "caption": ["a", "b"]}, 0)
    checkpoint: dict[str, Any] = {"state_dict": {}}
    task.on_save_checkpoint(checkpoint)
    checkpoint["judge_reads"]["tokenizer"] = "another"
    with pytest.raises(ValueError, match="tokenizer: stored 'another'"):
        task.on_load_checkpoint(checkpoint)


def test_parts_that_a_judge_cannot_read_are_refused() -> None:
    judge, encoder, tokenizer = tiny_judge(), tiny_text_encoder(), tiny_tokenizer()
    short = Judge(code_dim=4, grid=GRID, text_width=WIDTH, text_length=LENGTH - 1, width=32, num_heads=2)
    with pytest.raises(ValueError, match=f"captions of {LENGTH - 1} x {WIDTH}"):
        CaptionJudge(short, encoder, "")
    wide = Judge(code_dim=4, grid=6, text_width=WIDTH, text_length=LENGTH, width=32, num_heads=2)
    with pytest.raises(ValueError, match=r"a grid of 6 .* got \(4, 4\)"):
        CaptionJudge(wide, encoder, tokenizer.fingerprint()).require_tokenizer(tokenizer)
    encoder.padding = "right"
    with pytest.raises(ValueError, match="on the left"):
        CaptionJudge(judge, encoder, "")
