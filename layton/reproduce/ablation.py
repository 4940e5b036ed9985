"""Ablation tables: every part of a method has its row, all rows trained from one teacher at one budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from layton.ldm.cache import digest
from layton.reproduce.claim import LATENT_SCENES, Arm, Claim, Context, Phase, Stage
from layton.reproduce.report import Check, Outcome, Row
from layton.reproduce.students import Measured, measure_students

BASE = "base.yaml"


@dataclass(frozen=True, slots=True)
class Setting:
    """A row of the table.

    Attributes:
        name: Of its folder, and of its run file, which is laid over ``base.yaml``.
        title: What it changes.
        paper: The paper's figures for it, in words.
        phases: Step numbers that the budget decides.
        needs: Folder of a network that its run file names, trained beforehand; empty for none.
        made_by: The run file that trains it, and its data.
    """

    name: str
    title: str
    paper: str = ""
    phases: tuple[Phase, ...] = ()
    needs: str = ""
    made_by: str = ""

    @property
    def missing(self) -> bool:
        """Whether a network is needed that is not there."""
        return bool(self.needs) and not Path(self.needs).is_dir()

    @property
    def arm_name(self) -> str:
        """Its name and, where it needs a network, that one's digest: with another one it is trained anew."""
        return f"{self.name}-{digest(Path(self.needs))[:8]}" if self.needs and not self.missing else self.name

    def arm(self, steps: int) -> Arm:
        """How it is trained, and measured in a number of steps."""
        stage = Stage("train", BASE, overlay=f"{self.name}.yaml", phases=self.phases, scenes=LATENT_SCENES)
        return Arm(self.arm_name, "method", (stage,), steps=(steps,))


def measure_table(
    name: str, title: str, source: str, settings: Sequence[Setting], context: Context, *, steps: int
) -> Outcome:
    """Train and measure every row whose networks are there.

    Args:
        name: Of the claim.
        title: Of the table.
        source: arXiv number and table.
        settings: The rows.
        context: Of the measurement.
        steps: Number of steps in which all students are compared.
    """
    present = [setting for setting in settings if not setting.missing]
    claim = Claim(name, title, source, tuple(setting.arm(steps) for setting in present), _no_floors)
    outcome = measure_students(claim, context)
    rows = []
    for setting in present:
        found = outcome.figures[f"{setting.arm_name}-{steps}"]
        scenes = found["sceneval"]["overall"]
        ours = {"SceneEval": sum(scenes) / len(scenes), "FD-effnet": found["fd_effnet"], "coverage": found["coverage"]}
        rows.append(Row(setting.title, setting.paper, ours))
    absent = [f"{s.title} (no {s.needs}: layton fit --config {s.made_by})" for s in settings if s.missing]
    return replace(outcome, rows=tuple(rows), missing=tuple(absent))


def _no_floors(measured: Measured, context: Context) -> list[Check]:
    return []
