"""The memory of each node: a sparse volume of 1 TiB, eight clients that write 32 MiB at a time, a snapshot, a backup.

    python -m benchmarks.memory [--size 1TiB] [--seconds S]

Prints each process's peak, and what of it are mapped files (the maps, which the kernel may drop) and anonymous memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from stillpoint.config import format_size, parse_size

from .mirror import standbyctl
from .support import BenchmarkError, find_tools, markdown_table, peak_resident_bytes


def memory_of(pid: int) -> tuple[int, int, int]:
    """Peak of everything, and now: anonymous, file-backed (bytes)."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    anonymous, files = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return peak_resident_bytes(pid), anonymous, files


def run(size: int, seconds: float) -> str:
    with tempfile.TemporaryDirectory(prefix="stillpoint-bench-") as folder:
        standbyctl("local", "up", "--dir", folder, "--volume", f"big:{size}")
        try:
            environment = standbyctl("local", "env", "--dir", folder)
            cluster = environment["cluster"]
            standbyctl("--cluster", cluster, "snapshot", "create", "big", "--name", "before")
            subprocess.run(
                [
                    "fio", "--name=big", "--ioengine=nbd", f"--uri={environment['primary']['nbd']}/big",
                    "--rw=randwrite",
                    "--bs=32m", "--iodepth=2", "--numjobs=8", "--io_size=512m", f"--size={size}", "--time_based",
                    f"--runtime={seconds}", "--norandommap",
                ],
                check=True, stdout=subprocess.DEVNULL, cwd=folder, timeout=seconds + 120,
            )  # fmt: skip
            standbyctl("--cluster", cluster, "backup", "run", "big")
            processes = {
                "primary": environment["primary"]["pid"],
                "standby": environment["standby"]["pid"],
                "standby, export": environment["standby"]["export_pid"],
                "backup node": environment["backup"]["pid"],
            }
            rows = [[name, *(format_size(value) for value in memory_of(pid))] for name, pid in processes.items()]
        finally:
            standbyctl("local", "down", "--dir", folder)
    return markdown_table(["process", "peak resident", "anonymous at the end", "mapped files at the end"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=parse_size, default=1 << 40)
    parser.add_argument("--seconds", type=float, default=8.0)
    options = parser.parse_args()
    try:
        find_tools("fio")
        print(run(options.size, options.seconds))
    except (BenchmarkError, subprocess.SubprocessError) as error:
        print(f"benchmarks.memory: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
