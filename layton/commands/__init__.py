"""The commands of ``layton`` beside training: a table, one row per command.

To add one, write a typed function in a module of this package and add a row. The function's docstring is the help
text. Its positional parameters become positional arguments, its keyword-only parameters become options (``num_images``
is ``--num-images``); a ``list[X]`` takes one or more values. A name of two words is a command in a group. It returns
None or an exit status; what it raises is told in one line (`layton.errors.UsageError`: exit 2, anything else: exit 1).
"""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """Where a command lives: imported only when it runs."""

    module: str
    function: str
    help: str


COMMANDS: dict[str, Command] = {
    "export": Command("layton.commands.export", "export", "a training checkpoint's averaged weights as model folders"),
    "info": Command("layton.commands.info", "info", "versions, devices, embedded models; with a run file, its sizes"),
}
