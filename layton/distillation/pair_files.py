"""Files of a set of pairs: parts that are there or not, and one plan that says what they are made by."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layton.data.cache import CacheMismatchError, Fingerprint, differing, require_same
from layton.folder import write_atomically, write_text

PLAN_NAME, CACHE_NAME = "plan.json", "cache.json"


def write_part(path: Path, made: tuple[dict[str, Tensor], dict[str, list[str]]]) -> None:
    """Write one part atomically: tensors (n, ...), and ``key`` and ``caption`` of each pair."""
    tensors, texts = made
    # one entry only: safetensors writes several in random order, and a part is to be the same bytes every time
    metadata = {"texts": json.dumps(texts, ensure_ascii=False)}
    write_atomically(path, lambda part: save_file(tensors, part, metadata=metadata))


def claim_folder(root: Path, fingerprint: Fingerprint) -> None:
    """Write down in an empty folder what its parts are made by, or check it in one that was begun.

    Raises:
        CacheMismatchError: The folder was begun with something else, or holds parts and does not say what made them.
    """
    path = root / PLAN_NAME
    if not path.is_file():
        if any(root.glob("part-*.safetensors")):
            raise CacheMismatchError(f"{root} holds parts of a cache, and no {PLAN_NAME} that says what made them")
        write_text(path, json.dumps(dict(fingerprint), indent=1, sort_keys=True))
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    require_same(root, stored, fingerprint)


def folder_for(root: Path, fingerprint: Fingerprint) -> Path:
    """``root``, unless it holds something else than is wanted: then the folder beside it that is named by what is."""
    for name in (CACHE_NAME, PLAN_NAME):
        if (root / name).is_file():
            found = json.loads((root / name).read_text(encoding="utf-8"))
            if found.get("fingerprint", found) == dict(fingerprint):
                return root
            text = json.dumps(dict(fingerprint), sort_keys=True)
            beside = root.with_name(f"{root.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")
            differs = ", ".join(differing(found.get("fingerprint", found), fingerprint))
            sys.stderr.write(f"layton: {root} holds other pairs ({differs}): {beside} is for these\n")
            return beside
    return root


def is_there(path: Path, count: int) -> bool:
    """Whether a part is finished.

    Raises:
        ValueError: It cannot be read, or holds another number of pairs.
    """
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            found = len(json.loads((file.metadata() or {})["texts"])["key"])
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged part ({error}); delete it and run again") from error
    if found != count:
        raise ValueError(f"{path} holds {found} pairs instead of {count}; delete it and run again")
    return True
