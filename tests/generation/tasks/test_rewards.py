from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from laytongen_parts import CODES, TOKENS, WIDTH, tiny_text_encoder, tiny_tokenizer, tiny_transformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.testing import assert_close

from generation.data.source import TokenShards
from generation.data.tokenizing import TokenizeJob, tokenize_dataset
from generation.generator import SamplingDefaults
from generation.model.shapes import CaptionShape
from generation.model.transformer import LaytonGenTransformer
from generation.model.vocabulary import LinearHead
from generation.sampling.codes import SamplingOptions, plain_where_sure, seeded_generators
from generation.sampling.decoding import generate_codes
from generation.sampling.guidance import Guidance, guide
from generation.tasks.foresight import Foresight
from generation.tasks.policy import credit_advantages, entropies, group_advantages, most_telling, policy_losses
from generation.tasks.reward import LaytonGenRewardTask
from generation.tasks.rewards import Reward, SceneReward, Scores, credit_map
from generation.text.encoders import TextFeatures
from layton.data.loader import collate
from layton.data.prompts import SceneCaptions
from layton.data.sources import ScenesSource
from layton.scenes import AHEAD_SIZES
from layton.scenes.world import Shape
from layton.sceneval.detection import FoundObject
from layton.sceneval.spec import PromptSpec, Requirement

Options = tuple[float, SamplingOptions]
WAYS: list[Options] = [
    (1.0, SamplingOptions()),
    (3.0, SamplingOptions(temperature=0.7)),
    (2.0, SamplingOptions(temperature=0.7, min_entropy=2.9)),
]


def sharp_model(*, full: bool) -> LaytonGenTransformer:
    """Logits with some spread: entropies from 2 to 3.4 nats."""
    model = tiny_transformer()
    if full:
        torch.manual_seed(0)
        shape = {"width": 32, "depth": 1, "num_heads": 2, "hidden": 64, "vocab_size": CODES, "num_tokens": TOKENS}
        model = LaytonGenTransformer(**shape, caption=CaptionShape(WIDTH, 32), zero_head=False).eval()
        model.vocabulary.head.weight.data.mul_(8.0)
    else:
        model.vocabulary.out_of.weight.data.mul_(25.0)
        model.vocabulary.bias.data.normal_(generator=torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize(("scale", "options"), WAYS)
@pytest.mark.parametrize("full", [False, True])
def test_the_policy_is_what_codes_are_drawn_from(scale: float, options: SamplingOptions, full: bool) -> None:
    model = sharp_model(full=full)
    features = torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True] * 6, [False] * 2 + [True] * 4, [False] * 5 + [True]])
    codes = generate_codes(
        model,
        features,
        mask,
        generators=seeded_generators([1, 2, 3]),
        sampling=options,
        guidance=Guidance(scale),
    )
    plain = model(codes, features, mask)
    none = model(codes, model.null_condition(features), mask)
    rows, other = plain.flatten(0, 1), none.flatten(0, 1)
    logits = plain_where_sure(guide(torch.cat([rows, other]), scale), rows, options) / options.temperature
    expected = -logits.log_softmax(-1).gather(1, codes.flatten()[:, None]).view(codes.shape)
    text = TextFeatures(features, mask)
    assert_close(policy_losses(model, codes, text, sampling=options, guidance_scale=scale), expected)
    if options.min_entropy and not full:
        sure = entropies(model.vocabulary.linear_head(model.hidden(codes, features, mask))) < options.min_entropy
        assert 0 < sure.float().mean() < 1  # both ways were taken


def test_autocast_does_not_blur_what_is_sure() -> None:
    model = sharp_model(full=False)
    codes = torch.randint(CODES, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    head = model.vocabulary.linear_head(model.hidden(codes, torch.randn(2, 3, WIDTH)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = entropies(head)
    assert_close(found, entropies(head))


def test_entropies_of_known_distributions() -> None:
    head = LinearHead(torch.tensor([[[0.0], [100.0]]]), torch.tensor([[1.0], [0.0], [0.0], [0.0]]), None)
    assert_close(entropies(head), torch.tensor([[4.0, 1.0]]).log())


def test_a_policy_that_cannot_draw_a_code_is_refused() -> None:
    text = TextFeatures(torch.zeros(1, 2, WIDTH), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="every code"):
        policy_losses(
            tiny_transformer(), torch.zeros(1, TOKENS, dtype=torch.int64), text, sampling=SamplingOptions(top_k=4)
        )


def test_the_best_and_the_worst_are_compared_with_their_group() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.5, 0.2], [0.3, 0.3, 0.3, 0.3]])
    chosen = most_telling(rewards, 2)
    assert chosen[0].tolist() == [1, 0]
    assert_close(group_advantages(rewards.gather(1, chosen)), torch.tensor([[1.0, -1.0], [0.0, 0.0]]))


def test_credit_is_compared_with_that_of_the_group() -> None:
    credit = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    expected = torch.tensor([[0.5, -1.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert_close(credit_advantages(credit, 2), expected)


def test_a_scene_fulfils_its_own_captions() -> None:
    source = ScenesSource(split="train", length=24, size=256, chinese=0.3, reworded=0.8, related=0.5)
    batch = collate([source.sample(index, seed=index) for index in range(24)])
    reward = SceneReward(partial=0.4)
    scores = reward.score(batch["image"], batch["caption"], batch["key"], grid=(16, 16))
    assert scores.total.mean() > 0.98
    assert scores.credit is not None
    assert scores.credit.shape == (24, 16, 16)
    assert (scores.credit < 0).float().mean() < 0.005
    assert (scores.credit > 0).any(1).any(1).all()
    blank = reward.score(torch.zeros(2, 3, 128, 128), batch["caption"][:2], batch["key"][:2], grid=(16, 16))
    assert blank.total.tolist() == [0.0, 0.0]
    assert blank.credit is not None and not blank.credit.any()
    other = reward.score(batch["image"].roll(1, 0), batch["caption"], batch["key"], grid=(16, 16))
    assert other.total.mean() < 0.4
    assert (other.total > 0).any()  # something is right in some


def _found(shape: Shape, cx: float, cy: float, *, score: float = 0.9) -> FoundObject:
    return FoundObject(shape, "red", cx, cy, 0.2, score)


def test_credit_goes_to_the_places_that_earned_it() -> None:
    star, ring = Requirement("star", 2), Requirement("ring", 1)
    spec = PromptSpec("counting", (star, ring), (), "two stars and a ring")
    patches = [
        _found("star", 0.2, 0.8),  # one too many: lowest
        _found("star", 0.2, 0.2),
        _found("star", 0.8, 0.2),
        _found("ring", 0.5, 0.5, score=0.1),  # ragged
    ]
    credit = credit_map(patches, spec, (10, 10))
    assert [credit[1, 1], credit[1, 7], credit[7, 1], credit[4, 4], credit[9, 9]] == [1, 1, -1, -1, 0]
    assert credit[1, 3] == 0  # a cell outside the circle of radius 0.1
    ragged = FoundObject("ring", "red", 0.2, 0.15, 0.6, 0.1)  # all around the first star
    around = credit_map([*patches, ragged], spec, (10, 10))
    assert [around[1, 1], around[4, 2]] == [1, -1]


def test_the_later_of_two_is_out_of_place() -> None:
    spec = PromptSpec(
        "position", (Requirement("ring", 1), Requirement("star", 1, None, "below", 0)), (), "a star below a ring"
    )
    right = credit_map([_found("ring", 0.5, 0.2), _found("star", 0.5, 0.8)], spec, (10, 10))
    assert [right[1, 4], right[7, 4]] == [1, 1]
    wrong = credit_map([_found("ring", 0.5, 0.8), _found("star", 0.5, 0.2)], spec, (10, 10))
    assert [wrong[1, 4], wrong[7, 4]] == [1, -1]


def test_what_is_no_scene_cannot_be_judged() -> None:
    image = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match="got 'cats/1'"):
        SceneReward().score(image, ["a cat"], ["cats/1"], grid=(4, 4))
    with pytest.raises(ValueError, match="no caption of scene 5"):
        SceneReward().score(image, ["a cat"], ["scenes/5"], grid=(4, 4))
    with pytest.raises(ValueError, match=r"partial .* got 1\.0"):
        SceneReward(partial=1.0)


class _Bright(Reward):
    """Mean brightness, and that of places if it is asked for."""

    def __init__(self, *, local: bool) -> None:
        self.local = local

    def score(self, images: Tensor, captions: Sequence[str], keys: Sequence[str], *, grid: tuple[int, int]) -> Scores:
        places = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), grid).squeeze(1)
        return Scores(images.mean((1, 2, 3)), places if self.local else None)


def reward_task(
    folder: Path,
    *,
    reward: Reward | None = None,
    transformer: LaytonGenTransformer | None = None,
    trainable: bool = True,
    sampling: SamplingDefaults | None = None,
    **options: Any,
) -> LaytonGenRewardTask:
    tiny_tokenizer().save_pretrained(folder)
    return LaytonGenRewardTask(
        transformer or tiny_transformer(dropout=0.0),
        tiny_text_encoder(trainable=trainable),
        reward=reward or _Bright(local=False),
        optimizer=lambda parameters: AdamW(parameters, lr=3e-3),
        tokenizer=str(folder),
        sampling=sampling or SamplingDefaults(guidance_scale=1.5, temperature=0.9),
        **options,
    )


@pytest.mark.parametrize(("local", "whole"), [(False, 1.0), (True, 0.0)])
def test_it_learns_what_is_rewarded(tmp_path: Path, local: bool, whole: float) -> None:
    task = reward_task(tmp_path, reward=_Bright(local=local), whole=whole).train()
    source = SceneCaptions(length=8)
    batch = collate([source.sample(index, seed=0) for index in range(8)])
    optimizer = AdamW(task.trainable_parameters(), lr=1e-2)
    before = task.validation_step(batch, 0).item()
    for step in range(20):
        task._randomness.seed = step  # without a trainer all steps draw the same numbers
        optimizer.zero_grad()
        task.training_step(batch, 0).backward()
        optimizer.step()
    assert task.transformer.training
    after = task.validation_step(batch, 0).item()  # minus the reward
    assert after < before - 0.02  # three times the standard deviation of images' rewards before


class _Alike(Reward):
    """Likes all images the same; is a network of its own, as judges often are."""

    def __init__(self) -> None:
        self.network = nn.Linear(3, 1)

    def score(self, images: Tensor, captions: Sequence[str], keys: Sequence[str], *, grid: tuple[int, int]) -> Scores:
        assert self.network(images.mean((2, 3))).dtype == torch.float32
        return Scores(torch.ones(len(images)))


@pytest.mark.parametrize("trainable", [False, True])
def test_a_batch_that_teaches_nothing_still_goes_through_every_parameter(tmp_path: Path, trainable: bool) -> None:
    """Else a rank would leave the others waiting for its gradients."""
    task = reward_task(tmp_path, reward=_Alike(), trainable=trainable).train()
    source = SceneCaptions(length=2)
    batch = collate([source.sample(index, seed=0) for index in range(2)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task.training_step({**batch, "caption": [batch["caption"][0], ""]}, 0)
    loss.backward()
    assert loss == 0
    missing = [name for name, value in task.named_parameters() if value.requires_grad and value.grad is None]
    assert not missing
    assert not any("network" in name for name in task.state_dict())


def test_real_codes_are_learnt_beside_the_reward(tmp_path: Path) -> None:
    """A batch that earns nothing teaches exactly what supervised training does."""
    foresight = Foresight(AHEAD_SIZES, block=0, weight=0.5)
    task = reward_task(tmp_path, reward=_Alike(), supervised=0.1, foresight=foresight).train()
    tokenizer = tiny_tokenizer()
    source = ScenesSource(split="train", length=4, size=tokenizer.image_size)
    tokenize_dataset(TokenizeJob(source, tokenizer, "scenes"), tmp_path / "tokens")
    tokens = TokenShards(str(tmp_path / "tokens"), ahead=True)
    batch = collate([tokens.sample(index, seed=0) for index in range(4)])
    terms, _ = task.supervised_terms(batch)
    loss = task.training_step(batch, 0)
    assert_close(loss, 0.1 * (terms["cross_entropy"] + 0.5 * terms["foresight"]))
    loss.backward()
    assert not [name for name, value in task.named_parameters() if value.requires_grad and value.grad is None]


def test_an_empty_prompt_is_drawn_as_the_pipeline_draws_it(tmp_path: Path) -> None:
    task = reward_task(tmp_path).eval()
    text = task._told({"caption": ["", "a red circle"]})
    features = task.text_encoder.encode(["", "a red circle"]).features
    assert_close(text.features[1], features[1])
    assert_close(text.features[:1], task.transformer.null_condition(features[:1]))


class _Wrong(Reward):
    def __init__(self, scores: Scores) -> None:
        self.scores = scores

    def score(self, images: Tensor, captions: Sequence[str], keys: Sequence[str], *, grid: tuple[int, int]) -> Scores:
        return self.scores


@pytest.mark.parametrize(
    ("scores", "complaint"),
    [
        (Scores(torch.zeros(3)), r"total must be finite numbers \(16,\), got \(3,\)"),
        (Scores(torch.full((16,), torch.nan)), "total must be finite"),
        (
            Scores(torch.zeros(16), torch.zeros(16, 2, 2)),
            r"credit must be finite numbers \(16, 4, 4\), got \(16, 2, 2\)",
        ),
    ],
)
def test_scores_that_are_none_are_refused(tmp_path: Path, scores: Scores, complaint: str) -> None:
    task = reward_task(tmp_path, reward=_Wrong(scores))
    with pytest.raises(ValueError, match=complaint):
        task.training_step({"caption": ["a", "b"], "key": ["1", "2"]}, 0)


def test_what_cannot_be_a_policy_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 1 and 8"):
        reward_task(tmp_path, kept=1)
    with pytest.raises(ValueError, match="got -1 and 0"):
        reward_task(tmp_path, whole=-1)
    with pytest.raises(ValueError, match="give supervised > 0"):
        reward_task(tmp_path, foresight=Foresight(AHEAD_SIZES, block=0))
    with pytest.raises(ValueError, match="every code"):
        reward_task(tmp_path, sampling=SamplingDefaults(top_k=10))
    with pytest.raises(ValueError, match="without dropout"):
        reward_task(tmp_path, transformer=tiny_transformer())
