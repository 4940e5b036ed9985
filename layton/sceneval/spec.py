"""What an image must show, as one line of GenEval's ``evaluation_metadata.jsonl`` says it.

Fields (github.com/djghosh13/geneval): ``tag``, ``include`` = [{class, count[, color][, position: [relation, index of
the other include]]}], optional ``exclude`` = [{class, count}], ``prompt``. Ours adds ``unseen``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast

from layton.scenes.world import COLOURS, RELATIONS, SHAPES, TASKS, Colour, Relation, Shape, Task


@dataclass(frozen=True, slots=True)
class Requirement:
    """Objects that must be there.

    Attributes:
        shape: GenEval's ``class``.
        count: at least this many.
        colour: the colour all of them must have, or None.
        relation: where they stand, or None.
        target: index of the requirement that ``relation`` refers to, or None.
    """

    shape: Shape
    count: int
    colour: Colour | None = None
    relation: Relation | None = None
    target: int | None = None


@dataclass(frozen=True, slots=True)
class Exclusion:
    """``count`` or more objects of a shape must not be there."""

    shape: Shape
    count: int


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """A prompt and what its images must show.

    Attributes:
        task: GenEval's ``tag``.
        include: what must be there.
        exclude: what must not.
        prompt: the text.
        unseen: whether the prompt names a combination that no training scene shows. Prompts without colours
            name no such combination.
    """

    task: Task
    include: tuple[Requirement, ...]
    exclude: tuple[Exclusion, ...]
    prompt: str
    unseen: bool = False

    def to_json(self) -> str:
        """The GenEval line, without the line break."""
        include = []
        for item in self.include:
            entry: dict[str, Any] = {"class": item.shape, "count": item.count}
            if item.colour is not None:
                entry["color"] = item.colour
            if item.relation is not None:
                entry["position"] = [item.relation, item.target]
            include.append(entry)
        line: dict[str, Any] = {"tag": self.task, "include": include}
        if self.exclude:
            line["exclude"] = [{"class": item.shape, "count": item.count} for item in self.exclude]
        return json.dumps({**line, "prompt": self.prompt, "unseen": self.unseen})

    @classmethod
    def from_json(cls, line: str) -> PromptSpec:
        """Read a GenEval line.

        Raises:
            ValueError: if it is no JSON object, a field is missing, or a class, colour, relation or tag is unknown.
        """
        data = json.loads(line)
        if not isinstance(data, dict):
            raise ValueError(f"a prompt line must be a JSON object, got {line[:80]!r}")
        include = tuple(_requirement(entry) for entry in _entries(data, "include"))
        for item in include:
            if item.target is not None and not 0 <= item.target < len(include):
                raise ValueError(f"position refers to include {item.target} of {len(include)}")
        excluded = _entries(data, "exclude") if "exclude" in data else []
        exclude = tuple(Exclusion(_shape(entry), _count(entry)) for entry in excluded)
        task, prompt, unseen = data.get("tag"), data.get("prompt"), data.get("unseen", False)
        if task not in TASKS:
            raise ValueError(f"tag must be one of {TASKS}, got {task!r}")
        if not isinstance(prompt, str) or not isinstance(unseen, bool):
            raise ValueError(f"prompt must be text and unseen true or false, got {prompt!r} and {unseen!r}")
        return cls(cast("Task", task), include, exclude, prompt, unseen)


def _entries(data: dict[str, Any], field: str) -> list[dict[str, Any]]:
    entries = data.get(field)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{field} must be a list of objects, got {entries!r}")
    return entries


def _shape(entry: dict[str, Any]) -> Shape:
    shape = entry.get("class")
    if shape not in SHAPES:
        raise ValueError(f"class must be one of {list(SHAPES)}, got {shape!r}")
    return cast("Shape", shape)


def _count(entry: dict[str, Any]) -> int:
    count = entry.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"count must be a whole number above 0, got {count!r}")
    return count


def _requirement(entry: dict[str, Any]) -> Requirement:
    colour, position = entry.get("color"), entry.get("position")
    if colour is not None and colour not in COLOURS:
        raise ValueError(f"color must be one of {list(COLOURS)}, got {colour!r}")
    relation: Relation | None = None
    target: int | None = None
    if position is not None:
        match position:
            case [str() as name, int() as index] if name in RELATIONS:
                relation, target = name, index
            case _:
                raise ValueError(f"position must be [one of {RELATIONS}, index], got {position!r}")
    return Requirement(_shape(entry), _count(entry), cast("Colour | None", colour), relation, target)
