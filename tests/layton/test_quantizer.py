from __future__ import annotations

import copy
import json
import os
import warnings

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vector_quantize_pytorch import LFQ, SimVQ, VectorQuantize

from layton.nearest import nearest_codes
from layton.quantizers import (
    QUANTIZERS,
    CodebookCollapseWarning,
    CosineVQ,
    EuclideanVQ,
    FSQQuantizer,
    HealthMonitor,
    LFQQuantizer,
    Quantizer,
    SimVQQuantizer,
    health,
)
from layton.quantizers.ema_codebook import kmeans


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(x, dim=-1)


MAKERS = {
    "cosine": lambda: CosineVQ(vocab_size=64, code_dim=4, start_points=0),
    "cosine_rotation": lambda: CosineVQ(vocab_size=64, code_dim=4, start_points=0, rotation_trick=True),
    "euclidean_learned": lambda: EuclideanVQ(vocab_size=64, code_dim=4, start_points=0),
    "euclidean_ema": lambda: EuclideanVQ(vocab_size=64, code_dim=4, start_points=0, learnable=False),
    "simvq": lambda: SimVQQuantizer(vocab_size=64, code_dim=4),
    "fsq": lambda: FSQQuantizer(levels=(4, 4, 3, 5)),
    "fsq_projected": lambda: FSQQuantizer(levels=(4, 4, 4), code_dim=6),
    "lfq": lambda: LFQQuantizer(vocab_size=64),
    "lfq_projected": lambda: LFQQuantizer(vocab_size=64, code_dim=8),
}


@pytest.fixture(params=MAKERS)
def quantizer(request) -> Quantizer:
    torch.manual_seed(0)
    return MAKERS[request.param]()


# ---- every quantizer keeps the same promises


def test_output_has_the_promised_shapes_and_types(quantizer):
    features = draw(2, quantizer.code_dim, 3, 5)
    for mode in (True, False):
        output = quantizer.train(mode)(features)
        assert output.codes.shape == (2, 15) and output.codes.dtype == torch.int64
        assert output.embeddings.shape == features.shape and output.embeddings.dtype == torch.float32
        assert output.loss.shape == ()
    assert output.loss == 0


def test_codes_are_row_major_and_embeddings_are_their_rows_of_the_codebook(quantizer):
    features = draw(2, quantizer.code_dim, 3, 5)
    output = quantizer.eval()(features)
    expected = quantizer.codebook[output.codes]  # (B, N, d)
    torch.testing.assert_close(rearrange(output.embeddings, "b d h w -> b (h w) d"), expected)
    one = quantizer.encode(features[1:, :, 2:, 3:4])
    assert one[0, 0] == output.codes[1, 2 * 5 + 3]


def test_training_and_evaluation_give_the_same_codes_and_embeddings(quantizer):
    features = draw(2, quantizer.code_dim, 4, 4)
    evaluated = copy.deepcopy(quantizer).eval()(features)
    trained = quantizer.train()(features)
    assert torch.equal(evaluated.codes, trained.codes)
    torch.testing.assert_close(evaluated.embeddings, trained.embeddings)


def test_gradient_reaches_the_features_through_embeddings_and_loss(quantizer):
    features = draw(2, quantizer.code_dim, 4, 4).requires_grad_()
    output = quantizer.train()(features)
    (output.embeddings.square().mean() + (output.embeddings * draw(*output.embeddings.shape)).mean()).backward()
    assert features.grad is not None and features.grad.abs().sum() > 0 and features.grad.isfinite().all()
    if not isinstance(quantizer, FSQQuantizer):
        features.grad = None
        quantizer(features).loss.backward()
        assert features.grad.abs().sum() > 0


def test_gradient_reaches_the_features_in_evaluation_as_in_training(quantizer):
    features, towards = draw(2, quantizer.code_dim, 4, 4), draw(2, quantizer.code_dim, 4, 4, seed=1)
    quantizer.freeze()
    gradients = []
    for mode in (True, False):
        given = features.clone().requires_grad_()
        output = quantizer.train(mode)(given)
        (output.embeddings * towards).sum().backward()
        gradients.append(given.grad.flatten())
    with torch.no_grad():
        torch.testing.assert_close(output.embeddings, quantizer(features).embeddings)
    if not getattr(quantizer.vq, "rotation_trick", False):
        assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99
    assert gradients[1].abs().sum() > 0 and gradients[1].isfinite().all()


@pytest.mark.parametrize("name", ["cosine", "euclidean_learned", "simvq", "lfq"])
def test_every_code_survives_a_trip_through_its_embedding(name):
    quantizer = MAKERS[name]()
    codes = torch.arange(quantizer.vocab_size)[None]
    assert torch.equal(quantizer.encode(quantizer.codes_to_embeddings(codes, (8, 8))), codes)


def test_bf16_autocast_and_half_change_neither_codes_nor_codebook(quantizer):
    features = draw(2, quantizer.code_dim, 4, 4)
    expected = quantizer.eval().encode(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.encode(features), expected)
        trained = copy.deepcopy(quantizer).train()(features)
        assert torch.equal(trained.codes, expected)
        assert trained.embeddings.dtype == torch.float32 and trained.loss.dtype == torch.float32
    fingerprint = quantizer.fingerprint()
    halved = quantizer.half()
    assert halved.fingerprint() == fingerprint and halved.codebook.dtype == torch.float32
    output = halved(features.half())
    assert output.embeddings.dtype == torch.float16
    assert torch.equal(output.codes, quantizer.encode(features.half().float()))


def test_saved_folder_rebuilds_the_same_quantizer(quantizer, tmp_path):
    features = draw(2, quantizer.code_dim, 4, 4)
    quantizer.train()(features)
    quantizer.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = Quantizer.from_pretrained(tmp_path)
    assert type(loaded) is type(quantizer) and loaded.config() == quantizer.config()
    assert loaded.fingerprint() == quantizer.fingerprint() and not loaded.training
    assert torch.equal(loaded.encode(features), quantizer.encode(features))
    assert torch.equal(loaded.codebook, quantizer.codebook)


def test_features_that_are_not_finite_raise_in_evaluation_and_harm_nothing_in_training(quantizer):
    features = draw(2, quantizer.code_dim, 4, 4)
    features[1, 0, 2, 1] = torch.nan
    features[0, 1, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="2 of 32 features are NaN"):
        quantizer.encode(features)
    with pytest.raises(ValueError, match="NaN"):
        quantizer.eval()(features)
    output = quantizer.train()(features)
    assert not output.embeddings[1, :, 2, 1].isfinite().any()
    assert output.embeddings[1, :, 0, 0].isfinite().all()
    quantizer.check_codes(output.codes)
    assert all(buffer.float().isfinite().all() for buffer in quantizer.buffers())


def test_state_dict_round_trip_continues_training_bit_for_bit(quantizer):
    quantizer.train()(draw(2, quantizer.code_dim, 4, 4))
    twin = copy.deepcopy(quantizer)
    for buffer in (*twin.buffers(), *twin.parameters()):
        if buffer.is_floating_point():
            buffer.data.add_(1)
    twin.load_state_dict(quantizer.state_dict())
    twin.vq.load_state_dict(quantizer.vq.state_dict())
    if isinstance(quantizer, CosineVQ | EuclideanVQ | SimVQQuantizer):
        for step in range(3):
            features = draw(2, quantizer.code_dim, 4, 4, seed=step)
            assert torch.equal(quantizer(features).codes, twin(features).codes)
        assert quantizer.fingerprint() == twin.fingerprint()


def test_quantizer_inside_a_model_on_the_meta_device_loads_and_trains(quantizer, request):
    make = MAKERS[request.node.callspec.params["quantizer"]]
    with torch.device("meta"):
        twin = make()
    twin.load_state_dict(quantizer.state_dict(), assign=True)
    features = draw(2, quantizer.code_dim, 4, 4)
    assert torch.equal(twin.train()(features).codes, quantizer.train()(features).codes)


def test_frozen_codes_do_not_move_in_training_but_features_get_gradients(quantizer):
    fingerprint = quantizer.freeze().fingerprint()
    for step in range(5):
        features = draw(2, quantizer.code_dim, 4, 4, seed=step).requires_grad_()
        output = quantizer.train()(features)
        (output.embeddings.square().mean() + (output.embeddings * draw(*features.shape)).sum()).backward()
        assert features.grad.abs().sum() > 0
    assert quantizer.fingerprint() == fingerprint
    state = CosineVQ(vocab_size=64, code_dim=4).freeze().train()  # frozen before its start
    for step in range(5):
        state(draw(2, 4, 8, 8, seed=step))
    assert not state.ready


# ---- what is not a batch of codes is refused (ids from files and from language models come here)


GRID = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=150, deadline=None)
@given(grid=GRID, batch=st.integers(0, 3), seed=st.integers(0, 2**31 - 1))
def test_valid_codes_are_accepted(grid, batch, seed):
    quantizer = _SHARED
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 64, (batch, grid[0] * grid[1]), generator=generator)
    for dtype in (torch.int64, torch.int32, torch.int16):
        assert quantizer.codes_to_embeddings(codes.to(dtype), grid).shape == (batch, 4, *grid)


@settings(max_examples=300, deadline=None)
@given(
    grid=GRID,
    bad=st.sampled_from(
        [-1, 64, 65, 2**31, -(2**31) - 1, 2**63 - 1, "float", "bool", "long", "short", "rank", "scalar"]
    ),
    where=st.integers(0, 10**6),
)
def test_wrong_codes_are_refused(grid, bad, where):
    num = grid[0] * grid[1]
    codes = torch.zeros(2, num, dtype=torch.int64)
    if isinstance(bad, int):
        rearrange(codes, "b n -> (b n)")[where % (2 * num)] = bad
    elif bad in ("long", "short"):
        codes = torch.zeros(2, num + (1 if bad == "long" else -1), dtype=torch.int64)
    elif bad in ("rank", "scalar"):
        codes = codes[None] if bad == "rank" else codes[0, 0]
    else:
        codes = codes.float() if bad == "float" else codes.bool()
    with pytest.raises(ValueError):
        _SHARED.codes_to_embeddings(codes, grid)


_SHARED = MAKERS["cosine"]()


def test_wrong_features_are_refused(quantizer):
    for wrong in (draw(2, quantizer.code_dim, 4), draw(2, quantizer.code_dim + 1, 4, 4)):
        with pytest.raises(ValueError, match="features must be"):
            quantizer(wrong)
    with pytest.raises(ValueError, match="int64"):
        quantizer(torch.zeros(2, quantizer.code_dim, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    "make",
    [
        lambda: CosineVQ(vocab_size=1),
        lambda: CosineVQ(vocab_size=16, decay=1.0),
        lambda: CosineVQ(vocab_size=16, start_points=3),
        lambda: CosineVQ(vocab_size=16, dead_share=-0.1),
        lambda: LFQQuantizer(vocab_size=48),
        lambda: FSQQuantizer(levels=(2, 8)),
        lambda: FSQQuantizer(levels=()),
        lambda: SimVQQuantizer(commitment_weight=-1.0),
        lambda: HealthMonitor(16, min_perplexity=0.0),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="got"):
        make()


# ---- the fast training step equals the package's


@pytest.mark.parametrize("rotation_trick", [False, True])
@pytest.mark.parametrize("cosine", [True, False])
def test_fast_step_equals_the_package_step_by_step(cosine, rotation_trick):
    vocab_size, code_dim, cls = 48, 4, CosineVQ if cosine else EuclideanVQ
    options = {} if cosine else {"learnable": False}
    ours = cls(
        vocab_size=vocab_size,
        code_dim=code_dim,
        start_points=0,
        decay=0.9,
        dead_share=0.0,
        commitment_weight=0.25,
        rotation_trick=rotation_trick,
        **options,
    ).train()
    official = VectorQuantize(
        dim=code_dim,
        codebook_size=vocab_size,
        use_cosine_sim=cosine,
        decay=0.9,
        commitment_weight=0.25,
        rotation_trick=rotation_trick,
    ).train()
    official._codebook.embed.copy_(ours.codebook[None])
    official._codebook.embed_avg.copy_(ours.codebook[None])
    ours.vq._codebook.reset_to(ours.codebook, torch.ones(vocab_size))  # which the package begins with
    for step in range(20):
        raw = draw(2, code_dim, 4, 8, seed=step).requires_grad_()
        raw_official = raw.detach().clone().requires_grad_()
        output = ours(raw)
        tokens = unit(rearrange(raw_official, "b d h w -> b (h w) d"))
        embeddings, codes, loss = official(tokens)
        assert torch.equal(output.codes, codes)
        torch.testing.assert_close(output.loss, loss)
        embeddings = rearrange(embeddings, "b (h w) d -> b d h w", h=4)
        torch.testing.assert_close(output.embeddings, embeddings)
        weight = draw(*raw.shape, seed=100 + step)
        ((output.embeddings * weight).sum() + output.loss).backward()
        ((embeddings * weight).sum() + loss).backward()
        torch.testing.assert_close(raw.grad, raw_official.grad)
    torch.testing.assert_close(ours.codebook, official.codebook)
    torch.testing.assert_close(ours.vq._codebook.cluster_size, official._codebook.cluster_size)


def test_learned_euclidean_codes_get_the_packages_gradient_and_unused_codes_none():
    ours = EuclideanVQ(vocab_size=32, code_dim=4, start_points=0).train()
    official = VectorQuantize(
        dim=4, codebook_size=32, learnable_codebook=True, ema_update=False, rotation_trick=False, commitment_weight=1.0
    ).train()
    official._codebook.embed.data.copy_(ours.codebook[None])
    features = draw(1, 4, 3, 3)
    output = ours(features)
    output.loss.backward()
    _, codes, loss = official(unit(rearrange(features, "b d h w -> b (h w) d")))
    loss.backward()
    gradient = ours.vq._codebook.embed.grad
    torch.testing.assert_close(gradient, official._codebook.embed.grad)
    used = torch.zeros(32, dtype=torch.bool).index_fill(0, codes[0], True)
    assert (gradient[0, ~used] == 0).all() and (gradient[0, used] != 0).any(dim=1).all()


def test_simvq_step_equals_the_packages():
    ours = SimVQQuantizer(vocab_size=48, code_dim=4, commitment_weight=0.7, feature_weight=0.3).train()
    official = SimVQ(dim=4, codebook_size=48, commitment_weight=0.7, input_to_quantize_commit_loss_weight=0.3).train()
    official.load_state_dict(ours.vq.state_dict())
    features = draw(2, 4, 3, 5).requires_grad_()
    tokens = rearrange(features.detach().clone(), "b d h w -> b (h w) d").requires_grad_()
    output, (embeddings, codes, loss) = ours(features), official(tokens)
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(rearrange(output.embeddings, "b d h w -> b (h w) d"), embeddings)
    torch.testing.assert_close(output.loss, loss)
    (output.embeddings.square().sum() + output.loss).backward()
    (embeddings.square().sum() + loss).backward()
    torch.testing.assert_close(rearrange(features.grad, "b d h w -> b (h w) d"), tokens.grad)
    torch.testing.assert_close(ours.vq.code_transform.weight.grad, official.code_transform.weight.grad)


@pytest.mark.parametrize("share", [1e-6, 0.3, 1.0])
def test_lfq_loss_depends_on_seed_and_step_only(share):
    first, second = (LFQQuantizer(vocab_size=64, entropy_share=share).train() for _ in range(2))
    features, losses = draw(2, 6, 4, 4), []
    for quantizer in (first, second):
        before = torch.get_rng_state()
        losses.append([quantizer(features).loss.item() for _ in range(3)])
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(1)
    assert losses[0] == losses[1] and np.isfinite(losses[0]).all()
    assert len({round(loss, 5) for loss in losses[0]}) == (
        3 if share == 0.3 else 1
    )  # other tokens at every step; one token has no spread


@pytest.mark.parametrize("spherical", [False, True])
def test_lfq_loss_is_the_packages(spherical):
    ours = LFQQuantizer(vocab_size=64, code_dim=4, entropy_share=0.3, diversity=0.7, spherical=spherical).train()
    official = LFQ(
        dim=4,
        codebook_size=64,
        entropy_loss_weight=0.1,
        diversity_gamma=0.7,
        commitment_loss_weight=0.25,
        frac_per_sample_entropy=0.3,
        spherical=spherical,
    ).train()
    official.load_state_dict(ours.vq.state_dict())
    features = draw(2, 4, 4, 4).requires_grad_()
    tokens = rearrange(features.detach(), "b d h w -> b (h w) d").requires_grad_()
    torch.manual_seed(1)  # seed 0, step 1
    _, _, loss = official(tokens)
    found = ours(features).loss
    torch.testing.assert_close(found, loss)
    for value in (found, loss):
        value.backward()
    torch.testing.assert_close(rearrange(features.grad, "b d h w -> b (h w) d"), tokens.grad)
    plain = LFQQuantizer(vocab_size=64, code_dim=6), LFQQuantizer(vocab_size=64, code_dim=6, spherical=True)
    assert plain[0].fingerprint() != plain[1].fingerprint()


@pytest.mark.parametrize("tokens_per_code", [0.25, 8, 32])
def test_a_codebook_that_was_loaded_keeps_its_codes(tokens_per_code, tmp_path):
    CosineVQ(vocab_size=64, code_dim=4, start_points=0).save_pretrained(tmp_path)
    loaded = Quantizer.from_pretrained(tmp_path).train()
    before = loaded.codebook.clone()
    near = before[torch.arange(int(tokens_per_code * 64)) % 64] + 1e-3
    loaded(rearrange(near, "(b n) d -> b d n 1", b=1))
    moved = (loaded.codebook - before).norm(dim=1)
    assert moved.max() < 0.01 and torch.isfinite(loaded.codebook).all()


def test_codes_that_start_at_once_have_no_warm_up():
    with pytest.raises(ValueError, match="no warm-up, got 5 steps"):
        CosineVQ(vocab_size=64, code_dim=4, start_points=0, warmup_steps=5)


# ---- nearest codes


@pytest.mark.parametrize("num_codes", [1, 7, 128, 257, 1024, 1000])
@pytest.mark.parametrize("chunk", [None, 1, 13])
def test_nearest_codes_equal_the_full_distance_matrix(num_codes, chunk):
    features, codebook = draw(50, 8), draw(num_codes, 8, seed=1)
    distances = torch.cdist(features.double(), codebook.double())
    assert torch.equal(nearest_codes(features, codebook, metric="euclidean", chunk=chunk), distances.argmin(dim=1))
    scores = unit(features).double() @ unit(codebook).double().T
    assert torch.equal(nearest_codes(features, unit(codebook), chunk=chunk), scores.argmax(dim=1))


def test_nearest_codes_equal_the_packages_at_full_size():
    codebook, features = unit(draw(16384, 8)), unit(draw(256, 8, seed=1))
    official = VectorQuantize(dim=8, codebook_size=16384, use_cosine_sim=True).eval()
    official.codebook = codebook
    assert torch.equal(nearest_codes(features, codebook), official(features[None])[1][0])


def test_of_equal_codes_the_first_is_taken():
    codebook = unit(draw(64, 8))
    features = codebook[[5, 63, 0]]
    twice = torch.cat([codebook, *[codebook] * 7])  # 512 codes: the two-level search
    assert nearest_codes(features, twice).tolist() == [5, 63, 0]


@pytest.mark.parametrize("count", [0, 1])
def test_nearest_codes_of_few_features(count):
    assert nearest_codes(draw(count, 8), draw(16, 8)).shape == (count,)


def test_nearest_codes_refuses_wrong_input():
    for features, codebook in ((draw(3, 8), draw(4, 7)), (draw(8), draw(4, 8)), (draw(3, 8), draw(0, 8))):
        with pytest.raises(ValueError, match="do not fit"):
            nearest_codes(features, codebook)
    with pytest.raises(ValueError, match="1 of 3 features are NaN"):
        nearest_codes(torch.tensor([[0.0], [torch.nan], [1.0]]), draw(4, 1))
    with pytest.raises(ValueError, match="chunk"):
        nearest_codes(draw(3, 8), draw(4, 8), chunk=0)
    with pytest.raises(ValueError, match="manhattan"):
        nearest_codes(draw(3, 8), draw(4, 8), metric="manhattan")


# ---- start, revival, health


def test_codes_start_from_collected_features_and_cover_them():
    quantizer = CosineVQ(vocab_size=256, code_dim=4, warmup_steps=3).train()
    seen = []
    for step in range(6):
        features = draw(2, 4, 8, 8, seed=step).requires_grad_()  # 128 features a step, half of the codes
        seen.append(features)
        output = quantizer(features)
        if step < 3:
            assert not quantizer.ready and output.loss == 0
            torch.testing.assert_close(output.embeddings, nn.functional.normalize(features, dim=1))
    assert quantizer.ready and output.loss > 0
    codes = torch.cat([quantizer.encode(features) for features in seen[:4]])
    assert codes.unique().numel() > 0.9 * 256
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(256))


def test_warmup_steps_delay_the_start():
    quantizer = CosineVQ(vocab_size=8, code_dim=4, warmup_steps=5).train()
    ready = []
    for step in range(6):
        quantizer(draw(1, 4, 8, 8, seed=step))
        ready.append(quantizer.ready)
    assert ready == [False] * 4 + [True] * 2


def test_a_run_stopped_while_collecting_starts_the_same_codes():
    def fresh():
        return CosineVQ(vocab_size=64, code_dim=4).train()

    whole, first = fresh(), fresh()
    for step in range(6):
        whole(draw(1, 4, 8, 4, seed=step))
    for step in range(2):
        first(draw(1, 4, 8, 4, seed=step))
    second = fresh()
    second.load_state_dict(first.state_dict())
    torch.rand(3)  # nothing depends on the global generator
    for step in range(2, 6):
        second(draw(1, 4, 8, 4, seed=step))
    assert whole.ready and whole.fingerprint() == second.fingerprint()


def test_kmeans_finds_separated_clusters():
    centres = unit(draw(6, 8))
    points = unit(centres.repeat(50, 1) + 0.01 * draw(300, 8, seed=1))
    # from random points two clusters may share a start, so more centres than clusters are asked for
    generator = torch.Generator().manual_seed(0)
    found, counts = kmeans(points, 30, metric="cosine", num_iters=10, generator=generator)
    assert counts.sum() == 300
    assert ((found @ centres.T).amax(dim=0) > 0.999).all()
    with pytest.raises(ValueError, match="at least 30 points, got 7"):
        kmeans(points[:7], 30, metric="cosine", num_iters=1, generator=generator)


def test_revival_brings_a_collapsed_codebook_back_within_300_steps():
    quantizer = CosineVQ(vocab_size=256, code_dim=8, start_points=0).train()
    quantizer.set_codebook(unit(torch.ones(256, 8) + 0.001 * draw(256, 8)))  # all codes in one place
    features = [draw(4, 8, 8, 8, seed=step) for step in range(20)]
    first = quantizer(features[0]).codes.unique().numel()
    for step in range(299):
        quantizer(features[step % 20])
    codes = torch.cat([quantizer.encode(batch) for batch in features])
    assert first < 0.5 * 256  # it was collapsed
    assert codes.unique().numel() >= 0.9 * 256


def test_without_revival_a_collapsed_codebook_stays_poor():
    quantizer = CosineVQ(vocab_size=256, code_dim=8, start_points=0, dead_share=0.0).train()
    quantizer.set_codebook(unit(torch.ones(256, 8) + 0.001 * draw(256, 8)))
    features = [draw(4, 8, 8, 8, seed=step) for step in range(20)]
    for step in range(300):
        quantizer(features[step % 20])
    assert torch.cat([quantizer.encode(batch) for batch in features]).unique().numel() < 0.5 * 256


def test_perplexity_needs_no_float64_where_there_is_none(monkeypatch):
    monkeypatch.setattr(health, "working_dtype", lambda device: torch.float32)
    found = health.perplexity(torch.tensor([2, 2, 0]))
    assert found.dtype == torch.float32 and float(found) == pytest.approx(2.0)


def test_usage_and_perplexity_equal_numpy_over_the_window():
    monitor = HealthMonitor(32, window=100)
    codes = torch.randint(0, 20, (260,), generator=torch.Generator().manual_seed(0))
    for batch in codes.split(37):
        monitor.update(batch)
    health = monitor.report()
    counts = np.bincount(codes[-100:].numpy(), minlength=32)
    p = counts[counts > 0] / counts.sum()
    assert health.num_tokens == 100
    assert health.usage == pytest.approx((counts > 0).mean(), abs=1e-6)
    assert health.perplexity == pytest.approx(np.exp(-(p * np.log(p)).sum()), abs=1e-6)


def test_batch_larger_than_the_window_keeps_its_last_codes():
    monitor = HealthMonitor(8, window=4)
    monitor.update(torch.tensor([0, 0, 0, 1, 2, 3, 4]))
    assert monitor.report().usage == 4 / 8 and monitor.report().perplexity == pytest.approx(4.0)


def test_empty_window_reports_zeros():
    health = HealthMonitor(8).report()
    assert (health.usage, health.perplexity, health.num_tokens, health.collapsed) == (0.0, 0.0, 0, False)


def test_collapse_rings_the_alarm_within_50_steps_once_and_recovery_ends_it():
    quantizer = CosineVQ(vocab_size=256, code_dim=8, start_points=0, dead_share=0.0).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(60):  # a healthy encoder is never accused
            quantizer(draw(2, 8, 8, 8, seed=step))
            assert not quantizer.health().collapsed
    constant = draw(1, 8, 1, 1).expand(2, 8, 8, 8)
    with pytest.warns(CodebookCollapseWarning, match="codebook collapse") as caught:
        for _ in range(50):
            quantizer(constant)
            quantizer.health()
    assert quantizer.health().collapsed and len(caught) == 1
    quantizer(draw(2, 8, 8, 8))
    assert not quantizer.health().collapsed


# ---- folders


def test_damaged_folders_are_refused_with_names(tmp_path):
    quantizer = MAKERS["cosine"]()
    quantizer.save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good_config, good_weights = config.read_text(), weights.read_bytes()

    def refuses(match):
        with pytest.raises(ValueError, match=match):
            Quantizer.from_pretrained(tmp_path)
        config.write_text(good_config)
        weights.write_bytes(good_weights)

    changed = json.loads(good_config)
    config.write_text(json.dumps(changed | {"class": "os.system"}))
    refuses("os.system")
    config.write_text(json.dumps(changed | {"colour": 1}))
    refuses("colour")
    config.write_text(json.dumps(changed | {"vocab_size": 128}))
    refuses(r"codebook is \(64, 4\) and not \(128, 4\)")
    config.write_text(json.dumps(changed | {"vocab_size": "many"}))
    refuses("wrong type")
    config.write_text("{")
    refuses("not valid JSON")
    config.unlink()
    refuses("missing")
    weights.write_bytes(good_weights[:-10])
    refuses("not a whole safetensors file")
    weights.write_bytes(good_weights[:-2] + bytes([good_weights[-2] ^ 1]) + good_weights[-1:])
    refuses("were changed")
    weights.unlink()
    refuses("missing")
    with pytest.raises(ValueError, match="holds a CosineVQ, not a FSQQuantizer"):
        FSQQuantizer.from_pretrained(tmp_path)


def test_failed_save_leaves_the_old_folder_whole(tmp_path, monkeypatch):
    old = MAKERS["cosine"]()
    old.save_pretrained(tmp_path)
    new = MAKERS["cosine"]()
    new.set_codebook(unit(draw(64, 4, seed=5)))

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        new.save_pretrained(tmp_path)
    assert Quantizer.from_pretrained(tmp_path).fingerprint() == old.fingerprint()
    assert len(list(tmp_path.iterdir())) == 2


def test_fingerprint_tells_codebooks_apart_and_ignores_training_settings():
    first = CosineVQ(vocab_size=64, code_dim=4, start_points=0)
    same = CosineVQ(vocab_size=64, code_dim=4, start_points=0, decay=0.5, commitment_weight=1.0)
    other = CosineVQ(vocab_size=64, code_dim=4, start_points=0, seed=1)
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()
    assert FSQQuantizer(levels=(4, 5)).fingerprint() != FSQQuantizer(levels=(5, 4)).fingerprint()


def test_the_list_of_classes_is_complete():
    def leaves(cls):
        ours = [kind for kind in cls.__subclasses__() if kind.__module__.startswith("layton.")]  # not other tests'
        return set().union(*map(leaves, ours)) if ours else {cls}

    assert leaves(Quantizer) == set(QUANTIZERS.values())


def test_fsq_known_answer():
    quantizer = FSQQuantizer(levels=(3, 3)).eval()
    far = torch.tensor([[-9.0, -9.0], [0.0, -9.0], [9.0, -9.0], [0.0, 0.0], [9.0, 9.0]])
    codes = quantizer.encode(rearrange(far, "n d -> 1 d 1 n"))
    assert codes.tolist() == [[0, 1, 2, 4, 8]]
    assert quantizer.codebook[4].tolist() == [0.0, 0.0] and quantizer.codebook[8].tolist() == [1.0, 1.0]


# ---- several ranks


def _train_on_rank(rank: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    quantizers = [  # built before the process group, as Lightning does
        CosineVQ(vocab_size=64, code_dim=4, decay=0.9).train(),
        EuclideanVQ(vocab_size=64, code_dim=4, decay=0.9, learnable=False).train(),
    ]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)  # ranks must not depend on equal global generators
    for step in range(40):
        for quantizer in quantizers:
            # shards of unequal size, and features that drift so that codes die
            features = draw(1, 4, 4 + 2 * rank, 4, seed=2 * step + rank) + step / 10
            quantizer(features)
    torch.save([quantizer.state_dict() for quantizer in quantizers], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_stay_bit_equal(tmp_path):
    torch.multiprocessing.spawn(_train_on_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for ours, theirs in zip(first, second, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert ours["vq._codebook.initted"]
