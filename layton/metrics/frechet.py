"""FD-effnet: Frechet distance of two sets of images in the pooled features of EfficientNet-lite0.

It is **not** FID: other features, another scale, never compared with published FID figures. The value falls with the
number of images, so it means something only beside its count and beside a reference measured on the same images.

Formula (Dowson and Landau 1982; Heusel et al., arXiv 1706.08500, Eq. 6):
``|mu_a - mu_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2))``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from layton.metrics.effnet import EfficientNetLite0, PooledFeatures


@dataclass(frozen=True, slots=True)
class BootstrapSpread:
    """How much a Frechet distance varies when the images are drawn again.

    Attributes:
        standard_deviation: Over the resamples.
        low: 5th percentile of the resamples.
        high: 95th percentile of the resamples.
        num_resamples: Number of resamples.
        seed: Seed of the draws.
    """

    standard_deviation: float
    low: float
    high: float
    num_resamples: int
    seed: int

    def to_dict(self) -> dict[str, float | int]:
        """The fields under their names."""
        return asdict(self)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    """Frechet distance of two Gaussians, in float64 on the CPU.

    The trace of the root is taken from the symmetric matrix ``C_a^(1/2) C_b C_a^(1/2)``, whose eigenvalues are real and
    non-negative, so that covariances of few images (singular ones) do no harm.

    Args:
        mean_a: (D,).
        cov_a: (D, D) symmetric, non-negative.
        mean_b: (D,).
        cov_b: (D, D) symmetric, non-negative.

    Returns:
        () float64, >= 0.
    """
    mean_a, cov_a, mean_b, cov_b = (x.detach().cpu().double() for x in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    overlap = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap
    return distance.clamp(min=0)


def frechet_distance_of_features(
    features_a: Tensor, features_b: Tensor, *, times_a: Tensor | None = None, times_b: Tensor | None = None
) -> Tensor:
    """Frechet distance of two sets of feature vectors (unbiased covariances).

    For sets smaller than the dimension no covariance is formed: with centred rows A, B divided by sqrt(n - 1), the
    trace of (A^T A B^T B)^(1/2) is the sum of the singular values of A B^T, which is small.

    Args:
        features_a: (n, D).
        features_b: (m, D).
        times_a: (n,) integers, how often each row counts; by default once.
        times_b: (m,) integers.

    Returns:
        () float64, >= 0.

    Raises:
        ValueError: Fewer than two vectors, or the dimensions differ.
    """
    if features_a.ndim != 2 or features_b.ndim != 2 or features_a.shape[1] != features_b.shape[1]:
        raise ValueError(f"expected (n, D) and (m, D), got {tuple(features_a.shape)} and {tuple(features_b.shape)}")
    mean_a, a = _centred(features_a, times_a)
    mean_b, b = _centred(features_b, times_b)
    if min(len(a), len(b)) >= a.shape[1]:
        return frechet_distance(mean_a, a.T @ a, mean_b, b.T @ b)
    overlap = torch.linalg.svdvals(a @ b.T).sum()
    distance = (mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * overlap
    return distance.clamp(min=0)


def _centred(features: Tensor, times: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean (D,) and rows (k, D) whose Gram matrix is the unbiased covariance; rows that count nothing are left out."""
    weights = torch.ones(len(features), dtype=torch.float64) if times is None else times.double()
    count = float(weights.sum())
    if count < 2:
        raise ValueError(f"at least two vectors on each side, got {count:.0f}")
    rows, weights = features.detach().cpu().double()[weights > 0], weights[weights > 0, None]
    mean = (weights * rows).sum(0) / count
    return mean, (rows - mean) * (weights / (count - 1)).sqrt()


def bootstrap_spread(
    features_a: Tensor, features_b: Tensor, *, num_resamples: int = 20, seed: int = 0, paired: bool = True
) -> BootstrapSpread:
    """Spread of the Frechet distance over sets drawn with replacement.

    A resample has fewer different images than the set, so its distance is biased upwards: read the spread and not the
    level, and do not centre an interval on the resamples.

    Args:
        features_a: (n, D).
        features_b: (m, D).
        num_resamples: At least 2.
        seed: Seed of the draws.
        paired: Draw the same rows on both sides, as for images and their reconstructions (then n = m).

    Raises:
        ValueError: Too few resamples, or ``paired`` with n != m.
    """
    if num_resamples < 2:
        raise ValueError(f"num_resamples must be >= 2, got {num_resamples}")
    if paired and len(features_a) != len(features_b):
        raise ValueError(f"paired sets must have the same size, got {len(features_a)} and {len(features_b)}")
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(num_resamples):
        # a resample is known by how often each row was drawn: only the different ones (63 %) are worked on
        times_a = _drawn(len(features_a), generator)
        times_b = times_a if paired else _drawn(len(features_b), generator)
        distances.append(frechet_distance_of_features(features_a, features_b, times_a=times_a, times_b=times_b))
    return _spread(torch.stack(distances), seed)


def bootstrap_ratio(
    real: Tensor, features_a: Tensor, features_b: Tensor, *, num_resamples: int = 20, seed: int = 0
) -> BootstrapSpread:
    """Spread of ``FD(real, a) / FD(real, b)`` when the same rows of all three sets are drawn with replacement.

    For two models that drew one image for each of the same captions: what they have in common cancels, so the spread is
    smaller than that of either distance. Read the spread and not the level, as with `bootstrap_spread`.

    Args:
        real: (n, D).
        features_a: (n, D).
        features_b: (n, D).
        num_resamples: At least 2.
        seed: Seed of the draws.

    Raises:
        ValueError: Too few resamples, or sets of different sizes.
    """
    if num_resamples < 2 or not len(real) == len(features_a) == len(features_b):
        raise ValueError(
            f"need num_resamples >= 2 and sets of one size, got {num_resamples}, "
            f"{len(real)}, {len(features_a)} and {len(features_b)}"
        )
    generator = torch.Generator().manual_seed(seed)
    ratios = []
    for _ in range(num_resamples):
        times = _drawn(len(real), generator)
        above, below = (
            frechet_distance_of_features(real, features, times_a=times, times_b=times)
            for features in (features_a, features_b)
        )
        ratios.append(above / below.clamp(min=torch.finfo(below.dtype).tiny))
    return _spread(torch.stack(ratios), seed)


def _spread(sample: Tensor, seed: int) -> BootstrapSpread:
    low, high = torch.quantile(sample, torch.tensor([0.05, 0.95], dtype=sample.dtype)).tolist()
    return BootstrapSpread(float(sample.std()), low, high, len(sample), seed)


def _drawn(size: int, generator: torch.Generator) -> Tensor:
    """How often each of ``size`` rows occurs in ``size`` draws with replacement: (size,)."""
    return torch.bincount(torch.randint(size, (size,), generator=generator), minlength=size)


class GivenFeatures(nn.Module):
    """Identity: for metrics that are fed with features computed elsewhere.

    Args:
        num_features: D.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        return features


class FrechetFeatureDistance(FrechetInceptionDistance):
    """torchmetrics' Frechet distance in the features of any module, with a root that is stable for few images.

    The states are sums over images (features, their outer products, counts), reduced by sum: one rank and many give the
    same distance.

    Args:
        feature: Module (B, ...) -> (B, D) with an attribute ``num_features`` = D.
    """

    def __init__(self, feature: nn.Module) -> None:
        super().__init__(feature=feature)

    def compute(self) -> Tensor:
        """Frechet distance of the two sets given so far: () float64.

        Raises:
            ValueError: Fewer than two images on a side.
        """
        n, m = int(self.real_features_num_samples), int(self.fake_features_num_samples)
        if min(n, m) < 2:
            raise ValueError(f"at least two images on each side, got {n} real and {m} fake")
        return frechet_distance(
            *_moments(self.real_features_sum, self.real_features_cov_sum, n),
            *_moments(self.fake_features_sum, self.fake_features_cov_sum, m),
        )


class FrechetEffNetDistance(FrechetFeatureDistance):
    """FD-effnet as a metric: ``update(images, real=True)``, ``update(images, real=False)``, ``compute()``.

    Images are (B, 3, H, W) in [-1, 1] at their own size, at least 32 pixels.

    Args:
        network: Shared network; by default a new one.
        weights: Weights file for a new network.

    Raises:
        ImportError: The extra ``eval`` is not installed.
    """

    def __init__(self, network: EfficientNetLite0 | None = None, *, weights: Path | None = None) -> None:
        super().__init__(PooledFeatures(network if network is not None else EfficientNetLite0(weights)))


def _moments(total: Tensor, outer: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of ``count`` vectors from their sum and sum of outer products."""
    mean = total / count
    return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)
