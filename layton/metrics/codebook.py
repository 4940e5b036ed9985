"""How much of the codebook is used: usage, perplexity and dead codes over a stream of codes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torchmetrics import Metric


@dataclass(frozen=True, slots=True)
class CodebookReport:
    """Use of a codebook over the codes that were counted.

    Attributes:
        vocab_size: V.
        num_codes: Codes counted.
        used_codes: Different codes among them.
        dead_codes: V - used_codes.
        usage: used_codes / V, in [0, 1].
        perplexity: exp of the entropy (in nats) of the codes' frequencies: 1 if one code is used, V if all are used
            equally often.
    """

    vocab_size: int
    num_codes: int
    used_codes: int
    dead_codes: int
    usage: float
    perplexity: float

    def to_dict(self) -> dict[str, int | float]:
        """The fields under their names."""
        return asdict(self)


def perplexity(counts: Tensor) -> Tensor:
    """exp(-sum_v p_v ln p_v) with p = counts / sum(counts), in float64.

    Args:
        counts: (V,) how often each code occurred.

    Returns:
        () float64; NaN where nothing was counted.
    """
    p = counts.double() / counts.sum()
    return torch.special.entr(p).sum().exp()


def codebook_report(counts: Tensor) -> CodebookReport:
    """Summary of how often each code occurred.

    Args:
        counts: (V,) integers.

    Raises:
        ValueError: No code was counted.
    """
    counts = counts.cpu()  # float64 does not exist on every accelerator
    num_codes = int(counts.sum())
    if num_codes == 0:
        raise ValueError("no codes were counted: usage and perplexity are not defined")
    used = int((counts > 0).sum())
    vocab_size = len(counts)
    return CodebookReport(
        vocab_size=vocab_size,
        num_codes=num_codes,
        used_codes=used,
        dead_codes=vocab_size - used,
        usage=used / vocab_size,
        perplexity=float(perplexity(counts)),
    )


class CodebookStatistics(Metric):
    """Usage, perplexity and dead codes of a stream of codes, over all of it or over its last updates.

    Counts are integers and are summed over ranks, so the result does not depend on how the stream was divided. With a
    window, slot k of every rank holds its update k modulo the window: ranks must update equally often, as they do in
    training.

    `compute` returns a dictionary of scalars ready for ``LightningModule.log_dict``; `report` returns numbers.

    Args:
        vocab_size: V, number of codes in the codebook.
        window: Number of latest ``update`` calls to look at (on each rank); None for the whole stream. Takes
            window * V * 8 bytes.

    Raises:
        ValueError: ``vocab_size`` or ``window`` is less than 1.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    counts: Tensor
    num_updates: Tensor

    def __init__(self, vocab_size: int, *, window: int | None = None) -> None:
        super().__init__()
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be >= 1, got {vocab_size}")
        if window is not None and window < 1:
            raise ValueError(f"window must be >= 1 or None, got {window}")
        self.vocab_size = vocab_size
        self.window = window
        self.add_state("counts", torch.zeros(window or 1, vocab_size, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_updates", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    def update(self, codes: Tensor) -> None:
        """Counts codes.

        Args:
            codes: (B, N) or any other shape, integers in [0, V).

        Raises:
            ValueError: A code lies outside the codebook or is not an integer.
        """
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be integers, got {codes.dtype}")
        flat = codes.reshape(-1).to(torch.int64)
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < self.vocab_size:
            raise ValueError(
                f"codes must lie in [0, {self.vocab_size}), got values from {int(flat.min())} to {int(flat.max())}"
            )
        new = torch.bincount(flat, minlength=self.vocab_size)
        if self.window is None:
            self.counts[0] += new
        else:
            self.counts[int(self.num_updates) % self.window] = new
        self.num_updates += 1

    def compute(self) -> dict[str, Tensor]:
        """Statistics of the counted codes.

        Returns:
            ``usage``, ``perplexity``, ``dead_codes``: each () float32.

        Raises:
            ValueError: No code was counted.
        """
        report = codebook_report(self.counts.sum(0))
        values = {"usage": report.usage, "perplexity": report.perplexity, "dead_codes": float(report.dead_codes)}
        return {name: torch.tensor(value, device=self.counts.device) for name, value in values.items()}

    def report(self) -> CodebookReport:
        """Statistics of the codes that all ranks counted, as plain numbers (entropy in float64).

        Raises:
            ValueError: No code was counted.
        """
        with self.sync_context():
            return codebook_report(self.counts.sum(0))
