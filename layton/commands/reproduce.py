"""``layton reproduce CLAIM``: one paper's headline claim, measured again in the embedded world."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from layton.errors import UsageError
from layton.reproduce.claim import ScaleName
from layton.run.config_folders import config_folders

if TYPE_CHECKING:
    from layton.reproduce.claim import Context

ClaimName = Literal["layton", "mlcm", "scott", "instaflow", "hipa", "laytongen", "mlcm_ablation", "scott_ablation"]

# By name only, and resolved when asked for: `layton` never imports `generation`.
CLAIMS: dict[str, str] = {
    "layton": "layton.reproduce.layton_claim",
    "mlcm": "layton.reproduce.mlcm",
    "scott": "layton.reproduce.scott",
    "instaflow": "layton.reproduce.instaflow",
    "hipa": "layton.reproduce.hipa",
    "laytongen": "generation.reproduce",
    "mlcm_ablation": "layton.reproduce.mlcm_ablation",
    "scott_ablation": "layton.reproduce.scott_ablation",
}


def reproduce(
    claim: ClaimName,
    *,
    quick: bool = False,
    scale: ScaleName | None = None,
    out: Path | None = None,
    pipeline: str = "mini",
    tokenizer: str = "mini",
    photographs: list[str] | None = None,
    count: int | None = None,
    json: Path | None = None,
) -> int:
    """Measure one paper's headline claim again: method and baseline from one teacher, with equal seeds and budgets.

    Arms are trained by ``layton fit`` on the committed run files in configs/reproduce, and stop when their counter of
    forward-equivalents reaches the budget. Run again with the same folder, it goes on where it was. A claim that does
    not hold is a result, not a failure: the exit status is 0.

    Args:
        claim: layton, mlcm, scott, instaflow, hipa or laytongen; mlcm_ablation and scott_ablation make the tables in
            which every part of a method has its row, each row at the same budget.
        quick: under ten minutes on two cores, with small budgets and few images; the same as --scale quick.
        scale: how large, as the claim's scale.yaml says: full by default, small (an hour or two on two cores) or quick.
            Only full gives the figure of record.
        out: folder of runs and evaluations; runs/reproduce/CLAIM by default, with the scale's name if it is not full.
        pipeline: embedded model or folder of a diffusers text-to-image pipeline, the teacher.
        tokenizer: embedded tokenizer or folder, for the claims layton and laytongen.
        photographs: image folder or tar shards; the claim layton measures its absolute floors there, too.
        count: test images for FD-effnet and coverage, in place of the scale's number.
        json: write the result to this file as well.
    """
    from layton.lock import lock_folder
    from layton.quiet import cut_captions_told_once
    from layton.reproduce.training import TrainingStoppedError

    if claim not in get_args(ClaimName):
        raise UsageError(f"no claim {claim!r}; there are {', '.join(CLAIMS)}")
    if photographs is not None and claim != "layton":
        raise UsageError("photographs are measured by the claim layton only")
    if quick and scale not in (None, "quick"):
        raise UsageError(f"--quick is --scale quick: leave one of them out, got --scale {scale} as well")
    chosen = scale or ("quick" if quick else "full")
    context = _context(claim, chosen, out, pipeline, tokenizer, tuple(photographs or ()), count)
    measure = import_module(CLAIMS[claim]).measure
    with lock_folder(context.out), cut_captions_told_once():
        try:
            outcome = measure(context)
        except TrainingStoppedError as stopped:
            context.say(str(stopped))
            return stopped.status
        sys.stdout.write(outcome.summary(context))
        outcome.save(context.out / "result.json", context)
        if json is not None:
            outcome.save(json, context)
    return 0


def find_claim_configs(claim: str) -> Path:
    """The folder of a claim's committed run files.

    Raises:
        UsageError: There is none.
    """
    for root in config_folders():
        folder = root / "reproduce" / claim
        if folder.is_dir():
            return folder.absolute()
    raise UsageError(f"no folder configs/reproduce/{claim} with the run files of this claim")


def _context(
    claim: str,
    scale: ScaleName,
    out: Path | None,
    pipeline: str,
    tokenizer: str,
    photographs: tuple[str, ...],
    images: int | None = None,
) -> Context:
    from layton.reproduce.claim import SCALE_FILE, Context, Scale

    configs = find_claim_configs(claim)
    how_large = Scale.read(configs / SCALE_FILE, scale)
    folder = out if out is not None else Path("runs") / "reproduce" / (claim if scale == "full" else f"{claim}-{scale}")
    return Context(
        out=folder.absolute(),
        configs=configs,
        scale=how_large if images is None else replace(how_large, images=images, own_images=True),
        pipeline=pipeline,
        tokenizer=tokenizer,
        say=_say,
        options={"photographs": photographs} if photographs else {},
    )


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
