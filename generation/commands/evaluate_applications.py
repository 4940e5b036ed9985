"""``layton evaluate applications``: editing, inpainting and super-resolution in one step, scored on scenes."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from layton.data.types import Split
from layton.errors import UsageError
from layton.folder import write_json
from layton.options import require_least, require_shares
from layton.progress import progress
from layton.scenes.placed import placed_caption

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from generation.evaluation.applications import EditScore, EnlargeScore, InpaintScore


def evaluate_applications(
    *,
    student: str | None = None,
    pipeline: str = "mini",
    count: int = 100,
    split: Split = "test",
    edit_time: float = 800.0,
    edit_strength: float = 1.0,
    edit_threshold: float = 0.4,
    edit_softness: int = 1,
    inpaint_time: float = 900.0,
    enlarge_time: float = 250.0,
    enlarge_strength: float = 1.0,
    scale: int = 4,
    batch_size: int = 16,
    device: str | None = None,
    json: Path | None = None,
) -> None:
    """Score HiPA's three applications, each on so many scenes; choose the settings on the validation split.

    Prompts say where objects stand if the pipeline has learnt to hear it.

    Args:
        student: export of a one-step distillation, or mini; without one, the pipeline's own network takes the step.
        pipeline: embedded model or folder of the diffusers pipeline that it was distilled from.
        count: scenes for each application.
        split: train, validation or test.
        edit_time: time to which sources are noised to be edited; like the other times of no effect on a student that
            was trained on pairs of pictures, which starts from the picture itself.
        edit_strength: of the change; more than 1 goes further away from what the picture shows now.
        edit_threshold: share of the largest change, in [0, 1), above which a place belongs to the edit.
        edit_softness: latent positions by which the edited places are widened.
        inpaint_time: time to which the surroundings of a hole are noised.
        enlarge_time: time to which enlarged images are noised.
        enlarge_strength: share in [0, 1] of the model's picture in the enlarged one; the rest is bicubic.
        scale: enlargement along a side.
        batch_size: images at once; the scores do not depend on it.
        device: where to run; the accelerator if there is one.
        json: write scores and settings to this file as well.
    """
    from generation.evaluation.applications import TaskSettings, score_editing, score_enlargement, score_inpainting
    from layton.distillation.one_step_model import load_one_step_model
    from layton.metrics.protocol import library_versions

    require_least(1, {"count": count, "batch_size": batch_size, "scale": scale})
    require_least(0, {"edit_softness": edit_softness, "edit_strength": edit_strength})
    require_shares({"edit_threshold": edit_threshold, "enlarge_strength": enlarge_strength})
    if edit_threshold == 1:
        raise UsageError("--edit-threshold must be below 1: no place changes more than the one that changes most")
    settings = TaskSettings(
        edit_t=edit_time,
        edit_strength=edit_strength,
        edit_threshold=edit_threshold,
        edit_softness=edit_softness,
        inpaint_t=inpaint_time,
        enlarge_t=enlarge_time,
        enlarge_strength=enlarge_strength,
        scale=scale,
    )
    model = load_one_step_model(pipeline, student, device=device)
    epd, absent = _epd()
    with progress(3 * count, "applications") as bar:
        edits = score_editing(model, count, settings, split=split, batch_size=batch_size, on_batch=bar.update)
        fills = score_inpainting(model, count, settings, split=split, batch_size=batch_size, on_batch=bar.update)
        large = score_enlargement(
            model, count, settings, split=split, batch_size=batch_size, epd=epd, on_batch=bar.update
        )
    sys.stdout.write(summary(edits, fills, large) + absent)
    if json is not None:
        run = {
            "pipeline": pipeline,
            "student": student,
            "split": split,
            "image_size": model.image_size,
            "prompts": "with places" if model.say is placed_caption else "plain",
            "settings": asdict(settings),
            "versions": library_versions(),
        }
        scores = {"editing": asdict(edits), "inpainting": asdict(fills), "super_resolution": asdict(large)}
        write_json(json, {**scores, "run": run})


def summary(edits: EditScore, fills: InpaintScore, large: EnlargeScore) -> str:
    """Three lines for people."""
    lines = [
        f"editing: colour changed in {edits.changed:.1%}, and nothing else in {edits.correct:.1%} of {edits.scenes} "
        f"scenes (checker's limit {edits.limit:.1%}); outside {edits.psnr_outside:.1f} dB",
        f"inpainting: inside right in {fills.inside:.1%} of {fills.scenes} scenes (checker's limit {fills.limit:.1%}); "
        f"outside at least {fills.psnr_outside:.1f} dB",
        f"super-resolution: {large.psnr:.2f} dB, bicubic {large.psnr_bicubic:.2f} dB",
    ]
    if large.epd is not None and large.epd_bicubic is not None:
        lines[-1] += f"; EPD {large.epd:.4f}, bicubic {large.epd_bicubic:.4f}"
    return "\n".join(lines) + "\n"


def _epd() -> tuple[Callable[[Tensor, Tensor], Tensor] | None, str]:
    """The measure, or None and a line that says why."""
    from layton.metrics.perceptual import EPD

    try:
        return EPD(), ""
    except ImportError as error:
        return None, f"no EPD: {error}\n"
