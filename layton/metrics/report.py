"""The result of an evaluation: figures, references, codebook use, and the protocol beside them; one JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from layton.metrics.aggregate import Measurement
from layton.metrics.codebook import CodebookReport
from layton.metrics.frechet import BootstrapSpread
from layton.metrics.image import DATA_RANGE
from layton.metrics.protocol import Protocol

COLOUR_NAMES = tuple(f"{kind}_error_{channel}" for kind in ("mean", "std") for channel in ("red", "green", "blue"))


@dataclass(frozen=True, slots=True)
class FrechetScore:
    """A distance between two sets of images.

    Attributes:
        value: The distance, over all images.
        num_images: Images on each side: distances of different numbers must not be compared.
        spread: Bootstrap spread, None if it was not asked for.
    """

    value: float
    num_images: int
    spread: BootstrapSpread | None = None

    def to_dict(self) -> dict[str, object]:
        """The fields under their names."""
        spread = None if self.spread is None else self.spread.to_dict()
        return {"value": self.value, "num_images": self.num_images, "spread": spread}


@dataclass(frozen=True, slots=True)
class Scores:
    """Figures of one way to reconstruct the images.

    Attributes:
        measurements: By name, averaged over images: ``psnr`` (dB), ``ssim``, ``epd`` (lower is better), ``mse``,
            ``mean_error_red`` ... ``std_error_blue`` (8-bit levels, signed), ``colour_delta`` (CIE 1976), and external
            ones such as ``lpips_alex``.
        frechet: By name, between sets: ``fd_effnet``, and ``fid_inception`` where its weights are on disk.
    """

    measurements: Mapping[str, Measurement]
    frechet: Mapping[str, FrechetScore]

    def __getitem__(self, name: str) -> Measurement:
        """A measurement by its name."""
        return self.measurements[name]

    @property
    def psnr_of_mean_mse(self) -> float:
        """PSNR in dB of the squared error averaged over all pixels of all images (of one size).

        Lower than the mean of the images' PSNR, by about 1 dB on photographs; papers quote either.
        """
        return 10 * math.log10(DATA_RANGE**2 / max(self.measurements["mse"].mean, 1e-10))

    def to_dict(self) -> dict[str, object]:
        """All figures under their names."""
        figures: dict[str, object] = {name: m.to_dict() for name, m in self.measurements.items()}
        figures["psnr_of_mean_mse"] = self.psnr_of_mean_mse
        return figures | {name: score.to_dict() for name, score in self.frechet.items()}


@dataclass(frozen=True, slots=True)
class ReconstructionReport:
    """Result of `evaluate_reconstruction`.

    Attributes:
        protocol: How it was measured.
        model: Figures of the model.
        references: Figures of each reference on the same images.
        gains: Model minus reference, image by image, by reference and measure: its standard error is that of the
            paired difference and so much smaller than those of the two figures.
        codebook: Use of the codebook, None for a model without codes.
        absent: Measures that were not taken, with the reason.
    """

    protocol: Protocol
    model: Scores
    references: Mapping[str, Scores]
    gains: Mapping[str, Mapping[str, Measurement]]
    codebook: CodebookReport | None
    absent: Mapping[str, str]

    def to_dict(self) -> dict[str, object]:
        """The report as JSON can hold it."""
        return {
            "protocol": self.protocol.to_dict(),
            "model": self.model.to_dict(),
            "references": {name: scores.to_dict() for name, scores in self.references.items()},
            "gains": {name: {k: m.to_dict() for k, m in gain.items()} for name, gain in self.gains.items()},
            "codebook": None if self.codebook is None else self.codebook.to_dict(),
            "absent": dict(self.absent),
        }

    def summary(self) -> str:
        """A few lines for people: the main figures of the model and of the references."""
        rows: list[tuple[str, ...]] = [("", "PSNR dB", "SSIM", "EPD", "FD-effnet")]
        for name, scores in {"model": self.model, **self.references}.items():
            fd = scores.frechet.get("fd_effnet")
            cells = [_cell(scores.measurements.get(key), digits) for key, digits in _COLUMNS]
            rows.append((name, *cells, "absent" if fd is None else f"{fd.value:.2f}"))
        lines = ["  ".join(f"{cell:>16}" for cell in row) for row in rows]
        if self.codebook is not None:
            c = self.codebook
            lines.append(f"codebook: {c.usage:.1%} of {c.vocab_size} codes used, perplexity {c.perplexity:.0f}")
        return "\n".join(lines)


_COLUMNS = (("psnr", 2), ("ssim", 4), ("epd", 4))


def _cell(measurement: Measurement | None, digits: int) -> str:
    if measurement is None:
        return "absent"
    return f"{measurement.mean:.{digits}f} +- {measurement.standard_error:.{digits}f}"
