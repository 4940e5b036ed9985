"""``python -m layton``: the same as the ``layton`` program."""

from __future__ import annotations

import sys

from layton.cli import main

if __name__ == "__main__":
    sys.exit(main())
