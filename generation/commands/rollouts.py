"""``layton rollouts``: what a LaytonGen draws of scenes' captions, right and wrong images apart."""

from __future__ import annotations

import sys
from pathlib import Path

from layton.data.types import Split
from layton.options import require_least, require_shares
from layton.progress import progress
from layton.staging import require_absent


def rollouts(
    *,
    out: Path,
    model: str = "mini",
    tokenizer: str | None = None,
    decoder: str = "light",
    count: int = 1024,
    offset: int = 0,
    split: Split = "train",
    images_per_prompt: int = 2,
    chinese: float = 0.05,
    reworded: float = 0.8,
    seed: int = 0,
    batch_size: int = 64,
    device: str | None = None,
    allow: list[str] | None = None,
) -> None:
    """Draw images of scenes' captions and keep their tokens, right and wrong ones apart: what a judge learns from.

    Writes two token datasets, OUT/right and OUT/wrong. Right are images in which SceneEval's checker finds what is
    asked for and nothing else.

    Args:
        out: folder to write; must not exist.
        model: embedded model or folder with a generator.
        tokenizer: its tokenizer, where it does not lie beside the generator.
        decoder: name of the code decoder whose pictures are checked.
        count: captions.
        offset: scenes to pass over at the beginning of the split.
        split: whose captions.
        images_per_prompt: images drawn for each caption.
        chinese: share of captions in Chinese.
        reworded: share of captions said in another way than the canonical one.
        seed: of the first image; the following images count up from it.
        batch_size: images drawn at once.
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
    """
    from generation.drawing import LaytonGenDrawer
    from generation.tasks.rewards import SceneReward
    from generation.tasks.rollouts import draw_rollouts
    from layton.data.prompts import SceneCaptions

    require_least(1, {"count": count, "images_per_prompt": images_per_prompt, "batch_size": batch_size})
    require_least(0, {"offset": offset, "seed": seed})
    require_shares({"chinese": chinese, "reworded": reworded})
    require_absent(out)
    asked: dict[str, object] = {"split": split, "count": count, "offset": offset, "seed": seed}
    asked |= {"images_per_prompt": images_per_prompt, "chinese": chinese, "reworded": reworded}
    prompts = SceneCaptions(split=split, length=count, offset=offset, chinese=chinese, reworded=reworded)
    loaded = LaytonGenDrawer.load(model, tokenizer=tokenizer, decoder=decoder, device=device, allow=allow or ())
    with progress(count * images_per_prompt, "draw") as bar:
        report = draw_rollouts(
            loaded.pipeline,
            prompts,
            SceneReward(),
            out,
            images_per_prompt=images_per_prompt,
            decoder=decoder,
            seed=seed,
            batch_size=batch_size,
            made_by={**loaded.settings(), "candidates": 1, "judge": None, "reward": "SceneReward", **asked},
            on_progress=bar.update,
        )
    total = report.right + report.wrong
    sys.stdout.write(f"{out}: {report.right} of {total} images right ({report.right / total:.1%})\n")
