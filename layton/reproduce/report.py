"""What a measurement found: the paper's figure, ours, the floor, and whether it holds; for people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from layton.reproduce.claim import Context

Direction = Literal["at most", "at least"]


@dataclass(frozen=True, slots=True)
class Check:
    """One floor, and what was measured against it.

    Attributes:
        quantity: What is compared.
        paper: The paper's figure, in words; empty where it has none.
        ours: Our figures, in words.
        value: The number that the floor speaks of: often the ratio of method and baseline.
        direction: On which side of the limit it must lie.
        limit: The floor.
        spread: Standard deviation or error of ``value``, None if not known.
    """

    quantity: str
    paper: str
    ours: str
    value: float
    direction: Direction
    limit: float
    spread: float | None = None

    @property
    def met(self) -> bool:
        """Whether the floor is reached."""
        return self.value <= self.limit if self.direction == "at most" else self.value >= self.limit

    def to_dict(self) -> dict[str, Any]:
        """The fields under their names, and ``met``."""
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table that compares settings and has no floors.

    Attributes:
        name: The setting.
        paper: The paper's figures for it, in words; empty where it has none.
        ours: Our figures by name.
    """

    name: str
    paper: str
    ours: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A measured claim.

    Attributes:
        claim: Its name.
        title: What is claimed.
        source: Where.
        checks: The floors.
        arms: By arm how it was made and what it cost.
        figures: Everything that was measured, by arm.
        protocol: How.
        missing: Floors or rows that were not measured, each with the reason; the claim then does not hold in every
            part.
        rows: Of an ablation table, which has no floors.
    """

    claim: str
    title: str
    source: str
    checks: tuple[Check, ...]
    arms: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()

    @property
    def met(self) -> bool:
        """Whether every floor is reached; a table without floors is whole."""
        return not self.missing and all(check.met for check in self.checks)

    def to_dict(self, context: Context) -> dict[str, Any]:
        """The outcome as JSON can hold it, with scale, seeds and versions."""
        from layton.metrics.protocol import library_versions

        return {
            "claim": self.claim,
            "title": self.title,
            "source": self.source,
            "label": context.scale.label,
            "met": self.met,
            "checks": [check.to_dict() for check in self.checks],
            "rows": [asdict(row) for row in self.rows],
            "not_measured": list(self.missing),
            "arms": dict(self.arms),
            "figures": dict(self.figures),
            "scale": context.scale.to_dict(),
            "protocol": dict(self.protocol),
            "versions": library_versions(),
        }

    def save(self, path: Path, context: Context) -> None:
        """Write the outcome as JSON, whole or not at all."""
        from layton.folder import write_json

        write_json(path, self.to_dict(context))

    def summary(self, context: Context) -> str:
        """A table for people."""
        lines = [f"{self.title} ({self.source})"]
        if context.scale.label != "full":
            lines.append(f"*** {context.scale.label} ***")
        for check in self.checks:
            spread = "" if check.spread is None else f" +- {check.spread:.3f}"
            lines += [
                f"{check.quantity}",
                *([f"    paper  {check.paper}"] if check.paper else []),
                f"    ours   {check.ours}",
                f"    value  {check.value:.3f}{spread}, floor {check.direction} {check.limit:g}: "
                f"{'met' if check.met else 'NOT MET'}",
            ]
        for row in self.rows:
            ours = ", ".join(f"{name} {value:.4g}" for name, value in row.ours.items())
            lines.append(f"{row.name}: {ours}" + (f" (paper: {row.paper})" if row.paper else ""))
        lines += [f"{quantity}: not measured" for quantity in self.missing]
        for name, arm in self.arms.items():
            cost = arm.get("forwards")
            lines.append(f"{name}: {arm['role']}" + (f", {cost:,.0f} forward-equivalents" if cost else ", not trained"))
        if self.checks:
            lines.append("the claim holds" if self.met else "the claim does not hold in every part")
        return "\n".join(lines) + "\n"
