"""`python -m backupnode --config FILE.yaml`"""

from __future__ import annotations

import sys

from stillpoint.runtime import run_node

from .config import BackupNodeConfig
from .node import run


def main() -> int:
    return run_node("backupnode", BackupNodeConfig, run, description="Stillpoint's backup node.")


if __name__ == "__main__":
    sys.exit(main())
