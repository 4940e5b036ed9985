"""One code from logits: temperature, top-k, top-p, and each image's own randomness.

Legend: B images, V vocabulary.

The draw is the Gumbel-max trick, argmax(logits / temperature - log e), with one exponential number e for each code of
the vocabulary from the image's own generator. So what is drawn does not depend on which other images are in the batch,
and logits that differ by rounding (matrix products add up in another order for another number of rows) change the
outcome only when two scores are that close, which inversion of a cumulative sum could not promise. One draw of V
numbers is made for each code, whatever the options.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from generation.sampling.shares import entropy

_BELOW_ONE = 1 - 2**-24  # the largest float32 below 1
_CODES_AT_ONCE = 16
_COLDEST = 1e-30  # less is 0 in float32; logits that differ at all differ by far more


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How a code is drawn.

    Attributes:
        temperature: Logits are divided by it; 0 takes the likeliest code.
        top_k: Draw among this many likeliest codes; None for all.
        top_p: Then draw among the fewest likeliest codes that have this probability together; 1 for all.
        min_entropy: Where the model is surer of the next code than this, in nats, it is taken at its word: no guidance,
            temperature 1; ``top_k`` and ``top_p`` hold there, too. There it is decided whether something begins, a rare
            event that guidance and low temperatures raise to a power: pictures stay empty, or fill up. 0 for nowhere;
            not heeded when greedy.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_entropy: float = 0.0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: If a value is out of range.
        """
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all codes, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not (math.isfinite(self.min_entropy) and self.min_entropy >= 0.0):
            raise ValueError(f"min_entropy must be finite and at least 0, got {self.min_entropy}")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0.0 or self.top_k == 1


GREEDY = SamplingOptions(temperature=0.0)


def sample_codes(
    logits: Tensor,
    *,
    options: SamplingOptions = GREEDY,
    generators: Sequence[torch.Generator] | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Draw one code for each image.

    Args:
        logits: (B, V).
        options: How.
        generators: One for each image; not needed, and not used, when greedy.
        noise: (B, V) of `uniform_noise` in their place; it is used up.

    Returns:
        (B,) int64.

    Raises:
        ValueError: If logits are NaN or infinite, ``top_k`` is larger than V, or generators are missing.
    """
    if logits.device.type == "mps":  # knows no float64
        noise = None if noise is None else noise.cpu()
        return sample_codes(logits.cpu(), options=options, generators=generators, noise=noise).to(logits.device)
    if not bool(torch.isfinite(logits.sum())):  # one number tells of any NaN or infinity
        rows = (~torch.isfinite(logits).all(dim=-1)).nonzero().flatten().tolist()
        if rows:  # else it was the sum that is too large
            raise ValueError(f"logits of images {rows} are not finite: weights or inputs hold NaN or are too large")
    if options.top_k is not None and options.top_k > logits.shape[-1]:
        raise ValueError(f"top_k {options.top_k} is larger than the vocabulary of {logits.shape[-1]} codes")
    if options.greedy:
        return logits.argmax(dim=-1)
    if noise is None:
        require_generators(generators, len(logits))
        noise = uniform_noise(generators or (), logits.shape[-1]).to(logits.device)
    logs = noise.neg_().log1p_().neg_().log_()  # of exponential numbers
    scores, codes = _candidates(logits, options)
    best = scores.sub_(logs if codes is None else logs.gather(1, codes)).argmax(dim=-1, keepdim=True)
    return (best if codes is None else codes.gather(1, best)).squeeze(1)


def require_generators(generators: Sequence[torch.Generator] | None, count: int) -> None:
    """Stop unless each image has its own.

    Raises:
        ValueError: If there are others than ``count``.
    """
    if generators is None or len(generators) != count:
        given = "none" if generators is None else str(len(generators))
        raise ValueError(f"sampling {count} images needs as many generators, got {given}")


class NoiseAhead:
    """`uniform_noise` for one code after another; for several at once where it is moved to an accelerator.

    The numbers are the same, and so is what is left of the generators in the end.

    Args:
        generators: One for each image.
        vocab_size: V.
        count: How many codes are to be drawn.
        device: Where the numbers are needed.
    """

    def __init__(
        self, generators: Sequence[torch.Generator], vocab_size: int, count: int, device: torch.device
    ) -> None:
        self.generators, self.vocab_size, self.count, self.device = generators, vocab_size, count, device
        self._at_once = 1 if device.type == "cpu" else _CODES_AT_ONCE
        self._ready: list[Tensor] = []

    def __call__(self) -> Tensor:
        """(B, V) for the next code."""
        if not self._ready:
            codes = min(self._at_once, self.count)
            self.count -= codes
            noise = uniform_noise(self.generators, codes * self.vocab_size).to(self.device)
            self._ready = list(noise.unflatten(1, (codes, self.vocab_size)).unbind(1))
        return self._ready.pop(0)


def plain_where_sure(logits: Tensor, plain: Tensor, options: SamplingOptions) -> Tensor:
    """See ``min_entropy`` of `SamplingOptions`.

    Args:
        logits: (B, V), guided.
        plain: (B, V), not guided.
        options: Their temperature will be applied to the result.

    Returns:
        (B, V).
    """
    if options.min_entropy == 0.0 or options.greedy:
        return logits
    sure = entropy(plain.float()) < options.min_entropy
    return torch.where(sure[:, None], plain * max(options.temperature, _COLDEST), logits)


def uniform_noise(generators: Sequence[torch.Generator], count: int) -> Tensor:
    """Uniform numbers in [0, 1) for each generator: (B, count) float32, on the first generator's device.

    They are drawn in float64. Small numbers, of which the smallest decides, keep their fineness in float32: drawn in
    it, one of 16 million would be 0, and any code, however unlikely, would win with that.
    """
    if not generators:
        return torch.empty(0, count)
    noise = torch.empty(len(generators), count, device=generators[0].device)
    for row, each in zip(noise, generators, strict=True):
        row.copy_(torch.rand(count, generator=each, device=each.device, dtype=torch.float64))
    return noise.clamp_max_(_BELOW_ONE)


def _candidates(logits: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor | None]:
    """Scores (B, k) float32 of the codes that may be drawn, -inf for those that may not, and which they are.

    Codes are None when they are all codes in their order.
    """
    values = logits.float()
    codes: Tensor | None = None
    if options.top_k is not None or options.top_p < 1.0:
        values, codes = values.topk(options.top_k or values.shape[-1], dim=-1)  # sorted, largest first
    scores = (values - values.amax(dim=-1, keepdim=True)).div_(max(options.temperature, _COLDEST))
    if options.top_p < 1.0:
        shares = scores.double().softmax(dim=-1)
        before = shares.cumsum(dim=-1) - shares
        scores = scores.masked_fill(before >= options.top_p, float("-inf"))
    return scores, codes


def seeded_generators(seeds: Sequence[int], *, device: torch.device | str = "cpu") -> list[torch.Generator]:
    """A generator for each image; CPU generators give the same codes on every device."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]
