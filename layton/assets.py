"""Where the embedded weights lie, and how a name becomes a folder."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
INTERIM = ASSETS / "interim"  # weights of trainings that go on
# of a part or a tokenizer; of a diffusers pipeline; of a student in few steps
INDEX_FILES = ("config.json", "model_index.json", "few_step.json")


def resolve(name: Path | str, *, part: str = "") -> Path:
    """The folder that ``name`` means.

    A path that exists wins; otherwise the name of an embedded model, of which ``part`` is a sub-folder. Finished
    weights win over interim ones (those of a training that goes on).

    Args:
        name: A folder, or the name of an embedded model such as ``"mini"``.
        part: Sub-folder of the embedded model, e.g. ``"perceptual"``.

    Raises:
        ValueError: If neither exists.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    for root in (ASSETS, INTERIM):
        embedded = root / str(name) / part
        if Path(name).name == str(name) and any((embedded / index).is_file() for index in INDEX_FILES):
            return embedded
    known = sorted(path.name for path in ASSETS.glob("*") if path.is_dir() and path.name != "interim")
    raise ValueError(f"{name!s} is neither a folder nor an embedded model with {part or 'weights'} (known: {known})")
