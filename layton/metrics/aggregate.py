"""Mean and standard error over images, kept as sums so that one process and many give the same figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torchmetrics import Metric


@dataclass(frozen=True, slots=True)
class Measurement:
    """A figure averaged over images.

    Attributes:
        mean: Average over images.
        standard_error: Sample standard deviation / sqrt(count); 0 for one image.
        count: Number of images.
    """

    mean: float
    standard_error: float
    count: int

    def to_dict(self) -> dict[str, float | int]:
        """The fields under their names."""
        return asdict(self)


class NamedMeans(Metric):
    """Running mean and standard error of several named values per image.

    Args:
        names: One name for each column of what is given to ``update``.

    Raises:
        ValueError: No names, or one twice.
    """

    is_differentiable = False
    full_state_update = False

    total: Tensor
    total_squares: Tensor
    count: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        if not names or len(set(names)) != len(names):
            raise ValueError(f"names must be different and at least one, got {list(names)}")
        self.names = tuple(names)
        # float64: the difference of large sums keeps its digits over millions of images
        self.add_state("total", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total_squares", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Adds images.

        Args:
            values: (B, len(names)), finite.

        Raises:
            ValueError: The shape is another one, or a value is not finite.
        """
        if values.ndim != 2 or values.shape[1] != len(self.names):
            raise ValueError(f"expected values (B, {len(self.names)}), got {tuple(values.shape)}")
        values = values.detach().to(self.total.device, torch.float64)
        finite = values.isfinite().all(0)
        if not bool(finite.all()):
            bad = [name for name, good in zip(self.names, finite.tolist(), strict=True) if not good]
            raise ValueError(f"values that are not finite: {', '.join(bad)}")
        self.total += values.sum(0)
        self.total_squares += values.square().sum(0)
        self.count += len(values)

    def compute(self) -> Tensor:
        """Means and standard errors: (2, len(names)) float64.

        Raises:
            ValueError: Nothing was added.
        """
        return self._mean_and_error()

    def _mean_and_error(self) -> Tensor:
        count = int(self.count)
        if count == 0:
            raise ValueError("no images were measured")
        mean = self.total / count
        variance = (self.total_squares / count - mean.square()).clamp(min=0) * count / max(count - 1, 1)
        return torch.stack([mean, variance.sqrt() / math.sqrt(count)])

    def measurements(self) -> dict[str, Measurement]:
        """The result of all ranks under its names.

        Raises:
            ValueError: Nothing was added.
        """
        with self.sync_context():
            mean, error = self._mean_and_error().tolist()
            count = int(self.count)
        return {n: Measurement(m, e, count) for n, m, e in zip(self.names, mean, error, strict=True)}
