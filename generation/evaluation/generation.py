"""Generated images against real ones with the same captions: Frechet distance and CLIP score, with their protocol.

FD-effnet is measured in the features of EfficientNet-lite0 and is never comparable with FID; FID and CLIP score join
where their weights are on disk, and what is absent is listed with the reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from layton.devices import choose_device
from layton.metrics.aggregate import Measurement, NamedMeans
from layton.metrics.external import AbsentError, ExternalSources, load_clip_score, load_inception_fid
from layton.metrics.frechet import bootstrap_spread, frechet_distance_of_features
from layton.metrics.image import round_to_uint8
from layton.metrics.protocol import library_versions
from layton.metrics.report import FrechetScore
from layton.ranks import all_gather_shares, own_share
from layton.reproduce.evaluation import Draw

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class GenerationReport:
    """Figures of one model on one set of captions.

    Attributes:
        protocol: Everything that the figures depend on.
        frechet: Distances between generated and real images, by name.
        measurements: Means over images, by name: ``clip_score`` (100 times the cosine).
        absent: What was not measured, with the reason.
    """

    protocol: Mapping[str, Any]
    frechet: Mapping[str, FrechetScore] = field(default_factory=dict)
    measurements: Mapping[str, Measurement] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {
            "protocol": dict(self.protocol),
            **{name: score.to_dict() for name, score in self.frechet.items()},
            **{name: value.to_dict() for name, value in self.measurements.items()},
            "absent": dict(self.absent),
        }

    def summary(self) -> str:
        """A few lines for people."""
        lines = [f"{name} {score.value:.2f} ({score.num_images} images)" for name, score in self.frechet.items()]
        lines += [f"{name} {m.mean:.2f} +- {m.standard_error:.2f}" for name, m in self.measurements.items()]
        return "\n".join([*lines, *(f"no {name}: {reason}" for name, reason in self.absent.items())])


def evaluate_generation(
    draw: Draw,
    real: Iterable[tuple[Tensor, Sequence[str]]],
    *,
    protocol: Mapping[str, Any],
    seed: int = 0,
    sources: ExternalSources | None = None,
    features: Features | None = None,
    num_resamples: int = 0,
    device: str | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> GenerationReport:
    """Draw one image for each caption of a set and compare the two sets.

    Args:
        draw: ``(texts, seeds) -> images``, uint8 (H, W, 3) each.
        real: Batches of images (B, 3, H, W) in [-1, 1] and B captions.
        protocol: What data and model are; counts, hashes and versions are added.
        seed: The image of caption i gets ``seed + i``.
        sources: Where external weights are looked for.
        features: Images (B, 3, H, W) in [-1, 1] to features (B, D) of FD-effnet; EfficientNet-lite0 by default.
        num_resamples: Bootstrap resamples for the spread of FD-effnet; 0 for none.
        device: Where features are made; the accelerator if there is one.
        on_progress: Told how many images are done with.

    Raises:
        ValueError: If there are fewer than two images, or one resample, which has no spread; if the two sets are not of
            one size; if a CLIP model was named that is not there.
    """
    if num_resamples == 1:
        raise ValueError("num_resamples must be 0 or at least 2, got 1")
    places, place = sources or ExternalSources(), choose_device(device)
    absent: dict[str, str] = {}
    extract = features if features is not None else _effnet(absent)
    clip, inception = _external(places, absent, place)
    pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
    scores = NamedMeans(["clip_score"])
    texts = hashlib.sha256()
    total, sizes = 0, set[tuple[int, ...]]()
    for images, captions in real:
        drawn = draw(list(captions), [seed + total + row for row in range(len(captions))])
        made = rearrange(torch.from_numpy(np.stack(list(drawn))), "b h w c -> b c h w").float() / 127.5 - 1
        images = round_to_uint8(images)
        own = own_share(range(len(captions)))  # metrics add up what all processes count
        if images.shape != made.shape:
            have, want = ("x".join(map(str, batch.shape[:1:-1])) for batch in (images, made))
            raise ValueError(
                f"real images are taken at {have} pixels, drawn ones have {want}: say --size {made.shape[-1]}"
            )
        sizes.add(tuple(made.shape[-2:]))
        texts.update("\n".join([*captions, ""]).encode("utf-8", "replace"))
        for number, batch in enumerate((images, made)):
            if extract is not None and len(own):
                pairs[number].append(extract(batch[own].to(place)).cpu())
            if inception is not None and len(own):
                inception.update(((batch[own] + 1) * 127.5).round().to(place, torch.uint8), real=number == 0)
        if clip is not None and len(own):
            scores.update(clip(made[own], [captions[row] for row in own])[:, None])
        total += len(captions)
        if on_progress is not None:
            on_progress(len(captions))
    if total < 2:
        raise ValueError(f"at least two images are needed, got {total}")
    frechet: dict[str, FrechetScore] = {}
    if extract is not None:
        a, b = (all_gather_shares(torch.cat(part)) for part in pairs)
        spread = bootstrap_spread(a, b, num_resamples=num_resamples, paired=True) if num_resamples else None
        frechet["fd_effnet"] = FrechetScore(float(frechet_distance_of_features(a, b)), total, spread)
    if inception is not None:
        frechet["fid_inception"] = FrechetScore(float(inception.compute()), total)
    record = {
        **protocol,
        "num_images": total,
        "captions_sha256": texts.hexdigest(),
        "image_sizes": sorted(sizes),
        "seed": seed,
        "uint8_rounding": True,
        "features": "EfficientNet-lite0" if features is None else "given",
        "clip": places.clip if clip is not None else None,
        "versions": library_versions(),
    }
    return GenerationReport(record, frechet, {} if clip is None else scores.measurements(), absent)


def _effnet(absent: dict[str, str]) -> Features | None:
    from layton.metrics.effnet import EfficientNetLite0, PooledFeatures

    try:
        pooled = PooledFeatures(EfficientNetLite0())
    except ImportError as error:
        absent["fd_effnet"] = str(error)
        return None

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            return pooled(images)

    return features


def _external(sources: ExternalSources, absent: dict[str, str], place: torch.device) -> tuple[Any, Any]:
    """CLIP score and an empty FID metric, None each where weights are missing."""
    clip = inception = None
    try:
        clip = load_clip_score(sources).to(place)
    except AbsentError as error:
        if sources.clip is not None:
            raise ValueError(str(error)) from error
        absent["clip_score"] = str(error)
    try:
        inception = load_inception_fid(sources)().to(place)
    except AbsentError as error:
        absent["fid_inception"] = str(error)
    return clip, inception
