"""`python -m standby --config FILE.yaml`: a data node whose place it is to be the standby."""

from __future__ import annotations

import sys

from primary.daemon import StandbyDaemonConfig, run_standby
from stillpoint.runtime import run_node


def main() -> int:
    return run_node(
        "standby",
        StandbyDaemonConfig,
        run_standby,
        description="Hold mirrors of volumes, take and export snapshots of them, and serve them once promoted.",
    )


if __name__ == "__main__":
    sys.exit(main())
