from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laytongen_parts import CODES, SIZE, TOKENS, tiny_generator, tiny_tokenizer, write_model

from generation.demonstration import has_generator
from generation.drawing import LaytonGenDrawer
from generation.generator import find_generator, find_tokenizer, load_generator, save_generator
from generation.model.packing import packed
from generation.model.quantization import set_weights
from generation.model.weight_types import Weights
from generation.pipeline import LaytonGenPipeline, PromptCutWarning, UnreadWordsWarning
from layton import assets

PROMPTS = ["a red circle", "", "two blue stars", "写 😀\n\0"]

unread = pytest.mark.filterwarnings("ignore::generation.pipeline.UnreadWordsWarning")


@pytest.fixture(scope="module")
def pipe() -> LaytonGenPipeline:
    tokenizer = tiny_tokenizer()
    return LaytonGenPipeline(tiny_generator(tokenizer), tokenizer)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@unread
def test_codes_depend_on_prompt_and_seed_alone(pipe: LaytonGenPipeline) -> None:
    alone = [pipe(p, generator=seeds(i), output_type="codes").codes for i, p in enumerate(PROMPTS)]
    together = pipe(PROMPTS, generator=seeds(0, 1, 2, 3), output_type="codes").codes
    backwards = pipe(PROMPTS[::-1], generator=seeds(3, 2, 1, 0), output_type="codes", batch_size=3).codes
    assert together.equal(torch.cat(alone))
    assert backwards.flip(0).equal(together)
    assert not pipe(PROMPTS[0], generator=seeds(9), output_type="codes").codes.equal(alone[0])
    assert not pipe(PROMPTS[2], generator=seeds(0), output_type="codes").codes.equal(alone[0])


@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_smaller_weights_draw_the_same_in_any_batch(weights: Weights) -> None:
    tokenizer = tiny_tokenizer()
    small = LaytonGenPipeline(tiny_generator(tokenizer), tokenizer)
    set_weights(small.transformer, weights)
    prompts = ["a", "two blue stars", "a red circle left of a blue star", "a red circle"]
    together = small(prompts, generator=seeds(0, 1, 2, 3), output_type="codes").codes
    for row, prompt in enumerate(prompts):
        assert small(prompt, generator=seeds(row), output_type="codes").codes[0].equal(together[row])


def test_images_of_every_output_type_are_the_same_picture(pipe: LaytonGenPipeline) -> None:
    made = {kind: pipe("a red circle", num_images_per_prompt=2, output_type=kind) for kind in ("pil", "np", "pt")}
    assert made["pt"].images.shape == (2, 3, SIZE, SIZE)
    array = np.round(made["np"].images * 255).astype(np.uint8)
    assert np.array_equal(array, np.stack([np.asarray(image) for image in made["pil"].images]))
    assert np.allclose(made["pt"].images.permute(0, 2, 3, 1).numpy(), made["np"].images)
    assert made["pil"].codes.shape == (2, TOKENS)
    assert made["pil"].codes.unique(dim=0).shape[0] == 2  # two seeds, two images
    assert 0 <= int(made["pil"].codes.min()) <= int(made["pil"].codes.max()) < CODES
    assert pipe("a red circle", output_type="codes").images == []


def test_guidance_of_one_is_none_and_more_of_it_changes_codes(pipe: LaytonGenPipeline) -> None:
    def codes(**options: Any) -> torch.Tensor:
        return pipe("two blue stars", temperature=0.0, output_type="codes", **options).codes

    from generation.sampling.guidance import Guidance

    assert codes(guidance_scale=1.0).equal(codes(guidance_scale=Guidance()))
    assert codes(guidance_scale=1.5).equal(codes())  # the model's own default
    assert not codes(guidance_scale=5.0).equal(codes(guidance_scale=1.0))


def test_words_that_the_model_does_not_know_are_named(pipe: LaytonGenPipeline) -> None:
    with pytest.warns(UnreadWordsWarning, match="not in this model's vocabulary: cat, cats"):
        result = pipe(["a red circle", "a cat and two red cats"], output_type="codes")
    assert result.unread == ("cat", "cats") and not pipe("two stars", output_type="codes").unread


@unread
def test_a_long_prompt_is_cut_and_says_so(pipe: LaytonGenPipeline) -> None:
    with pytest.warns(PromptCutWarning, match="32 of its 10002 tokens"):
        result = pipe(["a", "x" * 10_000], output_type="codes")
    assert [(cut.index, cut.kept, cut.total) for cut in result.cut] == [(1, 32, 10_002)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": []},
        {"prompt": [3]},
        {"num_images_per_prompt": 0},
        {"num_images_per_prompt": 10**9},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"top_k": CODES + 1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"guidance_scale": float("inf")},
        {"guidance_scale": float("nan")},
        {"output_type": "latent"},
        {"decoder": "none"},
        {"num_inference_steps": 7},
        {"generator": [torch.Generator()] * 3},
        {"batch_size": 0},
        {"known_codes": torch.full((1, TOKENS), CODES)},
        {"known_codes": torch.full((2, TOKENS), -1)},
        {"known_codes": torch.full((1, TOKENS + 4), -1)},
    ],
    ids=lambda wrong: ",".join(wrong),
)
def test_values_out_of_range_are_refused(pipe: LaytonGenPipeline, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        pipe(**{"prompt": "a", **wrong})


def test_the_callback_sees_every_code(pipe: LaytonGenPipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipe("a", callback_on_step_end=lambda p, i, t, given: seen.append((i, int((given["codes"] >= 0).sum()))))
    assert seen == [(index, index + 1) for index in range(TOKENS)]


def test_a_saved_pipeline_draws_the_same(pipe: LaytonGenPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    loaded = LaytonGenPipeline.from_pretrained(tmp_path / "model")
    first, second = (each("a red circle", output_type="pt") for each in (pipe, loaded))
    assert first.codes.equal(second.codes)
    assert torch.allclose(first.images, second.images, atol=1e-5)
    pipe.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert LaytonGenPipeline.from_pretrained(tmp_path / "half").card == pipe.card


def test_another_tokenizer_or_text_encoder_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    other = tmp_path / "other"
    tiny_tokenizer(seed=1).save_pretrained(other)
    with pytest.raises(ValueError, match=r"another tokenizer \(fingerprint: stored '\w{16}', wanted '\w{16}'\)"):
        LaytonGenPipeline.from_pretrained(model, tokenizer=other)
    with pytest.raises(ValueError, match="name its tokenizer"):
        save_generator(tmp_path / "alone" / "gen", tiny_generator(tiny_tokenizer()))
        LaytonGenPipeline.from_pretrained(tmp_path / "alone" / "gen")
    from laytongen_parts import tiny_text_encoder

    with pytest.raises(ValueError, match="another text encoder"):
        load_generator(model / "laytongen", text_encoder=tiny_text_encoder(seed=5))


@unread
def test_no_part_sees_more_than_a_batch(pipe: LaytonGenPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, list[int]] = {"encode": [], "decode": []}
    encode, decode = pipe.text_encoder.encode, pipe.tokenizer.decode

    def counted_encode(prompts: Sequence[str]) -> Any:
        sizes["encode"].append(len(prompts))
        return encode(prompts)

    def counted_decode(codes: torch.Tensor, **options: Any) -> torch.Tensor:
        sizes["decode"].append(len(codes))
        return decode(codes, **options)

    prompts = PROMPTS + PROMPTS[:3]
    whole = pipe(prompts, num_images_per_prompt=2, generator=seeds(*range(14)), output_type="np", batch_size=14)
    monkeypatch.setattr(pipe.text_encoder, "encode", counted_encode)
    monkeypatch.setattr(pipe.tokenizer, "decode", counted_decode)
    for size in (1, 3, 4):
        sizes["encode"].clear(), sizes["decode"].clear()
        made = pipe(prompts, num_images_per_prompt=2, generator=seeds(*range(14)), output_type="np", batch_size=size)
        assert made.codes.equal(whole.codes)
        assert np.abs(made.images - whole.images).max() < 1e-4
        assert max(sizes["encode"]) <= size and max(sizes["decode"]) <= size
        assert sum(sizes["decode"]) == 14


@unread
def test_a_cut_prompt_is_told_once_and_by_its_own_number(pipe: LaytonGenPipeline) -> None:
    with pytest.warns(PromptCutWarning) as told:
        result = pipe(["a", "b", "x" * 99], num_images_per_prompt=3, output_type="codes", batch_size=2)
    assert [cut.index for cut in result.cut] == [2]
    assert len([each for each in told if each.category is PromptCutWarning]) == 1
    assert any("prompt 2 was cut" in str(each.message) for each in told)


def test_an_empty_prompt_is_no_condition_as_in_training(pipe: LaytonGenPipeline) -> None:
    text = pipe.encode_prompt(["", "a red star"])
    assert torch.equal(text.features[:1], pipe.transformer.null_condition(text.features[:1]))
    assert not torch.equal(text.features[1:], pipe.transformer.null_condition(text.features[1:]))
    blank, empty = (pipe(prompt, output_type="codes").codes for prompt in (" \n", ""))
    assert blank.equal(empty)


def test_int8_weights_go_to_the_cpu_where_no_device_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(write_model(tmp_path))
    monkeypatch.setattr("generation.model.quantization.choose_device", lambda device: torch.device(device or "meta"))
    assert LaytonGenDrawer.load(folder).pipeline.device.type == "meta"
    drawer = LaytonGenDrawer.load(folder, weights="int8")
    assert drawer.pipeline.device.type == "cpu"
    with pytest.raises(ValueError, match="int8 weights run on a CPU only, the model is to run on meta"):
        drawer.pipeline.to("meta")


def test_an_embedded_generator_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "ASSETS", tmp_path)
    write_model(tmp_path / "small")
    assert find_generator("small") == tmp_path / "small" / "laytongen"
    assert has_generator("small") and not has_generator("none")
    assert find_tokenizer("small", find_generator("small")) == tmp_path / "small"
    assert LaytonGenPipeline.from_pretrained("small").num_tokens == TOKENS
    shutil.rmtree(tmp_path / "small" / "laytongen")
    with pytest.raises(ValueError, match="holds no generator"):
        find_generator("small")
    with pytest.raises(ValueError, match="neither a folder nor an embedded model"):
        find_generator("another")


def test_weights_are_packed_once_and_anew_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    own = LaytonGenPipeline(tiny_generator(tokenizer), tokenizer)
    made: list[object] = []
    monkeypatch.setattr("generation.model.packing.packed", lambda module: made.append(module) or packed(module))
    first, again = (own("a star", generator=seeds(1), output_type="pt").codes for _ in range(2))
    assert torch.equal(first, again) and sum(module is own.transformer for module in made) == 1
    with torch.no_grad():
        own.transformer.blocks[0].attention.out.weight.normal_(generator=torch.Generator().manual_seed(3))
    changed = own("a star", generator=seeds(1), output_type="pt").codes
    fresh = LaytonGenPipeline(replace(tiny_generator(tokenizer), transformer=own.transformer), tokenizer)
    assert torch.equal(changed, fresh("a star", generator=seeds(1), output_type="pt").codes)
    assert not torch.equal(changed, first)
