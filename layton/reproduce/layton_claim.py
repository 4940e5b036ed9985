"""Layton: pixel supervision through the consistency decoder against the diffusion decoder (arXiv 2503.08377)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layton import assets
from layton.reproduce.claim import Arm, Context, Stage
from layton.reproduce.report import Check, Outcome
from layton.reproduce.students import find_teacher
from layton.reproduce.training import TEACHER_PLACE, claim_out, stage_folder, train_arm

if TYPE_CHECKING:
    from torch import Tensor

    from layton.decoders.latent import LatentDecoder

_SCENES = "data.init_args.train.0.init_args.source.init_args.length"
_OBJECT_SCENES = 500
_START_PLACE = "runs/consistency/export"
_TOKENIZER_PLACE = "runs/tokenizer_long/export"
DIFFUSION_STEPS = 25
METHOD = Arm(
    "consistency",
    "method",
    (
        Stage("distill", "distill.yaml", share=0.35, scenes=_SCENES),
        Stage("pixels", "pixels.yaml", share=0.65, scenes=_SCENES),
    ),
    steps=(1, 2, 3),
)
BASELINE = Arm("diffusion", "baseline", (Stage("train", "diffusion.yaml", scenes=_SCENES),), steps=(DIFFUSION_STEPS,))
TITLE = "Layton: supervision in pixels through the consistency decoder, same tokens"
SOURCE = "arXiv 2503.08377, ablation"


def measure(context: Context) -> Outcome:
    """Train both decoders from the embedded stage-1 decoder at equal budget, and measure their reconstructions.

    Raises:
        ValueError: The tokenizer has no diffusion decoder or no latent diffusion model, or ``context.out`` holds
            another measurement.
        TrainingStoppedError: A signal ended a training run.
    """
    from layton.ldm.cache import digest

    places = find_parts(context)
    start = places["runs/decoder/export/decoder"]
    root = places[_TOKENIZER_PLACE]
    parts = (root / "encoder", root / "quantizer", places[TEACHER_PLACE], start)
    claim_out(context, claim="layton", teacher=" ".join(digest(part) for part in parts))
    spent = {
        BASELINE.name: train_arm(BASELINE, context, places, image_size=image_size(places)),
        METHOD.name: train_arm(
            METHOD, context, places, image_size=image_size(places), outputs={"distill": _START_PLACE}
        ),
    }
    figures = {
        f"{arm.name}-{steps}": _evaluated(arm, steps, context, places)
        for arm in (BASELINE, METHOD)
        for steps in arm.steps
    }
    return Outcome(
        claim="layton",
        title=TITLE,
        source=SOURCE,
        checks=tuple(judge(figures)),
        missing=() if context.options.get("photographs") else ("photographs: PSNR and EPD (give --photographs)",),
        arms={
            arm.name: {
                "role": arm.role,
                "steps": list(arm.steps),
                "forwards": sum(float(stage["forwards"]) for stage in spent[arm.name].values()),
                "stages": spent[arm.name],
            }
            for arm in (METHOD, BASELINE)
        },
        figures=figures,
        protocol={
            "start": digest(start),
            "budget": "forward-equivalents of the decoder's network, a backward pass counts two; autoencoder and "
            "perceptual network in the losses by operations; cached latents and codes not",
            "decoder_noise": "the same for every image, seed 0",
        },
    )


def find_parts(context: Context) -> dict[str, Path]:
    """Folders of the tokenizer's parts by the paths that stand for them in run files.

    Raises:
        ValueError: A part is missing; says which and where.
    """
    root = assets.resolve(context.tokenizer).absolute()
    for part in ("encoder", "quantizer", "decoders/diffusion"):
        if not (root / part / "config.json").is_file():
            raise ValueError(f"this claim needs a tokenizer with {part}; {root} has none: give one with --tokenizer")
    ldm = root / "ldm" if (root / "ldm" / "model_index.json").is_file() else find_teacher(context.pipeline)
    return {
        TEACHER_PLACE: ldm,
        _TOKENIZER_PLACE: root,
        "runs/decoder/export/decoder": root / "decoders" / "diffusion",
    }


def image_size(places: Mapping[str, Path]) -> int:
    """Side in pixels of the images that the tokenizer takes, and of its scenes here."""
    from layton.folder import load_config
    from layton.tokenizer import CLASS_NAME

    return int(str(load_config(places[_TOKENIZER_PLACE], expected_class=CLASS_NAME)["image_size"]))


def judge(figures: Mapping[str, Mapping[str, Any]]) -> list[Check]:
    """The relative floors against the diffusion decoder, and the absolute ones against ``palette``."""
    base = figures[f"{BASELINE.name}-{DIFFUSION_STEPS}"]["scenes"]
    candidates = {steps: figures[f"{METHOD.name}-{steps}"] for steps in METHOD.steps}
    steps = max(METHOD.steps)  # the decoder's own number; fewer are reported beside it, not chosen from
    ours = candidates[steps]["scenes"]
    gain = _psnr(ours) - _psnr(base)
    error = math.hypot(*(float(each["model"]["psnr"]["standard_error"]) for each in (ours, base)))
    checks = [
        Check(
            f"{steps} steps: PSNR above the diffusion decoder's in {DIFFUSION_STEPS}, dB",
            "19.16 dB against 16.53 dB, + 2.63 dB",
            f"{_psnr(ours):.2f} dB against {_psnr(base):.2f} dB",
            gain,
            "at least",
            2.0,
            error,
        ),
        _ratio("EPD", "LPIPS 0.38 against 0.47, x 0.81", _epd(ours), _epd(base), 0.85, steps),
        _ratio("FD-effnet", "rFID 11.34 against 12.72, x 0.89", _fd(ours), _fd(base), 1.0, steps),
    ]
    for name, decibels in (("scenes", 4.0), ("photographs", 1.2)):
        if name in candidates[steps]:
            checks += _absolute(name, candidates[steps][name], decibels)
    kept = candidates[steps].get("objects")
    if kept is not None:
        words = f"{kept['kept']:.1%} of {kept['scenes']} scenes ({kept['originals']:.1%} in the originals)"
        checks.append(Check("objects kept, share of scenes", "", words, float(kept["kept"]), "at least", 0.9))
    return checks


def _ratio(name: str, paper: str, ours: float, base: float, limit: float, steps: int) -> Check:
    words = f"{ours:.4g} against {base:.4g}"
    return Check(f"{steps} steps: {name} over the diffusion decoder's", paper, words, ours / base, "at most", limit)


def _absolute(name: str, report: Mapping[str, Any], decibels: float) -> list[Check]:
    palette, gain = report["references"]["palette"], report["gains"]["palette"]["psnr"]
    words = f"{_psnr(report):.2f} dB against {palette['psnr']['mean']:.2f} dB"
    epd = float(palette["epd"]["mean"])
    return [
        Check(
            f"{name}: PSNR above palette's, dB", "", words, gain["mean"], "at least", decibels, gain["standard_error"]
        ),
        Check(
            f"{name}: EPD over palette's",
            "",
            f"{_epd(report):.4g} against {epd:.4g}",
            _epd(report) / epd,
            "at most",
            0.6,
        ),
    ]


def _evaluated(arm: Arm, steps: int, context: Context, places: Mapping[str, Path]) -> dict[str, Any]:
    """Reconstruction figures of an arm, by data; read from disk where they were measured before."""
    from layton.folder import write_json

    photographs = list(context.options.get("photographs", ()))
    folder = context.out / "evaluation" / f"{arm.name}-{steps}"
    wanted: dict[str, tuple[list[str], int | None]] = {"scenes": (["scenes"], context.scale.images)}
    if photographs:
        wanted["photographs"] = (photographs, None if context.scale.name == "full" else context.scale.images)
    found: dict[str, Any] = {}
    reconstruct: Callable[[Tensor], Tensor] | None = None
    for name, (data, count) in wanted.items():
        path = folder / f"{name}.json"
        if not path.is_file():
            context.say(f"{arm.name}: measuring {name} in {steps} steps")
            reconstruct = reconstruct or reconstruction(arm, steps, context, places)
            size = image_size(places)
            write_json(path, _reconstructions(reconstruct, data, count, arm, steps, context, size=size))
        found[name] = json.loads(path.read_text(encoding="utf-8"))
    if arm is METHOD and steps == max(METHOD.steps):
        path = folder / "objects.json"
        if not path.is_file():
            from layton.sceneval.objects import objects_kept

            count = min(_OBJECT_SCENES, context.scale.images)
            kept = objects_kept(
                reconstruct or reconstruction(arm, steps, context, places),
                count,
                split="test",
                size=image_size(places),
                batch_size=context.scale.batch_size,
            )
            write_json(path, kept.to_dict())
        found["objects"] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _reconstructions(
    reconstruct: Callable[[Tensor], Tensor],
    data: list[str],
    count: int | None,
    arm: Arm,
    steps: int,
    context: Context,
    *,
    size: int,
) -> dict[str, Any]:
    from layton.data.evaluation import open_images
    from layton.metrics import evaluate_reconstruction
    from layton.metrics.protocol import Protocol

    images = open_images(data, split="test", count=count, size=size, batch_size=context.scale.batch_size)
    protocol = Protocol(
        dataset=images.name,
        split=images.split,
        preprocessing=images.preprocessing,
        model=f"layton reproduce layton, arm {arm.name}",
        decoder=arm.name,
        num_inference_steps=steps,
        seeds={"noise of every image": 0},
        notes="" if context.scale.name == "full" else context.scale.name,
    )
    report = evaluate_reconstruction(reconstruct, images, protocol=protocol, bootstrap=context.scale.resamples)
    if "fd_effnet" not in report.model.frechet:
        raise ValueError(f"EPD and FD-effnet cannot be measured: {report.absent['fd_effnet']}")
    return report.to_dict()


def reconstruction(arm: Arm, steps: int, context: Context, places: Mapping[str, Path]) -> Callable[[Tensor], Tensor]:
    """Images (B, 3, H, W) in [-1, 1] through the codes and a trained decoder, at the tokenizer's size."""
    import torch

    from layton.decoders import ConsistencyDecoder, DiffusionDecoder
    from layton.ldm.cache import load_code_parts
    from layton.loading import same_noise

    encoder, quantizer = load_code_parts(places[_TOKENIZER_PLACE])
    export = stage_folder(context, arm, arm.stages[-1]) / "export" / "decoder"
    base = places["runs/decoder/export/decoder"]
    trained = ConsistencyDecoder.from_pretrained(export, ldm=places[TEACHER_PLACE], base=base)
    decoder: LatentDecoder = trained
    if arm is BASELINE:  # trained by the diffusion loss alone, and sampled so
        per_token = trained.latents_per_token
        decoder = DiffusionDecoder(trained.network, trained.autoencoder, latents_per_token=per_token).eval()

    @torch.no_grad()
    def reconstruct(images: Tensor) -> Tensor:
        features = encoder(images).float()
        grid = (features.shape[-2], features.shape[-1])
        embeddings = quantizer.codes_to_embeddings(quantizer.encode(features), grid)
        return decoder.decode(embeddings, num_steps=steps, generator=same_noise(0, len(images)))

    return reconstruct


def _psnr(report: Mapping[str, Any]) -> float:
    return float(report["model"]["psnr"]["mean"])


def _epd(report: Mapping[str, Any]) -> float:
    return float(report["model"]["epd"]["mean"])


def _fd(report: Mapping[str, Any]) -> float:
    return float(report["model"]["fd_effnet"]["value"])
