"""4 KiB requests over NBD, unmirrored: ours beside nbdkit's file plugin and qemu-storage-daemon.

    python -m benchmarks.nbd [--rounds N] [--seconds S]

All three serve the same kind of file, on tmpfs; fio's nbd engine is the client.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

from .support import (
    BenchmarkError,
    FioResult,
    find_tools,
    fio,
    make_file,
    markdown_table,
    medians,
    memory_folder,
    nbdkit_file,
    qemu_storage_daemon,
    stillpoint_nbd,
    take_turns,
)

FILE_SIZE = 256 << 20


@dataclass(frozen=True, slots=True)
class Measurement:
    title: str
    mode: str
    depth: int
    value: Callable[[FioResult], float]
    unit: str
    block_size: str = "4k"


MEASUREMENTS = (
    Measurement("random read, QD32", "randread", 32, lambda result: result.iops, "IOPS"),
    Measurement("random write, QD32", "randwrite", 32, lambda result: result.iops, "IOPS"),
    Measurement("random read, QD1, p50", "randread", 1, lambda result: result.p50_us, "µs"),
    Measurement("random write, QD1, p50", "randwrite", 1, lambda result: result.p50_us, "µs"),
    Measurement("read of 1 MiB, QD8", "read", 8, lambda result: result.bytes_per_second / 1e6, "MB/s", "1m"),
    Measurement("write of 1 MiB, QD8", "write", 8, lambda result: result.bytes_per_second / 1e6, "MB/s", "1m"),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nbd", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each fio run")
    parser.add_argument("--only", default="", help="measurements whose title contains this")
    options = parser.parse_args()
    try:
        find_tools("fio", "nbdkit", "qemu-storage-daemon")
        print(run(options.rounds, options.seconds, options.only))
    except BenchmarkError as error:
        print(f"benchmarks.nbd: {error}", file=sys.stderr)
        return 1
    return 0


def run(rounds: int, seconds: float, only: str) -> str:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(memory_folder())
        servers = {"stillpoint": stillpoint_nbd, "nbdkit file": nbdkit_file, "qemu-storage-daemon": qemu_storage_daemon}
        uris = {
            name: stack.enter_context(server(make_file(folder / name.replace(" ", "-"), FILE_SIZE)))
            for name, server in servers.items()
        }
        chosen = [measurement for measurement in MEASUREMENTS if only in measurement.title]
        rows = [_measure(measurement, uris, rounds, seconds) for measurement in chosen]
    names = list(servers)
    return markdown_table(["", *names, "ours / nbdkit", "ours / qemu"], rows)


def _measure(measurement: Measurement, uris: dict[str, str], rounds: int, seconds: float) -> list[str]:
    def contestant(uri: str) -> Callable[[], float]:
        return lambda: measurement.value(
            fio(
                uri,
                mode=measurement.mode,
                depth=measurement.depth,
                block_size=measurement.block_size,
                seconds=seconds,
                size=str(FILE_SIZE),
            )
        )

    results = take_turns(
        {name: contestant(uri) for name, uri in uris.items()},
        rounds=rounds,
        on_round=lambda line: print(f"{measurement.title}: {line}", file=sys.stderr),
    )
    ours, *others = medians(results).values()
    figures = [f"{value:,.0f} {measurement.unit}" for value in (ours, *others)]
    return [measurement.title, *figures, *(f"{ours / other:.2f}" for other in others)]


if __name__ == "__main__":
    sys.exit(main())
