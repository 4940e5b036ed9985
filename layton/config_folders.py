"""Where the committed run files are."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def config_folders() -> tuple[Path, ...]:
    """``configs`` here, beside the packages (a checkout), and among what was installed; not all of them need exist."""
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    installed = (Path(sysconfig.get_path("data", scheme)) / "share" / "layton" / "configs" for scheme in schemes)
    return Path("configs"), Path(__file__).resolve().parent.parent / "configs", *installed
