"""Typed functions as commands, through jsonargparse."""

from __future__ import annotations

import inspect
import os
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from layton.commands import Command
from layton.errors import UsageError
from layton.usage import usage_error

_PLACEHOLDERS: dict[Any, str] = {int: "N", float: "NUMBER", Path: "PATH", str: "TEXT"}


def call_function(name: str, command: Command, args: Sequence[str]) -> int:
    """Parse ``args`` for a command's function and call it.

    Args:
        name: the command as typed, for the help text.
        command: its row in the table.
        args: what follows the name; ``--two-words`` and ``--two_words`` are the same.

    Returns:
        The function's exit status, 0 for None.

    Raises:
        UsageError: something is wrong with ``args``.
        SystemExit: status 0 after help.
    """
    function: Callable[..., int | None] = getattr(import_module(command.module), command.function)
    parser = function_parser(function, program=f"layton {name}")
    try:
        given = parser.parse_args(_words_of(function, [_underscored(word) for word in args])).as_dict()
    except ArgumentError as error:
        raise usage_error(error, parser.prog, _options(parser)) from error
    for option in ("json", "out"):
        if isinstance(given.get(option), Path):
            _require_place(option, given[option])
    positional = [given.pop(parameter.name) for parameter in _positional(function)]
    for parameter, bundle in _bundles(function).items():
        given[parameter] = bundle(**{field.name: given.pop(field.name) for field in fields(bundle)})
    # torchrun says both; a cluster may say the first of them to whoever works there by hand
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ:
        return _together(name, command, function, positional, given)
    status = function(*positional, **given)
    return 0 if status is None else int(status)


def _require_place(option: str, place: Path) -> None:
    """Told before the work, not after it."""
    if option == "json" and place.is_dir():
        raise UsageError(f"--json {place} is a folder, and a file is to be written")
    above = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    if above != place and not above.is_dir():
        raise UsageError(f"--{option} {place}: {above} is not a folder")
    if not os.access(above, os.W_OK):
        raise UsageError(f"--{option} {place}: {above} may not be written to")


def _options(parser: ArgumentParser) -> list[str]:
    """What can be typed, ``--`` included."""
    return [option for action in parser._actions for option in action.option_strings]


def _together(
    name: str, command: Command, function: Callable[..., int | None], positional: list[Any], given: dict[str, Any]
) -> int:
    """Call a function in one of several processes that ``torchrun`` began; the first one tells and writes."""
    if not command.shared:
        raise UsageError(f"layton {name} runs in one process, and torchrun began {os.environ['WORLD_SIZE']}")
    from layton.ranks import joined_ranks

    with joined_ranks() as first:
        status = function(*positional, **(given if first or "json" not in given else given | {"json": None}))
    return 0 if status is None else int(status)


def function_parser(function: Callable[..., Any], *, program: str) -> ArgumentParser:
    """Parser of a function's parameters: positional ones as positional arguments, keyword-only ones as options.

    Args:
        function: fully annotated, with a Google docstring.
        program: name in the usage line.

    Returns:
        The parser; a parameter annotated ``list[X]`` takes one or more values, and one annotated with a dataclass is an
        option for each of its fields.
    """
    _resolve_annotations(function, *_bundles(function).values())
    documentation = parse_docstring(inspect.getdoc(function) or "")
    text = "\n\n".join(part for part in (documentation.short_description, documentation.long_description) if part)
    parser = ArgumentParser(prog=program, description=text, exit_on_error=False, formatter_class=HelpFormatter)
    bundles = _bundles(function)
    for name in (parameter.name for parameter in _positional(function)):
        _add_argument(parser, function, name)
    lists = _lists(function)
    parser.add_function_arguments(function, as_group=False, skip={*lists, *bundles, *_names(_positional(function))})
    for name in lists:
        _add_argument(parser, function, name)
    for bundle in bundles.values():
        lists = _lists(bundle)
        parser.add_class_arguments(bundle, None, skip={*lists})
        for name in lists:
            _add_argument(parser._action_groups[-1], bundle, name)  # the group just made, which nothing returns
    return parser


def _resolve_annotations(*sources: Any) -> None:
    """Put types in the place of their names: jsonargparse else imports all that type checkers import, for seconds."""
    for source in sources:
        holder = vars(source)["__init__"] if isinstance(source, type) else source
        holder.__annotations__ = get_type_hints(holder)


def _names(parameters: Iterable[inspect.Parameter]) -> list[str]:
    return [parameter.name for parameter in parameters]


def _lists(source: Callable[..., Any]) -> list[str]:
    """Options that take several values, which jsonargparse would want as ``[a, b]``."""
    hints = get_type_hints(source)
    return [
        parameter.name
        for parameter in inspect.signature(source).parameters.values()
        if (parameter.kind is parameter.KEYWORD_ONLY or isinstance(source, type))
        and _item_type(hints[parameter.name]) is not None
    ]


def _add_argument(parser: Any, source: Callable[..., Any], name: str) -> None:
    """Add one positional argument or list to a parser or a group of it."""
    documentation = parse_docstring(inspect.getdoc(source) or "")
    help_of = {each.arg_name.split()[-1]: each.description or "" for each in documentation.params}
    parameter, hint = inspect.signature(source).parameters[name], get_type_hints(source)[name]
    item = _item_type(hint)
    option = parameter.kind is parameter.KEYWORD_ONLY or isinstance(source, type)
    kind: dict[str, Any] = {"type": hint} if item is None else {"type": item, "nargs": "+"}
    if parameter.default is not parameter.empty:
        kind["default"] = parameter.default
        if not option:
            kind["nargs"] = "?" if item is None else "*"
    elif option:
        kind["required"] = True
    parser.add_argument(f"--{name}" if option else name, help=help_of.get(name, ""), **kind)


class HelpFormatter(DefaultHelpFormatter):
    """Says of an option what it is by its placeholder (``--out PATH``), and of its default only what is not none."""

    def _get_help_string(self, action: Action) -> str:
        if action.dest == "help":
            return str(super()._get_help_string(action))
        text = action.help or ""
        if action.required and action.option_strings:
            return f"{text} (required)"
        told = not any(action.default is nothing for nothing in (None, SUPPRESS, False))
        return f"{text} (default: %(default)s)" if told and action.option_strings else text

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        hint = getattr(action, "_typehint", action.type)
        members = [member for member in get_args(hint) if member is not type(None)] if _is_union(hint) else [hint]
        if members == [bool]:
            return "{true,false}"
        if all(get_origin(member) is Literal for member in members):
            return "{" + ",".join(str(choice) for member in members for choice in get_args(member)) + "}"
        usual = str(super()._get_default_metavar_for_optional(action))
        return _PLACEHOLDERS.get(members[0], usual)


def _bundles(function: Callable[..., Any]) -> dict[str, Any]:
    """Parameters that stand for several options: the dataclasses by the parameters' names."""
    hints = get_type_hints(function)
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of all options, those in bundles included."""
    found = {name: hint for name, hint in get_type_hints(function).items() if name != "return"}
    for bundle in _bundles(function).values():
        found |= get_type_hints(bundle)
    return found


def _item_type(hint: Any) -> Any:
    """X for ``list[X]``, ``Sequence[X]`` and their union with None; None for anything else."""
    members = [member for member in get_args(hint) if member is not type(None)] if _is_union(hint) else [hint]
    listed = len(members) == 1 and get_origin(members[0]) in (list, Sequence)
    return get_args(members[0])[0] if listed else None


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _positional(function: Callable[..., Any]) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter for parameter in inspect.signature(function).parameters.values() if parameter.kind in kinds]


def _flags_spelt_out(function: Callable[..., Any], words: list[str]) -> list[str]:
    """``--quick`` alone as ``--quick=true``: jsonargparse wants a value for every bool."""
    flags = {f"--{name}" for name, hint in _hints(function).items() if hint is bool}
    return [
        f"{word}=true" if word in flags and after.lower() not in ("true", "false", "yes", "no") else word
        for word, after in pairwise([*words, ""])
    ]


def _words_of(function: Callable[..., Any], words: list[str]) -> list[str]:
    return _flags_spelt_out(function, _lists_joined(function, words))


def _lists_joined(function: Callable[..., Any], words: list[str]) -> list[str]:
    """``--config a --config b`` as ``--config a b``: of an option that is repeated, argparse keeps the last alone."""
    at_the_end = list(words)
    lists = [name for name, hint in _hints(function).items() if _item_type(hint) is not None]
    for option in [f"--{name}" for name in lists]:
        if sum(word.partition("=")[0] == option for word in words) < 2:
            continue
        values, rest, taking = [], [], False
        for word in at_the_end:
            name, equals, value = word.partition("=")
            taking = name == option or (taking and not word.startswith("--"))
            if not taking:
                rest.append(word)
            elif name != option or equals:
                values.append(value if name == option else word)
        at_the_end = [*rest, option, *values]
    return at_the_end


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    option, equals, value = word.partition("=")
    return "--" + option[2:].replace("-", "_") + equals + value
