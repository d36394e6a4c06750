"""What snapshots cost the writer: mirrored 4 KiB random writes, QD32, with none, one and 64 snapshots alive.

    python -m benchmarks.preserve [--rounds N] [--block-size SIZE]

Every run writes 4 KiB into each block of a full volume of 1 GiB once, in random order. "First touch": each of these
writes makes the standby preserve a block; "all touched": none does any more. What is compared are runs of one round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from stillpoint.config import parse_size

from .mirror import standbyctl
from .support import BenchmarkError, find_tools, fio, markdown_table, memory_folder

SIZE = 1 << 30
MANY = 64


def touch_every_block(uri: str, block_size: int, folder: Path) -> float:
    """IOPS of one 4 KiB write into each block."""
    command = [
        "fio", "--name=touch", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", f"--ba={block_size}",
        f"--size={SIZE}", f"--number_ios={SIZE // block_size}", "--iodepth=32", "--randrepeat=0",
        "--output-format=json",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300, check=False)
    if run.returncode != 0:
        raise BenchmarkError(f"fio failed on {uri}: {run.stderr.strip()}")
    iops: float = json.loads(run.stdout[run.stdout.index("{") :])["jobs"][0]["write"]["iops"]
    return iops


def one_round(uri: str, cluster: str, block_size: int, folder: Path) -> dict[str, float]:
    taken: list[str] = []

    def snapshot(count: int) -> None:
        for _ in range(count):
            taken.append(f"s{len(taken)}")
            standbyctl("--cluster", cluster, "snapshot", "create", "bench", "--name", taken[-1])

    def touch() -> float:
        return touch_every_block(uri, block_size, folder)

    result = {"no snapshot": touch()}
    snapshot(1)
    result["one, first touch"] = touch()
    result["one, all touched"] = touch()
    snapshot(MANY - 1)
    result[f"{MANY}, first touch"] = touch()
    result[f"{MANY}, all touched"] = touch()
    for name in taken:
        standbyctl("--cluster", cluster, "snapshot", "delete", f"bench@{name}", "--yes")
    return result


def run(rounds: int, block_size: int) -> str:
    with memory_folder() as folder:
        standbyctl("local", "up", "--dir", str(folder))
        try:
            environment = standbyctl("local", "env", "--dir", str(folder))
            cluster, uri = environment["cluster"], f"{environment['primary']['nbd']}/bench"
            standbyctl(
                "--cluster", cluster, "volume", "create", "bench", "--size", str(SIZE), "--block-size", str(block_size)
            )
            fio(uri, mode="write", block_size="1m", depth=8, seconds=4.0, size=str(SIZE))
            results = []
            for number in range(rounds):
                results.append(one_round(uri, cluster, block_size, folder))
                print(f"round {number + 1} of {rounds}: {results[-1]}", file=sys.stderr)
        finally:
            standbyctl("local", "down", "--dir", str(folder))
    rows = []
    for name in results[0]:
        iops = statistics.median(each[name] for each in results)
        ratio = statistics.median(each[name] / each["no snapshot"] for each in results)
        rows.append([name, f"{iops:,.0f} IOPS", f"{ratio:.2f}"])
    return markdown_table([f"snapshots alive, blocks of {block_size >> 10} KiB", "", "to no snapshot"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preserve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block-size", type=parse_size, default=64 << 10)
    options = parser.parse_args()
    try:
        find_tools("fio")
        print(run(options.rounds, options.block_size))
    except (BenchmarkError, subprocess.SubprocessError) as error:
        print(f"benchmarks.preserve: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
