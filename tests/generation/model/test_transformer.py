from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_transformers import CODES, DIM, LENGTH, TOKENS, captions, codes, left_padded, tiny_model
from torch.nn import functional as F
from torch.testing import assert_close

from generation.model.rope import rotate, rotation_table
from generation.model.shapes import SIZES, CaptionShape, Dropout, Factors, swiglu_width
from generation.model.transformer import LaytonGenTransformer
from generation.tasks.loss import contrast_loss, mean_of_valid, next_code_loss, next_code_losses

FACTORS = Factors(code_dim=4, rank=4)


def millions(size: str) -> float:
    with torch.device("meta"):
        model = LaytonGenTransformer.from_size(size, caption=CaptionShape())
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


@pytest.mark.parametrize(
    ("size", "published"),
    [("mini", 10), ("small", 38), ("B", 111), ("L", 343), ("XL", 775), ("XXL", 1411), ("3B", 3100)],
)
def test_sizes_have_the_published_numbers_of_parameters_and_build_without_memory(size: str, published: float) -> None:
    assert abs(millions(size) / published - 1) < 0.06


def test_swiglu_width_is_two_thirds_of_four_rounded_up() -> None:
    assert [swiglu_width(width) for width in (768, 1024, 1280, 3200)] == [2048, 2816, 3584, 8704]


@pytest.mark.parametrize("factors", [None, FACTORS])
def test_a_code_is_predicted_from_the_codes_before_it_only(factors: Factors | None) -> None:
    model, given, features = tiny_model(factors=factors), codes(2), captions(2)
    changed = given.clone()
    changed[:, 7] = (changed[:, 7] + 1) % CODES
    before, after = model(given, features), model(changed, features)
    assert before.shape == (2, TOKENS, CODES)
    assert_close(before[:, :8], after[:, :8])
    assert (before[:, 8:] - after[:, 8:]).abs().amax(dim=(0, 2)).min() > 1e-4


def test_every_caption_token_matters_to_the_first_code() -> None:
    model, features = tiny_model(), captions(1).requires_grad_()
    model(codes(1), features)[:, 0].square().sum().backward()
    assert features.grad is not None
    assert features.grad.abs().amax(dim=-1).min() > 0


@pytest.mark.parametrize("rotary", ["identity", "zero"])
def test_padding_changes_nothing(rotary: str) -> None:
    model, given = tiny_model(rotary=rotary), codes(2)
    short, long = captions(1, 3)[0], captions(1, LENGTH, seed=5)[0]
    features, mask = left_padded([short, long])
    together = model(given, features, mask)
    assert_close(together[:1], model(given[:1], short[None]), rtol=1e-4, atol=1e-4)
    assert_close(together[1:], model(given[1:], long[None]), rtol=1e-4, atol=1e-4)


def test_the_two_ways_of_attention_agree() -> None:
    model, features, mask = tiny_model(), *left_padded([captions(1, 2)[0], captions(1, 4)[0]])
    plain = model(codes(2), features, mask)  # with gradients: two products
    with torch.no_grad():
        fused = model(codes(2), features, mask)
    assert plain.requires_grad
    assert_close(plain.detach(), fused, rtol=1e-4, atol=1e-4)


def test_rotation_depends_on_the_distance_on_the_grid_only() -> None:
    table = rotation_table(2, 16, 8)
    query, key = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)

    def score(at: int, other: int) -> torch.Tensor:
        turned = [rotate(x.view(1, 1, 8), table.at(2 + place, 3 + place)) for x, place in ((query, at), (key, other))]
        return (turned[0] * turned[1]).sum()

    assert_close(score(0, 5), score(10, 15), rtol=1e-6, atol=1e-6)  # one down, one right
    assert abs(float(score(0, 5) - score(0, 6))) > 1e-3
    assert abs(float(score(0, 4) - score(0, 1))) > 1e-3  # a row is not a column


def test_caption_positions_are_still_or_zero() -> None:
    x = torch.randn(1, 3, 2, 8)
    assert_close(rotate(x, rotation_table(3, 4, 8).at(0, 3)), x)
    assert rotate(x, rotation_table(3, 4, 8, caption="zero").at(0, 3)).abs().max() == 0


def test_a_zero_head_starts_at_equal_chances() -> None:
    for factors in (None, FACTORS):
        model = LaytonGenTransformer(
            width=32,
            depth=1,
            num_heads=2,
            caption=CaptionShape(DIM, LENGTH),
            vocab_size=CODES,
            num_tokens=TOKENS,
            factors=factors,
        ).eval()
        loss = next_code_loss(model(codes(2), captions(2)), codes(2))
        assert_close(loss, torch.tensor(float(CODES)).log())
        loss.backward()
        head = model.vocabulary.head if factors is None else model.vocabulary.out_of
        assert head.weight.grad.abs().max() > 0


def test_a_model_learns_two_images_by_heart() -> None:
    model = tiny_model(factors=FACTORS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with torch.no_grad():
        first = next_code_loss(model(codes(2), captions(2)), codes(2))
    for _ in range(60):
        optimizer.zero_grad()
        loss = next_code_loss(model(codes(2), captions(2)), codes(2))
        loss.backward()
        optimizer.step()
    assert loss < 0.25 * first


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(3)  # the same elements are dropped
        next_code_loss(model(codes(2), captions(2)), codes(2)).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert_close(gradients[0], gradients[1])


def test_dropout_happens_in_training_only() -> None:
    model = tiny_model()
    assert_close(model(codes(1), captions(1)), model(codes(1), captions(1)), rtol=0, atol=0)
    model.train()
    assert (model(codes(1), captions(1)) - model(codes(1), captions(1))).abs().max() > 1e-3


def test_the_null_caption_is_the_same_in_every_model_and_ends_where_captions_end() -> None:
    torch.manual_seed(1)
    first = LaytonGenTransformer.from_size("tiny", caption=CaptionShape(DIM, LENGTH))
    torch.manual_seed(2)
    second = LaytonGenTransformer.from_size("tiny", caption=CaptionShape(DIM, LENGTH))
    assert_close(first.prefix.null, second.prefix.null, rtol=0, atol=0)
    null = first.null_condition(captions(2, 4))
    assert_close(null[0], first.prefix.null[-4:])
    kept = first.drop_condition(captions(2), torch.tensor([True, False]))
    assert_close(kept[1], captions(2)[1])
    assert_close(kept[0], first.prefix.null)
    with pytest.raises(ValueError, match="at most 6"):
        first.null_condition(captions(1, 7))


def test_a_learned_null_caption_learns() -> None:
    model = tiny_model(null="learned")
    features = model.drop_condition(captions(2), torch.tensor([True, True]))
    next_code_loss(model(codes(2), features), codes(2)).backward()
    assert model.prefix.null.grad.abs().max() > 0


def test_classes_have_a_label_for_none() -> None:
    model = tiny_model(classes=3)
    labels = torch.tensor([0, 2])
    assert model(codes(2), labels).shape == (2, TOKENS, CODES)
    assert model.null_condition(labels).tolist() == [3, 3]
    assert model.drop_condition(labels, torch.tensor([False, True])).tolist() == [0, 3]


def test_missing_images_do_not_count() -> None:
    logits, given = torch.randn(3, TOKENS, CODES, requires_grad=True), codes(3)
    loss = next_code_loss(logits, given, valid=torch.tensor([True, False, True]))
    assert_close(loss, F.cross_entropy(logits[[0, 2]].flatten(0, 1), given[[0, 2]].flatten()))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[1].abs().max() == 0
    assert next_code_loss(logits, given, valid=torch.zeros(3)).item() == 0.0
    smooth = next_code_loss(logits, given, label_smoothing=0.1)
    assert_close(smooth, F.cross_entropy(logits.flatten(0, 1), given.flatten(), label_smoothing=0.1))
    with pytest.raises(ValueError, match=r"1\.5"):
        next_code_loss(logits, given, label_smoothing=1.5)


@pytest.mark.parametrize("factors", [None, FACTORS])
@pytest.mark.parametrize("valid", [None, torch.tensor([True, False]), torch.zeros(2, dtype=torch.bool)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_in_chunks_and_its_gradients_are_those_of_all_logits(
    factors: Factors | None, valid: torch.Tensor | None, smoothing: float
) -> None:
    model, given, features = tiny_model(factors=factors), codes(2), captions(2)
    whole = next_code_loss(model(given, features), given, valid=valid, label_smoothing=smoothing)
    whole.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    head = model.vocabulary.linear_head(model.hidden(given, features))
    chunked = mean_of_valid(next_code_losses(head, given, label_smoothing=smoothing), valid)
    chunked.backward()
    assert_close(chunked, whole)
    for name, parameter in model.named_parameters():
        grad, wanted = parameter.grad, expected[name]
        if grad is None or wanted is None:
            assert all(value is None or not value.any() for value in (grad, wanted)), name
        else:
            assert_close(grad, wanted, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"1\.5"):
        next_code_losses(head, given, label_smoothing=1.5)


@pytest.mark.parametrize("valid", [None, torch.tensor([True, False])])
def test_codes_may_weigh_less(valid: torch.Tensor | None) -> None:
    model, given, features = tiny_model(factors=FACTORS), codes(2), captions(2)
    weights = torch.where(torch.arange(given.numel()).view_as(given) % 3 == 0, 1.0, 0.4)
    logits = model(given, features)
    terms = torch.nn.functional.cross_entropy(logits.flatten(0, 1), given.flatten(), reduction="none").view_as(given)
    counted = torch.ones(2) if valid is None else valid.float()
    whole = (terms * weights * counted[:, None]).sum() / (counted.sum() * given.shape[1])
    (expected,) = torch.autograd.grad(whole, model.vocabulary.into.weight)
    head = model.vocabulary.linear_head(model.hidden(given, features))
    chunked = mean_of_valid(next_code_losses(head, given), valid, weights)
    assert_close(chunked, whole)
    assert_close(torch.autograd.grad(chunked, model.vocabulary.into.weight)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_chunks_are_smaller_than_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, features = tiny_model(factors=FACTORS), codes(2), captions(2)
    found = []
    for logits in (1 << 20, 3 * CODES):  # all rows at once, and three at a time
        monkeypatch.setattr("generation.tasks.loss._CPU_LOGITS", logits)
        losses = next_code_losses(model.vocabulary.linear_head(model.hidden(given, features)), given)
        found.append((losses, *torch.autograd.grad(losses.square().sum(), [model.vocabulary.columns])))
    assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_contrast_asks_which_caption_explains_the_codes_better() -> None:
    true, contrary = torch.tensor([[1.0, 2.0], [0.5, 0.5]]), torch.tensor([[2.0, 4.0], [0.5, 0.5]])
    assert_close(contrast_loss(true, contrary), -torch.tensor([3.0, 0.0]).sigmoid().log().mean())


@pytest.mark.parametrize("factors", [None, FACTORS])
def test_a_saved_model_comes_back(factors: Factors | None, tmp_path: Path) -> None:
    model = tiny_model(factors=factors, rotary="zero")
    if factors is not None:
        model.set_codebook(torch.randn(CODES, 4))
    model.save_pretrained(tmp_path)
    again = LaytonGenTransformer.from_pretrained(tmp_path)
    assert again.config == model.config
    assert_close(again(codes(1), captions(1)), model(codes(1), captions(1)), rtol=0, atol=0)
    half = LaytonGenTransformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16
    assert half(codes(1), captions(1)).dtype == torch.float32
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"depth": 2', '"depth": 3'))
    with pytest.raises(ValueError, match=r"blocks\.2"):
        LaytonGenTransformer.from_pretrained(tmp_path)


def test_codes_that_look_alike_start_alike() -> None:
    model = tiny_model(factors=Factors(code_dim=4, rank=0))
    codebook = torch.randn(CODES, 4)
    codebook[1] = 3.0 * codebook[0]  # the same direction
    model.set_codebook(codebook)
    assert_close(model.vocabulary.embed(torch.tensor(0)), model.vocabulary.embed(torch.tensor(1)))
    with pytest.raises(ValueError, match="codebook must be"):
        model.set_codebook(codebook[:3])
    with pytest.raises(ValueError, match="full embedding"):
        tiny_model().set_codebook(codebook)


def test_wrong_sizes_are_told() -> None:
    caption = CaptionShape(DIM, LENGTH)
    good = {"width": 32, "depth": 1, "num_heads": 2, "num_tokens": 16}
    for wrong, text in (
        ({"num_heads": 3}, "num_heads 3"),
        ({"num_tokens": 15}, "square number, got 15"),
        ({"num_classes": 4}, "one of caption and num_classes"),
        ({"depth": 0}, "positive"),
    ):
        with pytest.raises(ValueError, match=text):
            LaytonGenTransformer(caption=caption, **{**good, **wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no size 'huge'; there are tiny"):
        LaytonGenTransformer.from_size("huge", caption=caption)
    for build in (lambda: Dropout(token=1.0), lambda: Factors(0, 0), lambda: replace(caption, dim=0)):
        with pytest.raises(ValueError):
            build()
    assert set(SIZES) >= {"tiny", "mini", "B", "L", "XL", "XXL", "3B"}
