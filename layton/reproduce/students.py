"""Claims about students of a text-to-image model: train every arm, measure every arm, compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layton.assets import find_pipeline
from layton.ldm.drawing import DEFAULT_GUIDANCE, DEFAULT_STEPS, TextToImage
from layton.metrics.frechet import bootstrap_ratio
from layton.reproduce.claim import Arm, Claim, Context
from layton.reproduce.evaluation import NEIGHBOURS, Evaluator, SceneScores, unadapted_drawer
from layton.reproduce.report import Outcome
from layton.reproduce.training import TEACHER_PLACE, claim_out, stage_folder, train_arm


@dataclass(frozen=True, slots=True, eq=False)
class Figures:
    """One arm in one number of steps.

    Attributes:
        distance: FD-effnet, its spread and coverage, see `Evaluator.distance`; None if not measured.
        scenes: SceneEval; None if not measured.
    """

    distance: Mapping[str, Any] | None = None
    scenes: SceneScores | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures under their names."""
        found: dict[str, Any] = {} if self.distance is None else dict(self.distance)
        if self.scenes is not None:
            found["sceneval"] = self.scenes.to_dict()
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What judges look at.

    Attributes:
        figures: By arm and number of steps.
        spent: By trained arm and stage, see `layton.reproduce.budget.BudgetStop`.
        evaluator: With all features.
        teacher: The pipeline that all arms began with.
    """

    figures: Mapping[tuple[str, int], Figures]
    spent: Mapping[str, Mapping[str, Any]]
    evaluator: Evaluator
    teacher: Path

    def fd(self, arm: str, steps: int) -> float:
        """FD-effnet."""
        return float(self._distance(arm, steps)["fd_effnet"])

    def coverage(self, arm: str, steps: int) -> float:
        """Coverage, k = 5."""
        return float(self._distance(arm, steps)["coverage"])

    def scenes(self, arm: str, steps: int) -> SceneScores:
        """SceneEval.

        Raises:
            ValueError: It was not measured.
        """
        found = self.figures[arm, steps].scenes
        if found is None:
            raise ValueError(f"SceneEval of {arm} in {steps} steps was not measured")
        return found

    def fd_ratio(self, method: tuple[str, int], baseline: tuple[str, int]) -> tuple[float, float]:
        """FD of a method over that of a baseline, and the bootstrap deviation of the ratio."""
        names = [place_of(*method), place_of(*baseline)]
        real, above, below = (self.evaluator.stored(name) for name in ("real", *names))
        spread = bootstrap_ratio(real, above, below, num_resamples=self.evaluator.scale.resamples)
        return self.fd(*method) / max(self.fd(*baseline), 1e-12), spread.standard_deviation

    def forwards(self, arm: str) -> float:
        """Forward-equivalents of all stages of an arm."""
        return sum(float(stage["forwards"]) for stage in self.spent[arm].values())

    def trained_parameters(self, arm: str) -> int:
        """Parameters trained in the largest stage of an arm."""
        return max(int(stage["trained_parameters"]) for stage in self.spent[arm].values())

    def _distance(self, arm: str, steps: int) -> Mapping[str, Any]:
        found = self.figures[arm, steps].distance
        if found is None:
            raise ValueError(f"FD-effnet of {arm} in {steps} steps was not measured")
        return found


def place_of(arm: str, steps: int) -> str:
    """Name of an arm's evaluation folder."""
    return f"{arm}-{steps}"


def find_teacher(name: str) -> Path:
    """The folder of the pipeline that a claim starts from.

    Raises:
        ValueError: There is none; says what to do.
    """
    try:
        return find_pipeline(name).absolute()
    except ValueError as error:
        raise ValueError(
            f"this claim needs a text-to-image model ({error}); give one with --pipeline FOLDER"
        ) from error


def measure_students(claim: Claim, context: Context) -> Outcome:
    """Train and evaluate what is missing, and judge.

    Raises:
        ValueError: No teacher, or ``context.out`` holds another measurement.
        TrainingStoppedError: A signal ended a training run.
    """
    from layton.distillation.pair_data import teacher_digest
    from layton.ldm.cache import autoencoder_digest
    from layton.ldm.text import hears_places

    teacher = find_teacher(context.pipeline)
    claim_out(context, claim=claim.name, teacher=f"{teacher_digest(teacher)} {autoencoder_digest(teacher / 'vae')}")
    size, places = _image_size(teacher), hears_places(teacher)
    evaluator = Evaluator(context.out / "evaluation", context.scale, size, places=places)
    spent: dict[str, Mapping[str, Any]] = {}
    figures: dict[tuple[str, int], Figures] = {}
    for arm in claim.arms:  # each is measured when it is trained: what is finished can be read in ``evaluation/``
        if arm.stages:
            spent[arm.name] = train_arm(arm, context, {TEACHER_PLACE: teacher}, image_size=evaluator.image_size)
        for steps in arm.steps:
            figures[arm.name, steps] = _measure(arm, steps, context, evaluator, teacher)
    measured = Measured(figures, spent, evaluator, teacher)
    context.say("comparing")
    checks = claim.judge(measured, context)
    return Outcome(
        claim=claim.name,
        title=claim.title,
        source=claim.source,
        checks=tuple(checks),
        arms={arm.name: _describe(arm, spent.get(arm.name, {})) for arm in claim.arms},
        figures={place_of(*key): found.to_dict() for key, found in figures.items()},
        protocol=_protocol(context, evaluator, teacher_digest(teacher)),
    )


def _measure(arm: Arm, steps: int, context: Context, evaluator: Evaluator, teacher: Path) -> Figures:
    name = place_of(arm.name, steps)
    context.say(f"{arm.name}: measuring in {steps} step{'s' * (steps != 1)}")
    draw = drawer_of(arm, steps, context, teacher)
    distance = scenes = None
    if "fd" in arm.measures:
        evaluator.real_features()
        evaluator.features(name, draw)
        distance = evaluator.distance(name)
    if "sceneval" in arm.measures:
        scenes = evaluator.scene_scores(name, draw)
    return Figures(distance, scenes)


def drawer_of(arm: Arm, steps: int, context: Context, teacher: Path) -> TextToImage:
    """What draws the pictures of an arm."""
    if arm.stages:
        return TextToImage.load_student(teacher, stage_folder(context, arm, arm.stages[-1]) / "export", num_steps=steps)
    if arm.one_step:
        return unadapted_drawer(teacher, guidance_scale=arm.guidance)
    return TextToImage.load(teacher, num_steps=steps, guidance_scale=arm.guidance)


def teacher_arm() -> Arm:
    """The teacher as it is used, as a point of reference."""
    return Arm("teacher", "reference", steps=(DEFAULT_STEPS,), measures=("sceneval",), guidance=DEFAULT_GUIDANCE)


def _describe(arm: Arm, spent: Mapping[str, Any]) -> dict[str, Any]:
    total = sum(float(stage["forwards"]) for stage in spent.values())
    return {"role": arm.role, "steps": list(arm.steps), "forwards": total, "stages": dict(spent)}


def _protocol(context: Context, evaluator: Evaluator, digest: str) -> dict[str, Any]:
    from layton.metrics.effnet import weights_sha256

    return {
        "teacher": digest,
        "image_size": evaluator.image_size,
        "prompts": "with places (layton.scenes.placed)" if evaluator.places else "plain captions",
        "budget": "forward-equivalents of the denoiser, a backward pass counts two; teacher, discriminator, data made "
        "by the teacher, autoencoder and perceptual network in losses (by operations) included; latents of rendered "
        "scenes, encoded once, not",
        "fd_effnet": f"{context.scale.images} test Scenes against one drawing each, seed i for scene i; not FID",
        "coverage": f"k = {NEIGHBOURS}, in the same features (arXiv 2002.09797)",
        "feature_weights_sha256": weights_sha256(),
        "spread": "bootstrap over scenes, drawings and scenes resampled together",
        "sceneval": "test prompts; mean and standard error over repetitions with other drawing seeds",
        "weights": "those of the last step, averaged where the run file says so; nothing is chosen by test figures",
    }


def _image_size(teacher: Path) -> int:
    from layton.ldm.conditions import latent_shape_of
    from layton.ldm.teacher import open_pipeline

    pipe = open_pipeline(teacher)
    return latent_shape_of(pipe)[1] * int(2 ** (len(pipe.vae.config.block_out_channels) - 1))
