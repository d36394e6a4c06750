"""What noting the hot extents costs: mirrored 4 KiB random writes with the log and without it.

    python -m benchmarks.write_intent [--rounds N] [--seconds S]

Two clusters on this machine, their files on tmpfs, alike but for `limits: hot_extents: 0` in one of them. The working
set of 1 GiB is as much as stays hot. Besides the rate, the primary's own processor time for each write is compared: it
depends less on what else the machine does. The last rows write all over a volume of 4 GiB, where most writes miss.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import yaml

from .mirror import standbyctl
from .support import BenchmarkError, find_tools, fio, markdown_table, medians, memory_folder, take_turns

HOT_SIZE = 1 << 30
WIDE_SIZE = 4 << 30


@contextlib.contextmanager
def cluster(folder: Path, *, hot_extents: int) -> Iterator[tuple[str, int]]:
    """A cluster with the volumes `hot` and `wide`; yields the NBD address and the primary's process."""
    standbyctl("local", "up", "--dir", str(folder))
    try:
        standbyctl("local", "down", "--dir", str(folder))
        file = folder / "primary.yaml"
        document = yaml.safe_load(file.read_text())
        document.setdefault("limits", {})["hot_extents"] = hot_extents
        file.write_text(yaml.safe_dump(document))
        volumes = ["--volume", f"hot:{HOT_SIZE}", "--volume", f"wide:{WIDE_SIZE}"]
        standbyctl("local", "up", "--dir", str(folder), *volumes)
        primary = standbyctl("local", "env", "--dir", str(folder))["primary"]
        fio(f"{primary['nbd']}/hot", mode="write", block_size="1m", depth=8, seconds=4.0, size=str(HOT_SIZE))
        yield primary["nbd"], primary["pid"]
    finally:
        standbyctl("local", "down", "--dir", str(folder))


def processor_seconds(pid: int) -> float:
    """User and system time that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(rounds: int, seconds: float) -> str:
    rows = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(memory_folder())
        clusters = {
            "with the log": stack.enter_context(cluster(folder / "with", hot_extents=256)),
            "without": stack.enter_context(cluster(folder / "without", hot_extents=0)),
        }
        for volume, size in (("hot", HOT_SIZE), ("wide", WIDE_SIZE)):
            for depth in (1, 32):
                costs: dict[str, list[float]] = {name: [] for name in clusters}

                def contestant(name: str, volume: str = volume, size: int = size, depth: int = depth) -> float:
                    address, pid = clusters[name]
                    before = processor_seconds(pid)
                    result = fio(f"{address}/{volume}", mode="randwrite", depth=depth, seconds=seconds, size=str(size))
                    # Its ramp time counts here and not in the rate.
                    count = result.iops * (seconds + 0.5)
                    costs[name].append((processor_seconds(pid) - before) / count * 1e6)  # noqa: B023 - used at once
                    return result.iops

                turns: dict[str, Callable[[], float]] = {name: partial(contestant, name) for name in clusters}
                rates = medians(take_turns(turns, rounds=rounds, on_round=lambda line: print(line, file=sys.stderr)))
                rows.append(_row(f"{volume}, QD{depth}: writes a second", rates))
                rows.append(_row(f"{volume}, QD{depth}: primary's processor time, µs a write", medians(costs)))
    return markdown_table(["", *clusters, "with / without"], rows)


def _row(title: str, values: dict[str, float]) -> list[str]:
    with_log, without = values["with the log"], values["without"]
    return [title, f"{with_log:,.1f}", f"{without:,.1f}", f"{with_log / without:.3f}"]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.write_intent", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each fio run")
    options = parser.parse_args()
    try:
        find_tools("fio")
        print(run(options.rounds, options.seconds))
    except BenchmarkError as error:
        print(f"benchmarks.write_intent: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
