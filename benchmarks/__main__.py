"""Every benchmark, one after the other: `python -m benchmarks [NAME …]`. Tables on stdout, progress on stderr."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys

ALL = (
    "channel",
    "nbd",
    "mirror",
    "tls",
    "snapshots",
    "association",
    "preserve",
    "streams",
    "memory",
    "backup",
    "backup_peers",
    "backup_index",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)}; all of them if none is named")
    names = parser.parse_args().names or ALL
    unknown = [name for name in names if importlib.util.find_spec(f"benchmarks.{name}") is None]
    if unknown:
        print(f"benchmarks: there is no benchmark {unknown[0]!r}; there are {', '.join(ALL)}", file=sys.stderr)
        return 2
    failed = False
    for name in names:
        print(f"\n## {name}\n", flush=True)
        failed |= subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
