"""`python -m stillpoint.failover --config FILE.yaml`: the failover agent beside a data node."""

from __future__ import annotations

import sys

from stillpoint.runtime import run_node

from .agent import serve
from .config import FailoverConfig


def main() -> int:
    return run_node(
        "failover",
        FailoverConfig,
        serve,
        description="Keep a data node's lease at etcd, promote it when it is due, and kill it when it does not stop.",
    )


if __name__ == "__main__":
    sys.exit(main())
