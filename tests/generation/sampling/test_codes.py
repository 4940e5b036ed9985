from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_transformers import CODES, LENGTH, TOKENS, captions, left_padded, tiny_model
from torch.testing import assert_close

from generation.model.shapes import Factors
from generation.sampling.codes import (
    GREEDY,
    NoiseAhead,
    SamplingOptions,
    _candidates,
    plain_where_sure,
    sample_codes,
    seeded_generators,
    uniform_noise,
)
from generation.sampling.decoding import FREE, generate_codes
from generation.sampling.guidance import Guidance, guide

HOT = SamplingOptions(temperature=1.3, top_k=20, top_p=0.95)


def draws(logits: torch.Tensor, options: SamplingOptions, count: int) -> torch.Tensor:
    generators = seeded_generators([0])
    return torch.cat([sample_codes(logits[None], options=options, generators=generators) for _ in range(count)])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_codes_come_as_often_as_their_probability(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    shares = draws(logits, SamplingOptions(temperature), 3000).bincount(minlength=4) / 3000
    assert_close(shares, (logits / temperature).softmax(0), rtol=0, atol=4 * 0.5 / math.sqrt(3000))


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    assert set(draws(logits, SamplingOptions(top_k=2), 200).tolist()) == {1, 2}
    assert set(draws(logits, SamplingOptions(top_p=0.69), 200).tolist()) == {1, 2}
    assert set(draws(logits, SamplingOptions(top_p=0.71), 300).tolist()) == {1, 2, 3}
    assert set(draws(logits, SamplingOptions(top_p=1e-9), 20).tolist()) == {1}
    assert set(draws(logits, SamplingOptions(top_k=3, top_p=0.5), 300).tolist()) == {1, 2}  # 0.4 / 0.9 < 0.5
    assert set(draws(logits, SamplingOptions(top_k=4), 300).tolist()) == {0, 1, 2, 3}


def test_cold_is_greedy() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    best = int(logits.argmax())
    assert set(draws(logits, SamplingOptions(1e-4), 20).tolist()) == {best}
    assert set(draws(logits, SamplingOptions(1e-300), 5).tolist()) == {best}
    assert set(draws(logits, SamplingOptions(top_k=1), 5).tolist()) == {best}
    assert sample_codes(logits[None]).tolist() == [best]


def test_no_number_of_the_noise_makes_any_code_win() -> None:
    noise = uniform_noise(seeded_generators([0]), 1 << 22)[0]
    assert 0.0 < float(noise.min()) < float(noise.max()) < 1.0
    small = noise[noise < 1e-4] * 2.0**24  # float32 draws are whole numbers here, 0 among them
    assert bool((small != small.round()).float().mean() > 0.9)
    assert bool(torch.isfinite(noise.log1p()).all())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_noise_drawn_ahead_is_that_of_each_code_and_leaves_the_same_generators(device: str) -> None:
    plain, ahead = seeded_generators([3, 4]), seeded_generators([3, 4])
    expected = [uniform_noise(plain, 50) for _ in range(21)]  # more than are drawn at once, and no multiple of it
    noise = NoiseAhead(ahead, 50, 21, torch.device(device))
    found = [noise() for _ in range(21)]
    assert all(each.shape == (2, 50) and each.device.type == device for each in found)
    if device == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(plain, ahead, strict=True))


def test_numbers_of_several_codes_are_those_of_one_after_another() -> None:
    ahead, plain = seeded_generators([7]), seeded_generators([7])
    several = uniform_noise(ahead, 16 * 333).unflatten(1, (16, 333)).unbind(1)
    assert all(torch.equal(each, uniform_noise(plain, 333)) for each in several)


def test_large_logits_are_finite_though_their_sum_is_not() -> None:
    logits = torch.full((2, 64), 3e38)
    assert not torch.isfinite(logits.sum())
    small = sample_codes(torch.zeros(2, 64), options=HOT, generators=seeded_generators([0, 1]))
    assert sample_codes(logits, options=HOT, generators=seeded_generators([0, 1])).equal(small)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [GREEDY, HOT])
def test_logits_that_are_not_finite_are_refused(value: float, options: SamplingOptions) -> None:
    logits = torch.zeros(3, 64)
    logits[1, 5] = value
    with pytest.raises(ValueError, match=r"images \[1\] are not finite"):
        sample_codes(logits, options=options, generators=seeded_generators([0, 1, 2]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-0.1, math.inf, math.nan)),
        *(("top_k", value) for value in (0, -1)),
        *(("top_p", value) for value in (0.0, -0.5, 1.1, math.nan)),
    ],
)
def test_options_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=str(value)):
        SamplingOptions(**{name: value})  # type: ignore[arg-type]


def test_arguments_that_do_not_fit_are_refused() -> None:
    model, features = tiny_model(), captions(2)
    for arguments, text in (
        ({"sampling": SamplingOptions(top_k=CODES + 1), "generators": seeded_generators([0, 1])}, "larger than"),
        ({"sampling": HOT}, "got none"),
        ({"sampling": HOT, "generators": seeded_generators([0])}, "got 1"),
        ({"num_codes": 0, "sampling": GREEDY}, "got 0"),
        ({"num_codes": TOKENS + 1, "sampling": GREEDY}, "got 17"),
        ({"known": torch.full((2, TOKENS), CODES), "sampling": GREEDY}, "known codes"),
        ({"num_codes": -1, "sampling": GREEDY}, "got -1"),
        ({"known": torch.zeros(2, TOKENS + 1, dtype=torch.int64), "sampling": GREEDY}, "known codes"),
        ({"known": torch.zeros(1, TOKENS, dtype=torch.int64), "sampling": GREEDY}, "known codes"),
    ):
        with pytest.raises(ValueError, match=text):
            generate_codes(model, features, **arguments)  # type: ignore[arg-type]
    for scale in (math.inf, math.nan, -1.0):
        with pytest.raises(ValueError, match="guidance scale"):
            Guidance(scale)
    with pytest.raises(ValueError, match="range"):
        Guidance(2.0, start=5, stop=3)


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.5), Guidance(3.0, start=2, stop=9, schedule="linear")])
@pytest.mark.parametrize("factors", [None, Factors(4, 4)])
def test_same_prompt_and_seed_give_the_same_codes_in_any_batch(guidance: Guidance, factors: Factors | None) -> None:
    model = tiny_model(factors=factors)
    lengths = [1, 3, LENGTH, 2, 5, 4, LENGTH]
    prompts = [captions(1, length, seed=10 + row)[0] for row, length in enumerate(lengths)]

    def run(rows: list[int]) -> dict[int, list[int]]:
        features, mask = left_padded([prompts[row] for row in rows])
        made = generate_codes(
            model, features, mask, generators=seeded_generators(rows), sampling=HOT, guidance=guidance
        )
        return dict(zip(rows, made.tolist(), strict=True))

    alone = {row: run([row])[row] for row in range(7)}
    assert run(list(range(7))) == alone
    assert run([6, 2, 4]) == {row: alone[row] for row in (6, 2, 4)}
    assert len({tuple(each) for each in alone.values()}) == 7


def test_cached_sampling_equals_sampling_from_full_passes() -> None:
    model, features = tiny_model(), captions(2)
    made = generate_codes(model, features, generators=seeded_generators([4, 5]), sampling=HOT, guidance=Guidance(2.0))
    generators = seeded_generators([4, 5])
    slow = torch.zeros(2, TOKENS, dtype=torch.int64)
    both = torch.cat([features, model.null_condition(features)])
    with torch.no_grad():
        for index in range(TOKENS):
            logits = guide(model(slow.repeat(2, 1), both)[:, index], 2.0)
            slow[:, index] = sample_codes(logits, options=HOT, generators=generators)
    assert torch.equal(made, slow)


def test_guidance_of_one_is_none_and_of_more_is_more() -> None:
    model, features = tiny_model(), captions(2)

    def run(guidance: Guidance | None) -> torch.Tensor:
        return generate_codes(model, features, generators=seeded_generators([0, 1]), sampling=HOT, guidance=guidance)

    assert torch.equal(run(Guidance(1.0)), run(None))
    assert torch.equal(run(Guidance(5.0, start=TOKENS)), run(None))
    assert torch.equal(run(Guidance(5.0, start=3, stop=3)), run(None))
    assert not torch.equal(run(Guidance(5.0)), run(None))
    assert torch.equal(run(Guidance(5.0, stop=4))[:, :4], run(Guidance(5.0))[:, :4])
    assert torch.equal(run(Guidance(5.0, start=4))[:, :4], run(None)[:, :4])


def test_guidance_schedules_end_at_the_scale() -> None:
    for schedule in ("constant", "linear", "cosine"):
        scales = [Guidance(4.0, start=2, stop=10, schedule=schedule).at(index, 16) for index in range(16)]
        assert scales[:2] == [1.0, 1.0]
        assert scales[9] == pytest.approx(4.0)
        assert scales[10:] == [1.0] * 6
        assert scales[2:10] == sorted(scales[2:10])
    assert Guidance(4.0, stop=10).last(16) == 9
    assert Guidance(1.0).last(16) == -1


def test_known_codes_stay_and_the_rest_follows_them() -> None:
    model, features = tiny_model(), captions(2)
    first = generate_codes(model, features, sampling=GREEDY, guidance=Guidance(2.0))
    known = first.clone()
    known[:, 6:] = FREE
    again = generate_codes(model, features, sampling=GREEDY, guidance=Guidance(2.0), known=known)
    assert torch.equal(first, again)  # going on from the first codes
    changed = first.clone()
    changed[0, 3], changed[1, 9] = FREE, FREE
    assert torch.equal(generate_codes(model, features, sampling=GREEDY, guidance=Guidance(2.0), known=changed), first)
    other = torch.full_like(first, FREE)
    other[:, 4] = (first[:, 4] + 1) % CODES
    third = generate_codes(model, features, sampling=GREEDY, known=other)
    assert torch.equal(third[:, 4], other[:, 4])
    assert torch.equal(generate_codes(model, features, known=first), first)  # nothing is free
    assert torch.equal(generate_codes(model, features, known=first.to(torch.uint16)), first)  # as shards hold codes


def test_the_surest_codes_stay_sure_at_the_coldest_temperatures() -> None:
    logits = torch.tensor([[50.0, 0.0, 0.0, 0.0]])
    for temperature in (0.5, 1e-20, 1e-38):
        options = SamplingOptions(temperature=temperature, min_entropy=1.0)
        scores, _ = _candidates(plain_where_sure(logits, logits, options), options)
        assert scores.softmax(-1)[0, 0] > 0.999


def test_progress_is_told_and_short_and_empty_requests_work() -> None:
    model, seen = tiny_model(), []
    made = generate_codes(
        model, captions(2), sampling=GREEDY, num_codes=3, callback=lambda index, _codes: seen.append(index)
    )
    assert seen == [0, 1, 2]
    assert torch.equal(made, generate_codes(model, captions(2), sampling=GREEDY)[:, :3])
    assert generate_codes(model, captions(2), sampling=GREEDY, num_codes=1).shape == (2, 1)
    assert generate_codes(model, captions(0), sampling=GREEDY).shape == (0, TOKENS)
    assert not made.is_inference()


def test_broken_weights_do_not_make_images() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        generate_codes(model, captions(1), generators=seeded_generators([0]))


def test_where_the_model_is_sure_it_is_taken_at_its_word() -> None:
    model, features = tiny_model(), captions(2)

    def drawn(entropy: float, temperature: float = 0.5, scale: float = 3.0) -> torch.Tensor:
        options = SamplingOptions(temperature=temperature, min_entropy=entropy)
        generators = seeded_generators([0, 1])
        return generate_codes(model, features, sampling=options, guidance=Guidance(scale), generators=generators)

    plain, sharpened = drawn(0.0, 1.0, 1.0), drawn(0.0)
    assert torch.equal(drawn(math.log(CODES) + 1), plain)  # never unsure
    assert torch.equal(drawn(1e-6), sharpened) and not torch.equal(plain, sharpened)
    options = SamplingOptions(temperature=0.5, min_entropy=1.0)
    logits, sure = torch.randn(1, 8), torch.tensor([[9.0, *[0.0] * 7]])
    even = torch.zeros(1, 8)
    assert torch.equal(plain_where_sure(logits, even, options), logits)  # log 8 nats are more than 1
    assert torch.equal(plain_where_sure(logits, sure, options) / 0.5, sure)
    assert torch.equal(plain_where_sure(logits, sure, replace(options, temperature=0.0)), logits)
    with pytest.raises(ValueError, match="min_entropy"):
        SamplingOptions(min_entropy=-1.0)
