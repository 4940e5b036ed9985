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
    "convert": Command("layton.commands.convert", "convert", "a released checkpoint into a tokenizer folder"),
    "decode": Command("layton.commands.encode", "decode", "a file of codes to image files"),
    "demo": Command("layton.commands.demo", "demo", "what the embedded weights can do, in under two minutes"),
    "encode": Command("layton.commands.encode", "encode", "image files to a file of codes, 256 for each"),
    "evaluate reconstruction": Command(
        "layton.commands.evaluate_reconstruction",
        "evaluate_reconstruction",
        "every measure of a tokenizer or an autoencoder, with references and protocol",
    ),
    "evaluate sceneval": Command(
        "layton.commands.evaluate_sceneval", "evaluate_sceneval", "does a text-to-image pipeline draw what it is told?"
    ),
    "export": Command("layton.commands.export", "export", "a training checkpoint's averaged weights as model folders"),
    "info": Command("layton.commands.info", "info", "versions, devices, embedded models; with a run file, its sizes"),
    "reconstruct": Command("layton.commands.reconstruct", "reconstruct", "original and reconstruction side by side"),
}
