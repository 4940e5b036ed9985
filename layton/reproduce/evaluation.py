"""The same evaluation for every arm: one set of captions, seeds and real images; finished parts are kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from layton.data.sources import ScenesSource
from layton.devices import choose_device
from layton.folder import load_tensors, save_tensors
from layton.ldm.drawing import TextToImage
from layton.metrics.coverage import coverage
from layton.metrics.effnet import EfficientNetLite0
from layton.metrics.frechet import bootstrap_spread, frechet_distance_of_features
from layton.reproduce.claim import Scale
from layton.sceneval import make_prompts, run_sceneval

Draw = Callable[[Sequence[str], Sequence[int]], Sequence[NDArray[np.uint8]]]

PART = 256  # images in a file of features: what an interruption costs at most
SEED_STRIDE = 10_000_000  # between the repetitions of SceneEval
NEIGHBOURS = 5


@dataclass(frozen=True, slots=True)
class SceneScores:
    """SceneEval, repeated with several seeds on the same prompts.

    Attributes:
        overall: Score of each repetition, in [0, 1].
        tasks: Mean score of each task.
        images: Images in each repetition.
    """

    overall: tuple[float, ...]
    tasks: dict[str, float]
    images: int

    @property
    def mean(self) -> float:
        """Over the repetitions."""
        return mean(self.overall)

    @property
    def standard_error(self) -> float:
        """Of the mean, over the repetitions; 0 for one."""
        return stdev(self.overall) / len(self.overall) ** 0.5 if len(self.overall) > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields under their names, with mean and standard error."""
        return {**asdict(self), "mean": self.mean, "standard_error": self.standard_error}


class Evaluator:
    """Measures models on the test split of Scenes.

    Args:
        folder: Where features and scores are kept.
        scale: How many images, prompts and repetitions.
        image_size: Side of the models' images in pixels.
        places: Whether prompts say where objects stand (`layton.scenes.placed`), as the teacher has learnt.
    """

    def __init__(self, folder: Path, scale: Scale, image_size: int, *, places: bool = False) -> None:
        self.folder, self.scale, self.image_size, self.places = folder, scale, image_size, places
        self.scenes = ScenesSource(
            split="test",
            length=scale.images,
            size=image_size,
            places=float(places),
            textures=scale.textures,
        )
        self._network: EfficientNetLite0 | None = None

    def real_features(self) -> Tensor:
        """Features (n, 1280) of the rendered scenes."""

        def render(captions: Sequence[str], numbers: Sequence[int]) -> Tensor:
            return torch.stack([self.scenes.sample(number, seed=0)["image"] for number in numbers])

        return self._features("real", render)

    def features(self, name: str, draw: Draw) -> Tensor:
        """Features (n, 1280) of one drawing for each scene's caption; drawing i has the seed i, whatever the model."""

        def make(captions: Sequence[str], numbers: Sequence[int]) -> Tensor:
            pixels = torch.from_numpy(np.stack(list(draw(captions, numbers))))
            return rearrange(pixels, "b h w c -> b c h w").float() / 127.5 - 1

        return self._features(name, make)

    def distance(self, name: str) -> dict[str, Any]:
        """FD-effnet of features that were made, with its bootstrap spread, and coverage.

        Drawings and scenes are paired by caption, and resampled as pairs.
        """
        path = self.folder / name / "distance.json"
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        real, made = self.stored("real"), self.stored(name)
        spread = bootstrap_spread(real, made, num_resamples=self.scale.resamples, paired=True)
        figures = {
            "fd_effnet": float(frechet_distance_of_features(real, made)),
            "fd_effnet_spread": spread.to_dict(),
            "coverage": coverage(real, made, nearest=min(NEIGHBOURS, len(real) - 1)),
            "num_images": len(real),
        }
        _write_json(path, figures)
        return figures

    def pictures(self, name: str, draw: Draw, count: int) -> Tensor:
        """The first drawings themselves (count, 3, H, W) in [-1, 1], kept on disk as uint8."""
        path = self.folder / name / f"pictures-{count}.safetensors"
        if not path.is_file():
            made: list[NDArray[np.uint8]] = []
            for start in range(0, count, self.scale.batch_size):
                numbers = range(start, min(start + self.scale.batch_size, count))
                made += draw([self._caption(number) for number in numbers], list(numbers))
            save_tensors(path, {"images": torch.from_numpy(np.stack(made))})
        return rearrange(load_tensors(path)["images"], "b h w c -> b c h w").float() / 127.5 - 1

    def scene_scores(self, name: str, draw: Draw) -> SceneScores:
        """SceneEval with every seed of the scale, on test prompts."""
        scale, reports = self.scale, []
        for seed in scale.seeds:
            path = self.folder / name / f"sceneval-{seed}.json"
            if not path.is_file():
                report = run_sceneval(
                    draw,
                    make_prompts(scale.per_task, places=self.places),
                    scale.images_per_prompt,
                    batch_size=scale.batch_size,
                    seed=seed * SEED_STRIDE,
                )
                _write_json(path, report.to_dict())
            reports.append(json.loads(path.read_text(encoding="utf-8")))
        names = [task["task"] for task in reports[0]["tasks"]]
        tasks = {n: mean(r["tasks"][i]["score"] for r in reports) for i, n in enumerate(names)}
        return SceneScores(tuple(report["overall"] for report in reports), tasks, reports[0]["images"])

    def _features(self, name: str, make: Callable[[Sequence[str], Sequence[int]], Tensor]) -> Tensor:
        for start in range(0, self.scale.images, PART):
            path = self._part(name, start)
            if path.is_file():
                continue
            rows = []
            for first in range(start, min(start + PART, self.scale.images), self.scale.batch_size):
                last = min(first + self.scale.batch_size, start + PART, self.scale.images)
                numbers = range(first, last)
                images = make([self._caption(number) for number in numbers], list(numbers))
                rows.append(self._extract(images))
            save_tensors(path, {"features": torch.cat(rows)})
        return self.stored(name)

    def stored(self, name: str) -> Tensor:
        """Features that were made before, (n, 1280)."""
        parts = [self._part(name, start) for start in range(0, self.scale.images, PART)]
        return torch.cat([load_tensors(path)["features"] for path in parts])

    def _part(self, name: str, start: int) -> Path:
        return self.folder / name / f"features-{start:06d}.safetensors"

    def _caption(self, number: int) -> str:
        return self.scenes.sample(number, seed=0)["caption"]

    def _extract(self, images: Tensor) -> Tensor:
        if self._network is None:
            self._network = EfficientNetLite0()
        return self._network(images.to(choose_device(None))).pooled.cpu()


def unadapted_drawer(pipeline: Path, *, guidance_scale: float) -> TextToImage:
    """The teacher itself, evaluated once at its noisiest time: what one-step adaptors start from."""
    from distill.few_step import FewStepSampling
    from distill.models import denoiser_from_pipeline
    from layton.distillation.few_step_schedulers import few_step_scheduler

    drawer = TextToImage.load(pipeline, num_steps=1, guidance_scale=guidance_scale)
    denoiser = denoiser_from_pipeline(drawer.pipeline)
    sampling = FewStepSampling(times=((denoiser.schedule.terminal_t,),), prediction=denoiser.prediction_type)
    scheduler = few_step_scheduler(sampling, drawer.pipeline.scheduler.config)
    drawer.pipeline.register_modules(scheduler=scheduler)
    return drawer


def _write_json(path: Path, figures: dict[str, Any]) -> None:
    from layton.folder import write_json

    write_json(path, figures)
