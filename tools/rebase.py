"""Gives a tokenizer folder a text-to-image model that went on learning by adaptors; its decoders stay as they are.

python tools/rebase.py --tokenizer my_tokenizer --ldm runs/text_to_image_placed/export --out my_tokenizer_2

The run must have begun with the folder's own ``ldm/`` (``lora`` and ``pretrained`` in its run file). Weights are stored
in fp16, as ``tools/assemble.py`` does. What belongs to the old model, its students and the card, is left out.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from assemble import copy_pipeline

from layton.decoders.rebase import rebase_all
from layton.tokenizer import LDM_FOLDER

_OF_THE_OLD = ("few_step", "one_step_tasks", "README.md")


def main() -> None:
    """Rebase from the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder with decoders and ldm/")
    parser.add_argument("--ldm", type=Path, required=True, help="export of the text-to-image run, with lora/")
    parser.add_argument("--out", type=Path, required=True, help="tokenizer folder to write; must not exist")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists")
    part = arguments.out.with_name(f".{arguments.out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        shutil.copytree(arguments.tokenizer, part, ignore=shutil.ignore_patterns(*_OF_THE_OLD))
        copy_pipeline(arguments.ldm, part / LDM_FOLDER)
        rebase_all(part / "decoders", arguments.tokenizer / LDM_FOLDER / "unet", arguments.ldm, rounding=torch.float16)
    except (OSError, ValueError) as error:
        shutil.rmtree(part, ignore_errors=True)
        parser.exit(1, f"{error}\n")
    part.rename(arguments.out)
    left = [name for name in _OF_THE_OLD if (arguments.tokenizer / name).exists()]
    print(f"{arguments.out}" + (f"; left out, as it was of the old model: {', '.join(left)}" if left else ""))


if __name__ == "__main__":
    main()
