"""`python -m stillpoint.cli`: standbyctl, where the console script is not on the path."""

from __future__ import annotations

import sys

from .standbyctl import main

if __name__ == "__main__":
    sys.exit(main())
