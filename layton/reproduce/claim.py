"""What a claim is: a paper's figure, a floor for ours, and the arms that are trained to compare them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from layton.reproduce.report import Check
    from layton.reproduce.students import Measured
    from layton.scenes import Texture

Role = Literal["method", "baseline", "reference"]
Measure = Literal["fd", "sceneval"]
ScaleName = Literal["full", "small", "quick"]
SCALE_FILE = "scale.yaml"
QUICK_OVERLAY = "quick.yaml"  # one for all claims, beside their folders
LATENT_SCENES = "data.init_args.train.0.init_args.length"


@dataclass(frozen=True, slots=True)
class Scale:
    """How large a measurement is; the committed ``scale.yaml`` of a claim holds all of them.

    Attributes:
        name: Which of them; only ``full`` gives the figure of record.
        budget: Forward-equivalents of the denoiser that each arm may spend, data generation included; 0 where nothing
            is trained.
        images: Test Scenes for the Frechet distance and coverage.
        per_task: SceneEval prompts for each of the six tasks.
        images_per_prompt: Images for each prompt.
        seeds: SceneEval is repeated with each of them.
        resamples: Bootstrap resamples of the Frechet distance.
        batch_size: Images drawn at once.
        train_scenes: Scenes whose latents are cached for methods that learn from data.
        textures: Backgrounds of the real scenes; all by default.
        own_images: Whether ``images`` was asked for in place of the scale's number.

    Raises:
        ValueError: A number is out of range.
    """

    name: ScaleName
    budget: float
    images: int
    per_task: int
    images_per_prompt: int
    seeds: tuple[int, ...] = (0, 1, 2)
    resamples: int = 20
    batch_size: int = 16
    train_scenes: int = 16_000
    textures: tuple[Texture, ...] | None = None
    own_images: bool = False

    def __post_init__(self) -> None:
        counts = (self.per_task, self.images_per_prompt, self.batch_size, self.train_scenes)
        if not 0 <= self.budget < float("inf") or min(counts) < 1 or self.images < 2 or self.resamples < 2:
            raise ValueError(f"a number of the scale is out of range: {self}")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different, >= 0 and at least one, got {self.seeds}")

    @classmethod
    def read(cls, path: Path, name: ScaleName) -> Scale:
        """One of the scales of a claim's file.

        Raises:
            ValueError: The file is missing or says something else.
        """
        try:
            values = dict(yaml.safe_load(path.read_text(encoding="utf-8"))[name])
            values["budget"] = float(values.get("budget", 0.0))  # YAML takes 1e6 for a word
            values["seeds"] = tuple(values.get("seeds", (0, 1, 2)))
            values["textures"] = tuple(values["textures"]) if "textures" in values else None
            return cls(name, **values)
        except (OSError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no scale {name!r} ({error})") from error

    @property
    def label(self) -> str:
        """What results of this scale are, in words."""
        if self.name == "full" and not self.own_images:
            return self.name
        return f"{self.name}{f', {self.images} images' * self.own_images}: not the figure of record"

    def to_dict(self) -> dict[str, Any]:
        """The fields under their names."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Phase:
    """A step number in a run file that the budget decides, such as where a method's second stage begins.

    The number is ``training budget / (batch size x forwards)``. Only phases are placed so; where a run ends is the
    counter's business.

    Attributes:
        option: Dotted name in the run file.
        forwards: Forward-equivalents for each sample, over the share of the budget at which the phase is to begin.
    """

    option: str
    forwards: float

    def step(self, budget: float, batch_size: int) -> int:
        """The step number, at least 1."""
        return max(1, int(budget / (batch_size * self.forwards)))


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs that a teacher makes before a stage, paid from the stage's budget.

    Attributes:
        share: Of the stage's budget.
        forwards: For one pair; guidance counts twice.
    """

    share: float
    forwards: float

    def count(self, budget: float) -> int:
        """How many pairs the share buys, at least 1."""
        return max(1, int(budget * self.share / self.forwards))


@dataclass(frozen=True, slots=True)
class Stage:
    """One training run of an arm.

    Attributes:
        name: Its folder below the arm's.
        config: Run file, as seen from the claim's folder of configs; those of several claims lie beside the folders.
        overlay: Another one there that is laid over it: its values win, its lists replace.
        share: Of the arm's budget.
        teacher: Stage of the same arm whose student is the teacher here; None is the claim's own teacher.
        phases: Step numbers that the budget decides.
        pairs: Data made by the teacher beforehand.
        scenes: Option of the run file that says how many scenes are cached for training.
        changes: Further values of the run file, by dotted name.
    """

    name: str
    config: str
    overlay: str | None = None
    share: float = 1.0
    teacher: str | None = None
    phases: tuple[Phase, ...] = ()
    pairs: Pairs | None = None
    scenes: str | None = None
    changes: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to make a model, and what is measured of it.

    Attributes:
        name: Its folder.
        role: What it is in the claim.
        stages: Trained one after the other; none for the teacher as it is.
        steps: Numbers of steps it is measured in.
        budget: In shares of the scale's budget.
        measures: ``fd`` brings coverage with it.
        guidance: For arms without stages: the guidance scale. Students have it in their weights.
        one_step: For arms without stages: evaluated once at the noisiest time, as students are.
    """

    name: str
    role: Role
    stages: tuple[Stage, ...] = ()
    steps: tuple[int, ...] = ()
    budget: float = 1.0
    measures: tuple[Measure, ...] = ("fd", "sceneval")
    guidance: float = 1.0
    one_step: bool = False

    def __post_init__(self) -> None:
        total = sum(stage.share for stage in self.stages)
        if self.stages and abs(total - 1.0) > 1e-9:
            raise ValueError(f"the stages of {self.name} share {total:g} of its budget, not all of it")


@dataclass(frozen=True, slots=True)
class Context:
    """Where and how large a claim is measured.

    Attributes:
        out: Folder of everything the measurement makes.
        configs: The claim's folder of run files.
        scale: How large.
        pipeline: Name or folder of the text-to-image pipeline.
        tokenizer: Name or folder of the tokenizer.
        say: Told what is going on.
        options: Further settings of single claims, as texts.
    """

    out: Path
    configs: Path
    scale: Scale
    pipeline: str = "mini"
    tokenizer: str = "mini"
    say: Callable[[str], object] = print
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim about students of a text-to-image model.

    Attributes:
        name: As on the command line.
        title: What is claimed, in words.
        source: arXiv number and table.
        arms: Trained from one teacher with the same seeds.
        judge: Compares the figures with the floors.
    """

    name: str
    title: str
    source: str
    arms: tuple[Arm, ...]
    judge: Callable[[Measured, Context], list[Check]]
