"""Where the embedded weights lie, and how a name becomes a folder."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from layton.errors import UsageError
from layton.folder import told_of_runs

ASSETS = Path(__file__).parent / "assets"
# of a part or a tokenizer; of a diffusers pipeline; of a student in few steps
INDEX_FILES = ("config.json", "model_index.json", "few_step.json")
# in a tokenizer: its latent diffusion model, and the decoders that others begin with and listen to
LDM, DIFFUSION, LIGHT = "ldm", "decoders/diffusion", "decoders/light"


def resolve(name: Path | str, *, part: str = "") -> Path:
    """The folder that ``name`` means.

    A path that exists wins, or the part in it, if there is one; otherwise the name of an embedded model, of which
    ``part`` is a sub-folder; or a name on the Hugging Face hub, of which nothing is downloaded: only what lies in its
    local cache is found.

    Args:
        name: The part's own folder, that of a tokenizer with the part in it, or the name of an embedded model such as
            ``"mini"``.
        part: Sub-folder of the model, e.g. ``"decoders/light"``.

    Raises:
        ValueError: If neither exists.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / part if (folder / part).is_dir() else folder
    embedded = ASSETS / str(name) / part
    if Path(name).name == str(name) and any((embedded / index).is_file() for index in INDEX_FILES):
        return embedded
    cached = _cached(str(name), INDEX_FILES)
    if cached is not None:
        return cached
    if folder.suffix == ".ckpt" and folder.is_file():
        raise ValueError(f"{name} is a checkpoint: `layton export {name} --out DIR` writes the parts that it holds")
    known = sorted(path.name for path in ASSETS.glob("*") if path.is_dir())
    if str(name) in known:
        raise ValueError(f"the embedded model {name} has no {part or 'weights'}")
    raise ValueError(f"{name!s} is neither a folder nor an embedded model ({', '.join(known)}){told_of_runs(folder)}")


def find_pipeline(name: Path | str) -> Path:
    """The diffusers pipeline folder that a name means.

    A path; a tokenizer's folder with one in ``ldm/``; an embedded model; or a name on the Hugging Face hub, of which
    nothing is downloaded: only what lies in its local cache is found.

    Raises:
        UsageError: There is none.
    """
    folder, index = Path(name).expanduser(), INDEX_FILES[1]
    for place in (folder, folder / LDM):
        if (place / index).is_file():
            return place
    if folder.is_dir():
        raise UsageError(f"{name} is no diffusers pipeline folder: it holds neither {index} nor ldm/{index}")
    try:
        found = resolve(name, part=LDM)
        if not (found / index).is_file():
            raise ValueError(f"{found} holds no {index}")
    except ValueError as error:
        raise UsageError(f"no pipeline folder at {name}, nor one of this name in the Hugging Face cache") from error
    return found


def find_autoencoder(name: Path | str) -> Path:
    """The AutoencoderKL folder that a name means: its own, or that of a pipeline or tokenizer which holds it.

    Raises:
        ValueError: There is none.
    """
    parts = f"{LDM}/vae", "vae"
    found = resolve(name, part=parts[0])
    return next((found / part for part in parts if (found / part).is_dir()), found)


def _cached(name: str, wanted: Collection[str]) -> Path | None:
    """Newest snapshot of a hub's repository in the local cache that holds one of some files."""
    if name.count("/") != 1 or name.startswith((".", "/")):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return folder if any((folder / index).is_file() for index in wanted) else None
