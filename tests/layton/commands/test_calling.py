from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest

from layton.commands import Command
from layton.commands.calling import _lists_joined, call_function, function_parser
from layton.progress import progress

seen: list[tuple[str, bool, int]] = []


def toy(name: str, *, quick_look: bool = False, count: int = 1) -> None:
    """A toy.

    Args:
        name: of something.
        quick_look: be quick.
        count: how many.
    """
    seen.append((name, quick_look, count))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a"], ("a", False, 1)),
        (["a", "--quick-look"], ("a", True, 1)),
        (["--quick_look", "--count", "3", "a"], ("a", True, 3)),
        (["a", "--quick-look=true"], ("a", True, 1)),
        (["a", "--quick-look", "false"], ("a", False, 1)),
    ],
)
def test_a_switch_needs_no_value(
    words: list[str], expected: tuple[str, bool, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("toy_commands")
    module.toy = toy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_commands", module)
    assert call_function("toy", Command("toy_commands", "toy", "a toy"), words) == 0
    assert seen.pop() == expected


def test_logs_are_told_of_long_work(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layton.progress._SECONDS_BETWEEN_LINES", 0.0)
    with progress(2000, "encode") as bar:
        bar.update(1500)
    assert capsys.readouterr().err == "layton: encode: 1,500 of 2,000\n" and bar.n == 1500


def test_a_list_may_be_given_in_parts() -> None:
    def command(*, config: list[str], other: list[str] | None = None, x: int = 0) -> None: ...

    words = ["--config", "a", "--x", "1", "--config=b", "--config", "c", "d", "--other", "e"]
    assert _lists_joined(command, words) == ["--x", "1", "--other", "e", "--config", "a", "b", "c", "d"]
    once = ["--config", "a", "b", "--x", "1"]
    assert _lists_joined(command, once) == once


@dataclass(frozen=True)
class Choices:
    """How it is done.

    Attributes:
        kinds: which of them; all by default.
        share: of the whole.
        part: of it.
    """

    kinds: list[Literal["round", "square"]] | None = None
    share: float = 0.5
    part: Literal["first", "last"] | Literal["all"] = "all"  # as an alias of an alias is


def test_help_says_what_an_option_is_in_a_word_and_keeps_groups_together() -> None:
    def command(
        names: list[str],
        *,
        out: Path,
        count: int = 0,
        size: int | None = None,
        quick: bool = False,
        how: Choices = Choices(),
    ) -> None:
        """Do it.

        Args:
            names: of things.
            out: where to.
            count: passed over.
            size: of each.
            quick: hurry.
            how: see there.
        """

    lines = [" ".join(line.split()) for line in function_parser(command, program="toy").format_help().splitlines()]
    wanted = [
        "--out PATH where to. (required)",
        "--count N passed over. (default: 0)",
        "--size N of each.",
        "--quick {true,false} hurry.",
        "How it is done:",
        "--share NUMBER of the whole. (default: 0.5)",
        "--part {first,last,all}",
        "--kinds {round,square} [{round,square} ...]",
    ]
    places = [lines.index(line) for line in wanted]
    assert places == sorted(places)
