"""How well a generator foresees the codes of captioned images, and what smaller weights change of that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from generation.data.source import TokenShards, require_layouts
from generation.generator import Generator
from generation.model.transformer import LaytonGenTransformer
from generation.text.encoders import TextFeatures

_LIKELIEST = 5


@dataclass(frozen=True, slots=True)
class NextCodeScores:
    """Teacher-forced scores: every code given its caption and all true codes before it.

    Attributes:
        images: Images.
        codes: Codes of them.
        cross_entropy: Mean, in nats.
        accuracy: Share of the codes that were the likeliest.
        accuracy_top5: Share of those among the five likeliest.
        agreement: Share of places at which the other weights have the same likeliest code; None without others.
        standard_error: Of the cross-entropy, over images; None for one image.
    """

    images: int
    codes: int
    cross_entropy: float
    accuracy: float
    accuracy_top5: float
    agreement: float | None
    standard_error: float | None

    def to_dict(self) -> dict[str, int | float | None]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def score_next_codes(
    generator: Generator,
    shards: TokenShards,
    *,
    count: int | None = None,
    batch_size: int = 8,
    other: LaytonGenTransformer | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> NextCodeScores:
    """Score a generator on a token dataset, whose captions are taken as they are stored.

    Args:
        generator: On one device.
        shards: Codes of the generator's own tokenizer; their layouts are told if they have any.
        count: Only the first so many images.
        batch_size: Images at once; the scores do not depend on it.
        other: The same transformer with other weights, whose likeliest codes are compared with the generator's.
        on_progress: Told how many images are done with.

    Raises:
        ValueError: If the tokens are of another tokenizer, or a number is below 1.
    """
    if batch_size < 1 or (count is not None and count < 1):
        raise ValueError(f"count and batch_size must be >= 1, got {count} and {batch_size}")
    shards.require_tokenizer(generator.card.tokenizer.fingerprint)
    control = generator.transformer.layout_control
    require_layouts([shards], None if control is None else control.shape)
    images = len(shards) if count is None else min(count, len(shards))
    losses: list[Tensor] = []
    right = near = same = total = 0
    for start in range(0, images, batch_size):
        samples = [shards.sample(index, seed=0) for index in range(start, min(start + batch_size, images))]
        codes, text = _inputs(generator, samples)
        logits = generator.transformer(codes, text.features, text.mask, layout=text.layout).float()
        losses.append(
            F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view(codes.shape).mean(1)
        )
        likeliest = logits.topk(min(_LIKELIEST, logits.shape[-1])).indices
        right += int((likeliest[..., 0] == codes).sum())
        near += int((likeliest == codes[..., None]).any(-1).sum())
        if other is not None:
            again = other(codes, text.features, text.mask, layout=text.layout)
            same += int((again.argmax(-1) == likeliest[..., 0]).sum())
        total += codes.numel()
        if on_progress is not None:
            on_progress(len(samples))
    each = torch.cat(losses).double()
    if not bool(each.isfinite().all()):
        raise ValueError(
            f"likelihoods of {int((~each.isfinite()).sum())} of {images} images are not finite: broken weights?"
        )
    return NextCodeScores(
        images=images,
        codes=total,
        cross_entropy=float(each.mean()),
        accuracy=right / total,
        accuracy_top5=near / total,
        agreement=None if other is None else same / total,
        standard_error=float(each.std() / images**0.5) if images > 1 else None,
    )


def _inputs(generator: Generator, samples: list[dict[str, object]]) -> tuple[Tensor, TextFeatures]:
    """Codes (B, N), and what is told of them; an empty caption means none, as in training."""
    transformer = generator.transformer
    weight = next(transformer.parameters())
    codes = torch.stack([torch.as_tensor(sample["codes"]) for sample in samples]).to(weight.device)
    captions = [str(sample["caption"]) for sample in samples]
    text = generator.text_encoder.encode(captions)
    untold = torch.tensor([not caption for caption in captions], device=text.mask.device)
    features = transformer.drop_condition(text.features.to(weight.dtype), untold)
    layouts = [torch.as_tensor(sample["layout"]) for sample in samples if "layout" in sample]
    layout = transformer.drop_layout(torch.stack(layouts).to(weight.device), untold) if layouts else None
    return codes, TextFeatures(features, text.mask, layout=layout)
