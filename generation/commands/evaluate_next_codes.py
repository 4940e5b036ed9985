"""``layton evaluate next_codes``: how well a generator foresees the codes of a token dataset."""

from __future__ import annotations

import sys
from pathlib import Path

from generation.model.weight_types import Weights
from layton.data.types import Split
from layton.errors import UsageError
from layton.folder import write_json
from layton.options import require_least
from layton.progress import progress


def evaluate_next_codes(
    tokens: Path,
    *,
    model: str = "mini",
    split: Split | None = None,
    count: int | None = None,
    weights: Weights | None = None,
    layouts: bool = False,
    batch_size: int = 8,
    device: str | None = None,
    allow: list[str] | None = None,
    json: Path | None = None,
) -> None:
    """Score every code given its caption and all true codes before it.

    Args:
        tokens: a token dataset that `layton tokenize` wrote with the generator's tokenizer.
        model: embedded model or folder with a generator.
        split: keep only this split of the dataset.
        count: only the first so many images.
        weights: also compare the likeliest codes with those of the same model in these: bf16, or int8 on a CPU.
        layouts: also tell the model where the objects of scenes stand, if it was trained to be told.
        batch_size: images at once.
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
        json: write figures and protocol to this file as well.
    """
    import copy

    from generation.data.source import TokenShards
    from generation.evaluation.likelihood import score_next_codes
    from generation.generator import find_generator, load_generator
    from generation.model.quantization import choose_place, require_place, set_weights
    from layton.metrics.protocol import library_versions
    from layton.modules import weights_digest

    require_least(1, {"count": count, "batch_size": batch_size})
    generator = load_generator(find_generator(model), allow=allow or ())
    place = choose_place(generator.transformer, weights, device)
    require_place(generator.transformer, place)
    generator.transformer.to(place), generator.text_encoder.to(place)
    digest = weights_digest(generator.transformer)
    other = None if weights is None else set_weights(copy.deepcopy(generator.transformer), weights)
    control = generator.transformer.layout_control
    if layouts and control is None:
        raise UsageError(f"--layouts: the model {model} was not trained to be told where objects stand")
    steps = control.shape.steps if layouts and control is not None else 0
    shards = TokenShards(str(tokens), split=split, use_text=False, placed=steps)
    with progress(min(len(shards), count or len(shards)), "score") as bar:
        scores = score_next_codes(
            generator, shards, count=count, batch_size=batch_size, other=other, on_progress=bar.update
        )
    error = "" if scores.standard_error is None else f" +- {scores.standard_error:.3f}"
    words = [
        f"{scores.codes} codes of {scores.images} images: cross-entropy {scores.cross_entropy:.3f}{error}",
        f"likeliest {scores.accuracy:.1%}, among five {scores.accuracy_top5:.1%}",
    ]
    if scores.agreement is not None:
        words.append(f"the same likeliest code with {weights} weights: {scores.agreement:.2%}")
    sys.stdout.write(", ".join(words) + "\n")
    if json is not None:
        protocol = {
            "model": model,
            "weights": digest,
            "compared_with": weights,
            "tokens": tokens.name,
            "split": split,
            "captions": "as stored",
            "layouts": layouts,
            "versions": library_versions(),
        }
        write_json(json, {**scores.to_dict(), "protocol": protocol})
