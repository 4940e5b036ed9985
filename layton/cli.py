"""The one command line, ``layton``. Light: nothing heavy is imported before the command is known."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

from layton.commands import COMMANDS, Command
from layton.errors import UsageError
from layton.quiet import warnings_in_a_line
from layton.run.config_folders import config_folders
from layton.usage import innermost_reason

TRAINING = {
    "fit": "train a stage: layton fit --config RUN.yaml [--config OVERLAY.yaml] [--run_dir DIR] [--resume auto]",
    "validate": "evaluate a stage on its validation split: layton validate --config RUN.yaml --ckpt_path auto",
    "test": "evaluate a stage on its test split: layton test --config RUN.yaml --ckpt_path auto",
}
_DISTILL_HELP = (
    "distil a diffusion model: layton distill METHOD --pipeline FOLDER; `fit` on configs/distill/METHOD.yaml"
)


def main(args: Sequence[str] | None = None, *, allow: Iterable[str] = ()) -> int:
    """Run the command line.

    Args:
        args: arguments without the program's name; those of the process when None.
        allow: modules, beside this library's, torch's and lightning's, that run files may name.

    Returns:
        0 success; 1 failure, told in one line; 2 wrong usage; 128 + n when signal n ended training after a save.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = _take_flag(words, "--debug")
    allowed = [*allow, *_take_values(words, "--allow")]
    if allowed and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where modules of one's own lie; last, so that they hide no others
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0 if words else 2
    if words[0] == "--version":
        from layton import __version__

        sys.stdout.write(f"layton {__version__}\n")
        return 0
    try:
        with warnings_in_a_line():
            return _dispatch(words, allowed)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except Exception as error:  # the border of the program: every failure becomes one line
        if debug:
            raise
        return _complain(_one_line(error), 2 if isinstance(error, UsageError) else 1)


def _dispatch(words: list[str], allowed: list[str]) -> int:
    name, rest = words[0], words[1:]
    if name in TRAINING:
        return _train(name, rest, allowed)
    if name == "distill":
        return _distill(rest, allowed)
    for length in (2, 1):  # "evaluate reconstruction" before "evaluate"
        command = COMMANDS.get(" ".join(words[:length]))
        if command is not None:
            return _call(" ".join(words[:length]), command, words[length:], allowed)
    group = [full for full in COMMANDS if full.startswith(f"{name} ")]
    if group:
        wanted = ", ".join(full.split(" ", 1)[1] for full in group)
        if rest and rest[0] in ("-h", "--help"):
            sys.stdout.write("".join(f"layton {full:<28}{COMMANDS[full].help}\n" for full in group))
            return 0
        raise UsageError(f"layton {name} needs one of: {wanted}")
    raise UsageError(f"unknown command {name!r}; `layton --help` lists them")


def _train(name: str, rest: list[str], allowed: list[str]) -> int:
    if rest in (["-h"], ["--help"]):
        from layton.run.short_options import short_help

        sys.stdout.write(short_help(name))
        return 0
    from layton.run.training import run

    if rest == ["--help", "all"]:
        rest = rest[:1]
    return run(name, rest, allow=allowed)


def _distill(rest: list[str], allowed: list[str]) -> int:
    from layton.commands.distill import HELP, check_words, fit_arguments

    files = {path.stem: path for folder in reversed(config_folders()) for path in (folder / "distill").glob("*.yaml")}
    methods = ", ".join(sorted(files)) or "none"
    if rest and rest[-1] in ("-h", "--help"):
        sys.stdout.write(HELP.format(methods=methods))
        return 0
    if not rest or rest[0].startswith("-"):
        raise UsageError(f"layton distill needs a method; there are {methods}")
    if rest[0] not in files:
        raise UsageError(f"no method {rest[0]!r}; there are {methods}")
    check_words(files[rest[0]], rest[1:])
    return _train("fit", fit_arguments(files[rest[0]], rest[1:]), allowed)


def _call(name: str, command: Command, rest: list[str], allowed: list[str]) -> int:
    from layton.commands.calling import call_function

    return call_function(name, command, [*rest, "--allow", *allowed] if allowed else rest)


def _help() -> str:
    rows = {**TRAINING, "distill": _DISTILL_HELP, **{name: row.help for name, row in COMMANDS.items()}}
    lines = [f"  {name:<28}{text}" for name, text in sorted(rows.items())]
    return (
        "usage: layton COMMAND [ARGUMENTS] [--debug]\n\n"
        "An image becomes 256 tokens and comes back; text becomes an image.\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\n`layton COMMAND --help` explains one; - and _ are the same in options.\n"
        "Exit status: 0 success, 1 failure, 2 wrong usage. "
        "--debug shows where a failure came from; --allow MODULE lets run files and saved parts name your modules.\n"
    )


def _take_flag(words: list[str], flag: str) -> bool:
    found = flag in words
    words[:] = [word for word in words if word != flag]
    return found


def _take_values(words: list[str], option: str) -> list[str]:
    values = []
    for place, word in reversed(list(enumerate(words))):
        if word == option:
            values += words[place + 1 : place + 2]
            del words[place : place + 2]
        elif word.startswith(f"{option}="):
            values.append(word.partition("=")[2])
            del words[place]
    return values[::-1]


def _one_line(error: BaseException) -> str:
    text = str(error)
    if text.startswith("Caught ") and "\nOriginal Traceback" in text:  # a loader's worker sends all of it as a message
        text = text.rstrip().rsplit("\n", 1)[-1].partition(": ")[2] or text
    text = " ".join(innermost_reason(text).split()) or type(error).__name__
    return text if isinstance(error, ValueError | RuntimeError | OSError) else f"{type(error).__name__}: {text}"


def _complain(text: str, status: int) -> int:
    sys.stderr.write(f"layton: {text}{os.linesep}")
    return status
