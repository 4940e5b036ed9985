"""``layton edit``: one step of a distilled model changes a picture, fills a hole in it, or enlarges it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from layton.data.geometry import FitPolicy
from layton.errors import UsageError
from layton.options import require_least, require_shares

if TYPE_CHECKING:
    from torch import Tensor

    from layton.data.geometry import Geometry

_TIMES = {"edit": 800.0, "inpaint": 900.0, "enlarge": 250.0}  # as `layton evaluate applications` has them


def edit(
    image: Path,
    prompt: str,
    *,
    out: Path,
    shows: str | None = None,
    mask: Path | None = None,
    enlarge: int | None = None,
    pipeline: str = "mini",
    student: str | None = "mini",
    strength: float = 1.0,
    threshold: float = 0.4,
    softness: int = 1,
    policy: FitPolicy = "crop",
    seed: int = 0,
    overwrite: bool = False,
    device: str | None = None,
) -> None:
    """Change a picture as a prompt says, in one step: edit, inpaint (with --mask) or enlarge (with --enlarge).

    The model sees the picture at its own size; what it changes is brought back, and all other pixels stay as they are.
    With the policy "crop" the central square of the picture is all that is seen and written; "pad" takes the whole.
    A student of `layton distill one_step_tasks` starts from the picture itself; any other one, and a pipeline without a
    student, from the picture under noise.

    Args:
        image: picture to change.
        prompt: what it is to show, the whole picture and not the change alone.
        out: PNG file to write.
        shows: what the picture shows now; models that start from noise need it to edit.
        mask: picture of the same size, white where to paint and black what to keep.
        enlarge: enlarge by this factor along each side instead; the picture may then be so much smaller than what the
            model draws, and no larger.
        pipeline: embedded model or folder of the diffusers pipeline that the student was distilled from.
        student: export of a one-step distillation, or mini; null takes the pipeline's own network.
        strength: of an edit, 0 and more; of an enlargement, the model's share in [0, 1], the rest being bicubic.
        threshold: share of the largest change, in [0, 1), above which a place belongs to the edit; 0 takes all.
        softness: latent positions by which the edited places are widened.
        policy: how the picture becomes square: crop (the central square is what is written), pad or resize.
        seed: of the noise, where there is any.
        overwrite: replace the file if it is there already.
        device: where to run; the accelerator if there is one.
    """
    import torch

    from layton.data.images import load_image, to_image, to_tensor
    from layton.distillation.one_step_model import load_one_step_model
    from layton.ldm.text import remark_on
    from layton.pictures import save_png
    from layton.staging import require_free

    require_least(0, {"seed": seed, "softness": softness, "strength": strength})
    require_shares({"threshold": threshold})
    if mask is not None and enlarge is not None:
        raise UsageError("--mask paints and --enlarge enlarges: give one of them")
    if enlarge is not None and (enlarge < 2 or strength > 1):
        raise UsageError(f"--enlarge must be >= 2 and --strength then at most 1, got {enlarge} and {strength}")
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out must be a PNG file, got {out}")
    if not overwrite:
        require_free(out.parent, [out.name])
    model = load_one_step_model(pipeline, student, device=device)
    if model.start == "noise" and shows is None and mask is None and enlarge is None:
        raise UsageError("this model starts from noise: say with --shows what the picture shows now")
    words = [word for text in (prompt, shows) if text is not None for word in model.unread(text)]
    if words:
        sys.stderr.write(f"layton: {remark_on(prompt, words)}\n")
    original = to_tensor(load_image(image))[None]
    generator = torch.Generator().manual_seed(seed)
    if enlarge is not None:
        geometry = _enlarging(original, enlarge, policy, model.image_size)
        square = _geometry(original, model.image_size // enlarge, policy).apply(original)
        changed = geometry.undo(
            model.super_resolve(
                square, [prompt], generator=generator, scale=enlarge, t=_TIMES["enlarge"], strength=strength
            )
        )
    else:
        geometry = _geometry(original, model.image_size, policy)
        square = geometry.apply(original)
        if mask is not None:
            result = model.inpaint(square, _mask(mask, geometry), [prompt], generator=generator, t=_TIMES["inpaint"])
        else:
            result = model.edit(
                square,
                [prompt],
                None if shows is None else [shows],
                generator=generator,
                t=_TIMES["edit"],
                strength=strength,
                threshold=threshold,
                softness=softness,
            )
        changed = _brought_back(original, square, result, geometry)
    picture = to_image(changed[0])
    save_png(picture, out)
    sys.stdout.write(f"{out}: {picture.width} x {picture.height} pixels\n")


def _geometry(image: Tensor, size: int, policy: FitPolicy, *, scale: int = 1) -> Geometry:
    """How a picture (1, 3, H, W), or one so many times its size, is brought to a square of ``size``."""
    from layton.data.geometry import Geometry

    height, width = image.shape[-2:]
    return Geometry.plan((scale * height, scale * width), size, policy=policy)


def _brought_back(original: Tensor, square: Tensor, result: Tensor, geometry: Geometry) -> Tensor:
    """A changed square at the size of the original (1, 3, H, W); where nothing changed, the original's own pixels."""
    left, top, right, bottom = geometry.box
    kept = original if geometry.policy == "pad" else original[..., top:bottom, left:right]
    share = (result != square).any(dim=1, keepdim=True).float().expand_as(square)
    share = geometry.undo(share).clamp(0, 1)
    return share * geometry.undo(result) + (1 - share) * kept


def _enlarging(original: Tensor, scale: int, policy: FitPolicy, size: int) -> Geometry:
    """How a picture (1, 3, H, W) of ``scale`` times the original's size lies in the square of ``size`` pixels.

    Raises:
        UsageError: The model cannot enlarge so much, or the picture is too large.
    """
    if size % scale or size == scale:
        raise UsageError(f"--enlarge must divide the {size} pixels that the model draws, got {scale}")
    if max(original.shape[-2:]) > size // scale:
        given = f"{original.shape[-1]} x {original.shape[-2]}"
        raise UsageError(f"the model draws {size} pixels: to enlarge by {scale}, at most {size // scale}, got {given}")
    return _geometry(original, size, policy, scale=scale)


def _mask(path: Path, geometry: Geometry) -> Tensor:
    """Where to paint, (1, 1, S, S) of 0 and 1.

    Raises:
        UsageError: It has another size than the picture, or nothing in it is white.
    """
    from layton.data.images import load_image, to_tensor

    drawn = to_tensor(load_image(path, background=(0, 0, 0)))[None]
    if tuple(drawn.shape[-2:]) != geometry.original_size:
        height, width = geometry.original_size
        raise UsageError(f"{path} is {drawn.shape[-1]} x {drawn.shape[-2]} pixels, the picture {width} x {height}")
    if not (drawn > 0).any():
        raise UsageError(f"{path}: nothing in it is white, so there is nothing to paint")
    mask = (geometry.apply(drawn, fill=-1.0).mean(dim=1, keepdim=True) > 0).float()
    if not mask.any():
        raise UsageError(f"{path}: nothing of what is white is left in the square that the model sees")
    return mask
