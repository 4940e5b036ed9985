"""Gives the adaptors of a decoder or of a distilled student a smaller rank, by singular values.

python tools/reduce_rank.py runs/hipa/export/decoder --rank 4 --out runs/hipa_small

The folder is what `layton fit` exported: of a code decoder that differs from another one by low-rank adaptors, or of a
student (``few_step.json``). Measure what comes out: it is another model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from distill.low_rank import reduce_rank
from layton.distillation.distilled import FEW_STEP_NAME, LORA_NAME, lora_config, save_lora_tensors
from layton.folder import CONFIG_NAME, WEIGHTS_NAME, load_tensors, save_tensors
from layton.staging import staged


def main() -> None:
    """Reduce what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="exported decoder or student")
    parser.add_argument("--rank", type=int, required=True, help="the new rank")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists")
    is_student = (arguments.folder / FEW_STEP_NAME).is_file()
    try:
        with staged(arguments.out) as part:
            (reduce_student if is_student else reduce_decoder)(arguments.folder, part, arguments.rank)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


def reduce_decoder(folder: Path, out: Path, rank: int) -> None:
    """Write a decoder's folder anew with adaptors of a smaller rank.

    Raises:
        ValueError: It holds no adaptors, or of a smaller rank already.
    """
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    lora = (config.get("difference") or {}).get("lora") or {}
    _require_larger(lora.get("rank"), rank, folder)
    lora |= {"alpha": lora["alpha"] * rank / lora["rank"], "rank": rank}
    save_tensors(out / WEIGHTS_NAME, reduce_rank(load_tensors(folder / WEIGHTS_NAME), rank))
    (out / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def reduce_student(folder: Path, out: Path, rank: int) -> None:
    """Write a student's folder anew with a LoRA of a smaller rank.

    Raises:
        ValueError: It is no LoRA of a network, or of a smaller rank already.
    """
    if not (folder / LORA_NAME).is_file():
        raise ValueError(f"{folder} holds no {LORA_NAME}: this student is a whole network")
    part, config = lora_config(folder / LORA_NAME)
    _require_larger(config["r"], rank, folder)
    tensors = reduce_rank(load_tensors(folder / LORA_NAME), rank)
    config |= {"lora_alpha": config["lora_alpha"] * rank / config["r"], "r": rank}
    own = {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()}
    save_lora_tensors(own, config, out, part="unet" if part == "unet" else "transformer")
    shutil.copyfile(folder / FEW_STEP_NAME, out / FEW_STEP_NAME)


def _require_larger(found: int | None, rank: int, folder: Path) -> None:
    if found is None or not 1 <= rank < found:
        raise ValueError(f"{folder} has adaptors of rank {found}: nothing to reduce to {rank}")


if __name__ == "__main__":
    main()
