"""What snapshots cost the writer: mirrored 4 KiB random writes, QD32, with none, one and 64 snapshots alive.

    python -m benchmarks.preserve [--rounds N] [--block-size SIZE] [--alone]

Every pass writes 4 KiB into each block of a full volume exactly once, in random order, and ends with a flush, so that
nothing a snapshot costs is left for later. "First touch": every write makes the standby preserve a block; "all
touched": none does any more. Beside it qemu's filter copy-before-write, which can keep one picture: in the second
daemon of a blockdev-mirror, as our standby keeps ours, and in a daemon that mirrors nothing. What is compared are
passes of one round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillpoint.config import Address, parse_size
from stillpoint.wire.channel import open_channel
from stillpoint.wire.v1 import standby_pb2, standby_pb2_grpc

from .mirror import qemu_pair, standbyctl
from .support import BenchmarkError, find_tools, fio, make_file, markdown_table, memory_folder, qemu_storage_daemon

SIZE = 1 << 30
MANY = 64
_LONG = 4  # passes where one would be over too soon
_COLUMNS = ("no snapshot", "one, first touch", "one, all touched", f"{MANY}, first touch", f"{MANY}, all touched")


@dataclass(frozen=True, slots=True)
class Pass:
    """iops: flush included. cpu_us: processor time of the standby for each write, 0 when it was not looked at."""

    iops: float
    cpu_us: float = 0.0


class Toucher:
    """Runs fio over lists of writes made beforehand: fio's own random offsets do not meet every block."""

    def __init__(self, folder: Path, block_size: int) -> None:
        self._folder = folder
        self._blocks = list(range(SIZE // block_size))
        self._block_size = block_size

    def touch(self, uri: str, *, passes: int = 1, pid: int | None = None) -> Pass:
        """pid: of the process whose processor time is of interest."""
        lines = ["fio version 2 iolog", "touch.0.0 add", "touch.0.0 open"]
        for _ in range(passes):
            random.shuffle(self._blocks)
            lines += [f"touch.0.0 write {block * self._block_size} 4096" for block in self._blocks]
        log = self._folder / "writes.log"
        log.write_text("\n".join([*lines, "touch.0.0 close", ""]))
        command = [
            "fio", "--name=touch", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", f"--size={SIZE}",
            f"--read_iolog={log}", "--iodepth=32", "--end_fsync=1", "--output-format=json",
        ]  # fmt: skip
        before = _processor_ns(pid)
        run = subprocess.run(command, capture_output=True, text=True, cwd=self._folder, timeout=300, check=False)
        if run.returncode != 0:
            raise BenchmarkError(f"fio failed on {uri}: {run.stderr.strip()}")
        written = json.loads(run.stdout[run.stdout.index("{") :])["jobs"][0]["write"]
        if written["total_ios"] != passes * len(self._blocks):
            raise BenchmarkError(f"fio wrote {written['total_ios']} blocks, not all of them")
        return Pass(written["iops"], (_processor_ns(pid) - before) / 1000 / written["total_ios"])


def _processor_ns(pid: int | None) -> int:
    """Of all threads that are alive."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat") if pid is not None else ()
    return sum(int(task.read_text().split()[0]) for task in tasks)


class Stillpoint:
    """A cluster of ours with one full volume."""

    def __init__(self, environment: dict[str, Any], toucher: Toucher) -> None:
        self._toucher = toucher
        self._uri = f"{environment['primary']['nbd']}/bench"
        self._pid: int = environment["standby"]["pid"]
        self._address = Address.parse(environment["standby"]["grpc"])

    def round(self) -> dict[str, Pass]:
        names = [f"s{number}" for number in range(MANY)]
        results = [self._touch(passes=_LONG)]
        for some in (names[:1], names[1:]):
            asyncio.run(self._create(some))
            results += [self._touch(), self._touch(passes=_LONG)]
        asyncio.run(self._delete(names))
        return dict(zip(_COLUMNS, results, strict=True))

    def _touch(self, *, passes: int = 1) -> Pass:
        return self._toucher.touch(self._uri, passes=passes, pid=self._pid)

    async def _create(self, names: list[str]) -> None:
        async with open_channel(self._address) as channel:
            stub: Any = standby_pb2_grpc.StandbyServiceStub(channel)  # type: ignore[no-untyped-call]
            for name in names:
                await stub.CreateSnapshot(standby_pb2.CreateSnapshotRequest(volumes=["bench"], name=name))

    async def _delete(self, names: list[str]) -> None:
        async with open_channel(self._address) as channel:
            stub: Any = standby_pb2_grpc.StandbyServiceStub(channel)  # type: ignore[no-untyped-call]
            for name in names:
                await stub.DeleteSnapshot(standby_pb2.DeleteSnapshotRequest(volume="bench", name=name))


@contextlib.contextmanager
def stillpoint(folder: Path, toucher: Toucher, block_size: int) -> Iterator[Stillpoint]:
    standbyctl("local", "up", "--dir", str(folder), "--insecure")  # as the qemu pair beside it
    try:
        environment = standbyctl("local", "env", "--dir", str(folder))
        arguments = ["volume", "create", "bench", "--size", str(SIZE), "--block-size", str(block_size)]
        standbyctl("--cluster", environment["cluster"], *arguments)
        uri = f"{environment['primary']['nbd']}/bench"
        fio(uri, mode="write", block_size="1m", depth=8, seconds=4.0, size=str(SIZE))
        yield Stillpoint(environment, toucher)
    finally:
        standbyctl("local", "down", "--dir", str(folder))


def qemu_round(folder: Path, toucher: Toucher, *, mirrored: bool) -> dict[str, Pass]:
    """New daemons each time: qemu's filter goes with its daemon."""
    results = []
    for preserving in (False, True):
        with tempfile.TemporaryDirectory(prefix="qemu-", dir=folder) as name:
            place = Path(name)
            kept = place / "kept" if preserving else None
            if kept is not None:
                kept.touch()
                os.truncate(kept, SIZE)
            if mirrored:
                daemon = qemu_pair(place, size=SIZE, preserve_in=kept)
            else:
                daemon = qemu_storage_daemon(make_file(place / "disk", SIZE), preserve_in=kept)
            with daemon as uri:
                results += [toucher.touch(uri) for _ in range(2 if preserving else 1)]
    return dict(zip(_COLUMNS, results, strict=False))


def run(rounds: int, block_size: int, *, alone: bool) -> str:
    ours: list[dict[str, Pass]] = []
    qemu: dict[bool, list[dict[str, Pass]]] = {} if alone else {True: [], False: []}
    with memory_folder() as folder:
        toucher = Toucher(folder, block_size)
        with stillpoint(folder / "stillpoint", toucher, block_size) as cluster:
            for number in range(rounds):
                ours.append(cluster.round())
                print(f"round {number + 1} of {rounds}: {_line(ours)}", file=sys.stderr)
                for mirrored, results in qemu.items():
                    results.append(qemu_round(folder, toucher, mirrored=mirrored))
                    print(f"  qemu{', mirrored' if mirrored else ''}: {_line(results)}", file=sys.stderr)
    rows = []
    for column in _COLUMNS:
        cpu = statistics.median(each[column].cpu_us for each in ours)
        theirs = [cell for results in qemu.values() for cell in _cells(results, column)]
        rows.append([column, *_cells(ours, column), f"{cpu:.1f} µs", *theirs])
    header = ["", "ours", "to no snapshot", "standby's CPU a write"]
    header += [cell for mirrored in qemu for cell in (f"qemu, {'' if mirrored else 'not '}mirrored", "to no snapshot")]
    many = statistics.median(each[_COLUMNS[3]].iops / each[_COLUMNS[1]].iops for each in ours)
    return (
        f"Snapshots alive, blocks of {block_size >> 10} KiB:\n\n{markdown_table(header, rows)}\n\n"
        f"First touch with {MANY} snapshots to first touch with one: {many:.2f}"
    )


def _line(results: list[dict[str, Pass]]) -> str:
    return ", ".join(f"{column} {each.iops:,.0f}" for column, each in results[-1].items())


def _cells(results: list[dict[str, Pass]], column: str) -> list[str]:
    """Medians of the column, and of what it is to no snapshot in the same round."""
    if column not in results[0]:
        return ["", ""]
    iops = statistics.median(each[column].iops for each in results)
    ratio = statistics.median(each[column].iops / each[_COLUMNS[0]].iops for each in results)
    return [f"{iops:,.0f} IOPS", f"{ratio:.2f}"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preserve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block-size", type=parse_size, default=64 << 10)
    parser.add_argument("--alone", action="store_true", help="without qemu")
    options = parser.parse_args()
    try:
        find_tools("fio", *(() if options.alone else ("qemu-storage-daemon",)))
        print(run(options.rounds, options.block_size, alone=options.alone))
    except (BenchmarkError, subprocess.SubprocessError) as error:
        print(f"benchmarks.preserve: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
