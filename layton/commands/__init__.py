"""The commands of ``layton`` beside training: a table, one row per command.

To add one, write a typed function in a module of this package and add a row. The function's docstring is the help
text. Its positional parameters become positional arguments, its keyword-only parameters become options (``batch_size``
is ``--batch-size``); a ``list[X]`` takes one or more values. A name of two words is a command in a group. It returns
None or an exit status; what it raises is told in one line (`layton.errors.UsageError`: exit 2, anything else: exit 1).
Commands of the generator stand here by name only: `layton` itself never imports `generation`.
"""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """Where a command lives: imported only when it runs."""

    module: str
    function: str
    help: str
    shared: bool = False  # whether several processes, begun by torchrun, can do it together


COMMANDS: dict[str, Command] = {
    "app": Command("generation.commands.app", "app", "a local web page: pictures to tokens and back, and from text"),
    "bench": Command("generation.commands.bench", "bench", "speeds of decoding and distillation, as ratios"),
    "convert": Command("layton.commands.convert", "convert", "a released checkpoint into a tokenizer folder"),
    "convert gpt": Command("generation.commands.convert", "convert_gpt", "a released GPT into a model folder"),
    "convert lora": Command(
        "layton.commands.convert", "convert_lora", "TLCM's released LoRAs into a distilled student"
    ),
    "data check": Command("generation.commands.data", "check", "is every image of a dataset readable?"),
    "data decode": Command("generation.commands.data", "decode", "what do the tokens of a dataset show?"),
    "data export": Command("generation.commands.data", "export", "the tokens of a dataset as Parquet files"),
    "data verify": Command("generation.commands.data", "verify", "is a token dataset whole?"),
    "decode": Command("layton.commands.encode", "decode", "a file of codes to image files"),
    "demo": Command("layton.commands.demo", "demo", "what the embedded weights can do, in under two minutes"),
    "edit": Command("layton.commands.edit", "edit", "one step changes a picture, fills a hole in it, or enlarges it"),
    "encode": Command("layton.commands.encode", "encode", "image files to a file of codes, 256 for each"),
    "evaluate applications": Command(
        "generation.commands.evaluate_applications",
        "evaluate_applications",
        "editing, inpainting and super-resolution in one step, scored on scenes",
    ),
    "evaluate codebook": Command(
        "layton.commands.evaluate_codebook", "evaluate_codebook", "how much of the codebook images use", shared=True
    ),
    "evaluate decoders": Command(
        "layton.commands.evaluate_decoders",
        "evaluate_decoders",
        "steps, quality and speed of all decoders, one table",
        shared=True,
    ),
    "evaluate geneval": Command(
        "generation.commands.evaluate_geneval",
        "evaluate_geneval",
        "images in GenEval's layout for its scorer, or the scorer's results summed up",
        shared=True,
    ),
    "evaluate generation": Command(
        "generation.commands.evaluate_generation",
        "evaluate_generation",
        "generated images against real ones: FD-effnet, CLIP score, with protocol",
        shared=True,
    ),
    "evaluate next_codes": Command(
        "generation.commands.evaluate_next_codes",
        "evaluate_next_codes",
        "how well a generator foresees a token dataset, and what smaller weights change",
    ),
    "evaluate reconstruction": Command(
        "layton.commands.evaluate_reconstruction",
        "evaluate_reconstruction",
        "every measure of a tokenizer or an autoencoder, with references and protocol",
        shared=True,
    ),
    "evaluate sceneval": Command(
        "generation.commands.evaluate_sceneval",
        "evaluate_sceneval",
        "does a text-to-image model draw what it is told?",
        shared=True,
    ),
    "export": Command("layton.commands.export", "export", "a training checkpoint's averaged weights as model folders"),
    "generate": Command("generation.commands.generate", "generate", "text to image with LaytonGen"),
    "info": Command("layton.commands.info", "info", "versions, devices, embedded models; with a run file, its sizes"),
    "pairs": Command(
        "layton.commands.pairs", "pairs", "noise and what a teacher makes of it, for reflow and one-step methods"
    ),
    "reconstruct": Command("layton.commands.reconstruct", "reconstruct", "original and reconstruction side by side"),
    "reproduce": Command("layton.commands.reproduce", "reproduce", "one paper's headline claim, measured again"),
    "rollouts": Command(
        "generation.commands.rollouts", "rollouts", "what a LaytonGen draws of captions, right or wrong"
    ),
    "serve": Command("generation.commands.serve", "serve", "pictures from text, and to tokens and back, over HTTP"),
    "tokenize": Command("generation.commands.tokenize", "tokenize", "a dataset to token shards; run again, it resumes"),
}
