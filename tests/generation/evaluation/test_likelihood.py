"""Teacher-forced scores: known answers, independence of the batch, and agreement of equal and other weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from laytongen_parts import CODES, TOKENS, tiny_generator, tiny_tokenizer
from torch.nn import functional as F

from generation.data.source import TokenShards
from generation.data.tokenizing import TokenizeJob, tokenize_dataset
from generation.evaluation.likelihood import score_next_codes
from generation.generator import Generator
from layton.data.sources import ScenesSource


@pytest.fixture(scope="module")
def generator() -> Generator:
    return tiny_generator(tiny_tokenizer())


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    out, tokenizer = tmp_path_factory.mktemp("tokens"), tiny_tokenizer()
    source = ScenesSource(split="test", length=7, size=tokenizer.image_size)
    tokenize_dataset(TokenizeJob(source, tokenizer, "scenes"), out)
    return TokenShards(str(out))


def test_scores_are_those_of_single_images(generator: Generator, shards: TokenShards) -> None:
    scores = score_next_codes(generator, shards, batch_size=3)
    losses, right = [], 0
    for index in range(7):
        sample = shards.sample(index, seed=0)
        text = generator.text_encoder.encode([sample["caption"]])
        with torch.no_grad():
            logits = generator.transformer(sample["codes"][None], text.features, text.mask)[0]
        losses.append(float(F.cross_entropy(logits, sample["codes"])))
        right += int((logits.argmax(-1) == sample["codes"]).sum())
    assert (scores.images, scores.codes) == (7, 7 * TOKENS)
    assert scores.cross_entropy == pytest.approx(sum(losses) / 7, rel=1e-5)
    assert scores.accuracy == right / (7 * TOKENS) <= scores.accuracy_top5
    assert scores.agreement is None
    assert score_next_codes(generator, shards, count=1).images == 1


def test_no_knowledge_scores_the_logarithm_of_the_vocabulary(generator: Generator, shards: TokenShards) -> None:
    ignorant = copy.deepcopy(generator.transformer)
    ignorant.vocabulary.zero_head()
    blank = Generator(ignorant, generator.text_encoder, generator.card)
    assert score_next_codes(blank, shards).cross_entropy == pytest.approx(math.log(CODES), rel=1e-5)


def test_agreement_with_equal_and_with_other_weights(generator: Generator, shards: TokenShards) -> None:
    same, other = copy.deepcopy(generator.transformer), copy.deepcopy(generator.transformer)
    with torch.no_grad():
        other.vocabulary.out_of.weight.neg_()
    assert score_next_codes(generator, shards, other=same).agreement == 1.0
    assert score_next_codes(generator, shards, other=other).agreement < 0.5


def test_one_image_has_no_error(generator: Generator, shards: TokenShards) -> None:
    assert score_next_codes(generator, shards, count=1).standard_error is None


def test_tokens_of_another_tokenizer_are_refused(shards: TokenShards) -> None:
    with pytest.raises(ValueError, match="another tokenizer"):
        score_next_codes(tiny_generator(tiny_tokenizer(seed=1)), shards)
    with pytest.raises(ValueError, match="got 0"):
        score_next_codes(tiny_generator(tiny_tokenizer()), shards, count=0)


def test_broken_weights_are_no_result(generator: Generator, shards: TokenShards) -> None:
    broken = copy.deepcopy(generator.transformer)
    with torch.no_grad():
        broken.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="of 7 images are not finite"):
        score_next_codes(Generator(broken, generator.text_encoder, generator.card), shards)
