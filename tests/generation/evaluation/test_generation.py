from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from generation.evaluation.generation import evaluate_generation
from layton.metrics.external import ExternalSources

IMAGES = torch.randint(256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float() / 127.5 - 1
CAPTIONS = [f"number {row}" for row in range(6)]


def batches(size: int) -> Iterator[tuple[Tensor, Sequence[str]]]:
    for start in range(0, 6, size):
        yield IMAGES[start : start + size], CAPTIONS[start : start + size]


def features(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :3]


class Copier:
    """Draws the real image of a caption, shifted by a constant; notes the seeds."""

    def __init__(self, shift: int = 0) -> None:
        self.shift, self.seeds = shift, list[int]()

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[NDArray[np.uint8]]:
        self.seeds += seeds
        rows = [int(prompt.split()[1]) for prompt in prompts]
        pixels = ((IMAGES[rows] + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
        return list((pixels + self.shift).clip(0, 255).astype(np.uint8))


def test_a_copy_has_distance_zero_and_the_protocol_says_how() -> None:
    draw = Copier()
    report = evaluate_generation(draw, batches(4), protocol={"dataset": "d"}, seed=7, features=features)
    assert report.frechet["fd_effnet"].value == pytest.approx(0, abs=1e-9)
    assert draw.seeds == list(range(7, 13))
    assert report.protocol["num_images"] == 6
    assert report.protocol["dataset"] == "d"
    assert "clip_score" in report.absent  # no CLIP was named, and that is said
    assert "no clip_score: no CLIP model was named" in report.summary()
    other = evaluate_generation(Copier(), batches(3), protocol={"dataset": "d"}, seed=7, features=features)
    assert other.to_dict() == report.to_dict()  # batches have no influence


def test_a_shifted_copy_is_further_away() -> None:
    report = evaluate_generation(Copier(60), batches(4), protocol={}, features=features, num_resamples=5)
    score = report.frechet["fd_effnet"]
    assert score.value > 0.05
    assert score.spread is not None


def test_one_image_is_no_set() -> None:
    with pytest.raises(ValueError, match="at least two"):
        evaluate_generation(Copier(), [(IMAGES[:1], CAPTIONS[:1])], protocol={}, features=features)
    with pytest.raises(ValueError, match="got 1"):  # before anything is drawn
        evaluate_generation(Copier(), iter(()), protocol={}, features=features, num_resamples=1)


def test_sets_of_two_sizes_and_a_missing_clip_model_are_refused() -> None:
    def larger(prompts: Sequence[str], seeds: Sequence[int]) -> list[NDArray[np.uint8]]:
        return [np.zeros((16, 16, 3), np.uint8) for _ in prompts]

    with pytest.raises(ValueError, match="taken at 8x8 pixels, drawn ones have 16x16: say --size 16"):
        evaluate_generation(larger, batches(3), protocol={}, features=features)
    with pytest.raises(ValueError, match="no CLIP model '/nowhere'"):
        evaluate_generation(
            Copier(), batches(3), protocol={}, features=features, sources=ExternalSources(clip="/nowhere")
        )
