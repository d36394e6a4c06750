"""`python -m primary --config FILE.yaml`: a data node whose place it is to be the primary."""

from __future__ import annotations

import sys

from stillpoint.runtime import run_node

from .daemon import PrimaryDaemonConfig, run_primary


def main() -> int:
    return run_node(
        "primary",
        PrimaryDaemonConfig,
        run_primary,
        description="Export block volumes over NBD and mirror every write to a standby.",
    )


if __name__ == "__main__":
    sys.exit(main())
