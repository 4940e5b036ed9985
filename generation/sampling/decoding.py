"""Codes of whole images: prefill, then one code after another.

Legend: B images, L caption tokens, N image tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from generation.model.cache import CachedDecoder
from generation.model.layout import UNTOLD
from generation.model.transformer import LaytonGenTransformer
from generation.sampling.codes import NoiseAhead, SamplingOptions, plain_where_sure, require_generators, sample_codes
from generation.sampling.guidance import Guidance, guide

FREE = -1
"""Marks codes that are to be drawn among known ones."""

StepCallback = Callable[[int, Tensor], None]


@torch.no_grad()
def generate_codes(
    model: LaytonGenTransformer,
    condition: Tensor,
    mask: Tensor | None = None,
    *,
    generators: Sequence[torch.Generator] | None = None,
    sampling: SamplingOptions | None = None,
    guidance: Guidance | None = None,
    known: Tensor | None = None,
    layout: Tensor | None = None,
    num_codes: int | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Draw images' codes.

    The same condition and generator state give the same codes in any batch: every image draws from its own generator,
    and rows never see each other. What remains is rounding, see `generation.sampling.codes`.

    Args:
        model: In eval mode.
        condition: Text features (B, L, dim), padded on the left, or labels (B,).
        mask: (B, L), true for real caption tokens; None when all are.
        generators: One for each image; may be None when sampling is greedy.
        sampling: How a code is drawn; from the plain distribution when None.
        guidance: Classifier-free guidance; none when None. Both halves run as one batch.
        known: (B, N) int64 codes that are given, `FREE` where one is to be drawn: to go on from an image's first
            codes, or to draw chosen ones again.
        layout: (B, M, F) where objects stand (`generation.model.layout`); the unguided half is not told.
        num_codes: How many codes to make; N when None.
        callback: Called after each code with its index and all codes so far, (B, num_codes).

    Returns:
        (B, num_codes) int64.

    Raises:
        ValueError: If arguments are out of range or do not fit, or logits are not finite.
    """
    options, guided = sampling or SamplingOptions(), guidance or Guidance()
    count = model.num_tokens if num_codes is None else num_codes
    batch = condition.shape[0]
    if not 1 <= count <= model.num_tokens:
        raise ValueError(f"num_codes must be in [1, {model.num_tokens}], got {count}")
    given = None if known is None else _checked_known(known, model, batch=batch)[:, :count].clone()
    codes = torch.full((batch, count), FREE, dtype=torch.int64, device=condition.device)
    codes = codes if given is None else given.to(codes)
    last = guided.last(model.num_tokens)
    start = _first_free(codes)
    twice = last >= start
    if twice:
        condition = torch.cat([condition, model.null_condition(condition)])
        mask = None if mask is None else torch.cat([mask, mask])
        layout = None if layout is None else torch.cat([layout, torch.full_like(layout, UNTOLD)])
    decoder = CachedDecoder(model, condition, mask, num_codes=count, layout=layout)
    if batch == 0 or start == count:
        return codes
    noise: NoiseAhead | None = None
    if not options.greedy:
        require_generators(generators, batch)
        noise = NoiseAhead(generators or (), model.vocab_size, count, codes.device)
        for _ in range(start):  # draw i is code i's, whatever other images of the batch have known
            noise()
    forced = (codes >= 0).any(dim=0).tolist()
    logits = decoder.prefill(_rows(codes[:, :start], twice))
    for index in range(start, count):
        plain = logits[:batch]
        if twice:
            logits = guide(logits, guided.at(index, model.num_tokens))
        logits = plain_where_sure(logits, plain, options)
        drawn = sample_codes(logits, options=options, noise=None if noise is None else noise())
        codes[:, index] = torch.where(codes[:, index] >= 0, codes[:, index], drawn) if forced[index] else drawn
        if callback is not None:
            callback(index, codes)
        if index + 1 == count:
            break
        if twice and index >= last:  # no later code is guided
            decoder.keep_rows(batch)
            twice = False
        logits = decoder.step(_rows(codes[:, index], twice))
    return codes


def _rows(codes: Tensor, twice: bool) -> Tensor:
    return torch.cat([codes, codes]) if twice else codes


def _first_free(codes: Tensor) -> int:
    """Index of the first column with a code to draw; the number of columns if there is none."""
    columns = (codes == FREE).any(dim=0).nonzero().flatten()
    return int(columns[0]) if len(columns) else codes.shape[1]


def _checked_known(known: Tensor, model: LaytonGenTransformer, *, batch: int) -> Tensor:
    vocab_size = model.vocab_size
    if known.shape != (batch, model.num_tokens):
        raise ValueError(f"known codes must be ({batch}, {model.num_tokens}), got {tuple(known.shape)}")
    if known.is_floating_point() or known.dtype == torch.bool:
        raise ValueError(f"known codes must be integers, got {known.dtype}")
    known = known.long()  # torch finds no extremes of uint16, in which shards hold codes
    if known.numel() and (int(known.min()) < FREE or int(known.max()) >= vocab_size):
        raise ValueError(
            f"known codes must be {FREE} or in [0, {vocab_size}), got {int(known.min())}..{int(known.max())}"
        )
    return known
