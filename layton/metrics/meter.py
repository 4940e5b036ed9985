"""Accumulates the measures of several ways to reconstruct the same images, over batches and ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from layton.metrics.aggregate import NamedMeans
from layton.metrics.codebook import CodebookStatistics
from layton.metrics.colour import colour_errors
from layton.metrics.effnet import POOLED_FEATURES, EfficientNetLite0, EffNetFeatures
from layton.metrics.external import ExternalMeasures
from layton.metrics.frechet import FrechetFeatureDistance, GivenFeatures, bootstrap_spread
from layton.metrics.image import PSNR_CAP, mean_squared_error, psnr, ssim
from layton.metrics.perceptual import feature_distance
from layton.metrics.protocol import Protocol
from layton.metrics.report import COLOUR_NAMES, FrechetScore, ReconstructionReport, Scores
from layton.ranks import all_gather_shares, has_ranks


class Meter:
    """Accumulates every measure of every method over batches.

    Args:
        methods: Names; "model" and those of the references.
        network: For EPD and FD-effnet, None for neither.
        external: Further measures.
        keep_features: Keep the pooled features of all images, for the bootstrap.
    """

    def __init__(
        self,
        methods: tuple[str, ...],
        network: EfficientNetLite0 | None,
        external: ExternalMeasures | None,
        *,
        keep_features: bool,
    ) -> None:
        self.network = network
        self.external = external or ExternalMeasures()
        self.keep_features = keep_features
        self.quality = ("psnr", "ssim", *(() if network is None else ("epd",)), *self.external.pairs)
        self.means = {name: NamedMeans((*self.quality, "mse", *COLOUR_NAMES, "colour_delta")) for name in methods}
        self.gains = {name: NamedMeans(self.quality) for name in methods if name != "model"}
        frechet = () if network is None else methods
        self.distances = {name: FrechetFeatureDistance(GivenFeatures(POOLED_FEATURES)) for name in frechet}
        make = self.external.inception_fid
        self.inception = {} if make is None else {name: make() for name in methods}
        self.features: dict[str, list[Tensor]] = {}
        self.sizes: set[tuple[int, int]] = set()
        self.device = torch.device("cpu")

    def update(self, originals: Tensor, results: Mapping[str, Tensor]) -> None:
        """Measures one batch: originals (B, 3, H, W) and each method's result, all rounded to 8 bits."""
        self.device = originals.device
        self.sizes.add((originals.shape[-2], originals.shape[-1]))
        seen = None if self.network is None else self.network(originals)
        self._keep("originals", seen)
        rows: dict[str, Tensor] = {}
        for name, images in results.items():
            columns = [psnr(images, originals).clamp(max=PSNR_CAP), ssim(images, originals)]
            if self.network is not None and seen is not None:
                features = self.network(images)
                columns.append(feature_distance(features, seen))
                # sums in float64 stay on the CPU: not every accelerator has it
                self.distances[name].update(seen.pooled.cpu(), real=True)
                self.distances[name].update(features.pooled.cpu(), real=False)
                self._keep(name, features)
            columns += [measure(images, originals) for measure in self.external.pairs.values()]
            rows[name] = torch.stack([c.float() for c in columns], dim=1)
            colour = colour_errors(images, originals)
            error = mean_squared_error(images, originals)[:, None]
            columns_of_colour = (colour.mean, colour.std, colour.delta_e[:, None])
            self.means[name].update(torch.cat([rows[name], error, *columns_of_colour], dim=1))
            for real, batch in ((True, originals), (False, images)):
                if name in self.inception:
                    levels = ((batch + 1) * 127.5).round().to(torch.uint8)
                    self.inception[name].to(batch.device).update(levels, real=real)
        for name, gain in self.gains.items():
            gain.update(rows["model"] - rows[name])

    def _keep(self, name: str, features: EffNetFeatures | None) -> None:
        if self.keep_features and features is not None:
            self.features.setdefault(name, []).append(features.pooled.cpu())

    def report(
        self,
        *,
        protocol: Protocol,
        statistics: CodebookStatistics | None,
        bootstrap: int,
        absent: Mapping[str, str],
    ) -> ReconstructionReport:
        """Sums everything up, over all ranks."""
        if has_ranks():  # the collectives of an accelerator take only its own tensors
            for metric in (*self.means.values(), *self.gains.values(), *self.distances.values()):
                metric.to(self.device)
            if statistics is not None:
                statistics.to(self.device)
        measured = {name: means.measurements() for name, means in self.means.items()}
        count = measured["model"]["psnr"].count
        reasons = dict(absent)
        if count < 2 and (self.distances or self.inception):
            reasons |= dict.fromkeys(("fd_effnet", "fid_inception"), "a distance of sets needs at least two images")
        scores = {
            name: Scores(measurements, self._frechet(name, count, bootstrap) if count > 1 else {})
            for name, measurements in measured.items()
        }
        size = next(iter(self.sizes)) if len(self.sizes) == 1 else None
        return ReconstructionReport(
            protocol=dataclasses.replace(protocol, num_images=count, image_size=size),
            model=scores.pop("model"),
            references=scores,
            gains={name: gain.measurements() for name, gain in self.gains.items()},
            codebook=None if statistics is None else statistics.report(),
            absent=reasons,
        )

    def _frechet(self, name: str, count: int, bootstrap: int) -> dict[str, FrechetScore]:
        scores: dict[str, FrechetScore] = {}
        if name in self.distances:
            spread = None
            if self.features:
                originals, images = (all_gather_shares(torch.cat(self.features[key])) for key in ("originals", name))
                spread = bootstrap_spread(originals, images, num_resamples=bootstrap)
            scores["fd_effnet"] = FrechetScore(float(self.distances[name].compute()), count, spread)
        if name in self.inception:
            scores["fid_inception"] = FrechetScore(float(self.inception[name].compute()), count)
        return scores
