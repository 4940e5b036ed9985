"""``layton data``: is a dataset readable, is a token dataset whole?"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from generation.commands.tokenize import SCENES, SplitOrAll, open_source
from layton.commands.calling import progress


def verify(folder: Path) -> int:
    """Check every byte, count and code of a token dataset; every fault is named, exit status 1 if there is one.

    Args:
        folder: what `layton tokenize` wrote.
    """
    from generation import token_shards

    faults = token_shards.verify(folder)
    for fault in faults:
        sys.stderr.write(f"layton: {fault}\n")
    if faults:
        return 1
    counts = token_shards.read_json(folder / token_shards.MANIFEST_NAME)["counts"]
    sys.stdout.write(f"{folder}: whole; {counts['samples']} samples, {counts['skipped']} passed over\n")
    return 0


def check(sources: list[str], *, split: SplitOrAll = "all", repeated_keys: bool = False) -> int:
    """Decode every image of a dataset; every broken one is named, exit status 1 if there is one.

    Args:
        sources: tar shards (files or patterns), or one folder of shards or of images.
        split: train, validation, test, or all.
        repeated_keys: accept shards that use the same keys.
    """
    from layton.data.images import ImageError
    from layton.data.sources import StoredSource
    from layton.errors import UsageError

    if list(sources) == [SCENES]:
        raise UsageError("scenes are rendered, there is nothing to check: name shards or a folder of images")
    source, name = open_source(
        sources, split=split, count=None, offset=0, size=256, chinese=0.0, reworded=0.0, repeated_keys=repeated_keys
    )
    if not isinstance(source, StoredSource):
        raise UsageError(f"{name} holds no stored images")
    faults, found = list(source.bad.reasons), Counter[str]()
    with progress(len(source), "check") as bar:
        for index in range(len(source)):
            try:
                stored = source.load(index)
                found["with a caption" if stored.caption else "without a caption"] += 1
            except ImageError as error:
                faults.append(str(error))
            bar.update(1)
    for fault in faults:
        sys.stderr.write(f"layton: {fault}\n")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
    sys.stdout.write(f"{name}: {kinds or 'no readable image'}, {len(faults)} broken or missing\n")
    return int(bool(faults))
