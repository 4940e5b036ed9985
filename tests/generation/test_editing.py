from __future__ import annotations

import pytest
import torch
from laytongen_parts import CODES, SIZE, TOKENS, tiny_generator, tiny_tokenizer

from generation.editing import draw_again, interpolate_images, interpolate_prompts, keep_first, token_box
from generation.pipeline import LaytonGenPipeline


@pytest.fixture(scope="module")
def pipe() -> LaytonGenPipeline:
    tokenizer = tiny_tokenizer()
    return LaytonGenPipeline(tiny_generator(tokenizer), tokenizer)


def codes_of(seed: int, count: int = 1) -> torch.Tensor:
    return torch.randint(CODES, (count, TOKENS), generator=torch.Generator().manual_seed(seed))


def test_the_first_codes_stay_and_the_rest_is_what_follows(pipe: LaytonGenPipeline) -> None:
    first = pipe("a star", temperature=0.0, output_type="codes").codes
    for keep in (0, 5, TOKENS):
        result = pipe("a star", known_codes=keep_first(first, keep), temperature=0.0, output_type="codes")
        assert result.codes.equal(first)  # greedy: continued with the same prompt it is the same image
    other = pipe("a star", known_codes=keep_first(codes_of(1), 5), output_type="codes").codes
    assert other[:, :5].equal(codes_of(1)[:, :5])
    assert not other[:, 5:].equal(codes_of(1)[:, 5:])
    ways = pipe(["a star"] * 3, known_codes=keep_first(codes_of(1), 5), output_type="codes").codes
    assert ways[0].equal(other[0])
    assert len(ways.unique(dim=0)) == 3
    with pytest.raises(ValueError, match="count must be"):
        keep_first(first, TOKENS + 1)


def test_only_chosen_tokens_are_drawn_again(pipe: LaytonGenPipeline) -> None:
    box = token_box((4, 4), top=1, left=1, bottom=3, right=3)
    assert box.nonzero().flatten().tolist() == [5, 6, 9, 10]
    result = pipe(["a star", "two hearts"], known_codes=draw_again(codes_of(2, 2), box))
    assert result.codes[:, ~box].equal(codes_of(2, 2)[:, ~box])
    assert not result.codes[:, box].equal(codes_of(2, 2)[:, box])
    assert [image.size for image in result.images] == [(SIZE, SIZE)] * 2
    with pytest.raises(ValueError, match=rf"known_codes must be \(3, {TOKENS}\)"):
        pipe(["a"] * 3, known_codes=draw_again(codes_of(2, 2), box))
    for wrong in (box[:5], box.float(), box.expand(3, -1)):
        with pytest.raises(ValueError, match="mask must be"):
            draw_again(codes_of(2, 2), wrong)
    with pytest.raises(ValueError, match="known_codes must be in"):
        pipe("a", known_codes=draw_again(codes_of(2) + CODES, box))
    with pytest.raises(ValueError, match="no rectangle"):
        token_box((4, 4), top=2, left=0, bottom=2, right=1)


def test_a_walk_begins_and_ends_at_its_images(pipe: LaytonGenPipeline) -> None:
    ends = codes_of(3, 2)
    walk = interpolate_images(pipe, ends[0], ends[1], steps=4)
    assert walk.shape == (4, 3, SIZE, SIZE)
    torch.testing.assert_close(walk[[0, -1]], pipe.tokenizer.decode(ends), atol=1e-4, rtol=1e-4)
    assert not walk[1].allclose(walk[0])
    still = interpolate_images(pipe, ends[0], ends[0], steps=2)
    assert bool(still.isfinite().all())


def test_prompts_between_two_begin_and_end_with_them(pipe: LaytonGenPipeline) -> None:
    walk = interpolate_prompts(pipe, "a red circle", "hearts", steps=3, seed=4)
    for row, prompt in ((0, "a red circle"), (2, "hearts")):
        generator = torch.Generator().manual_seed(4)
        assert walk[row].equal(pipe(prompt, generator=generator, output_type="codes").codes[0])
    with pytest.raises(ValueError, match="steps"):
        interpolate_prompts(pipe, "a", "b", steps=1)
