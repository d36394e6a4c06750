"""What TLS costs: NBD to one server, and mirrored writes whose data link is secured, beside the same in plaintext.

    python -m benchmarks.tls [--rounds N] [--seconds S] [--only TEXT]

Files on tmpfs; fio's nbd engine is the client. It decrypts too, on the same cores, so nbdkit's file plugin with and
without TLS stands beside ours: the last column is its ratio with the same client. Needs root, because fio takes
certificates only from a home directory (`support.fio`). For the mirrored writes the clients' side is in plaintext for
both: what differs is the data link.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stillpoint.security.pki import Authority
from stillpoint.security.roles import Identity, Role

from .mirror import SIZE, stillpoint_pair
from .nbd import Measurement
from .support import (
    BenchmarkError,
    FioResult,
    accepts,
    find_tools,
    fio,
    free_port,
    make_file,
    markdown_table,
    medians,
    memory_folder,
    process,
    take_turns,
)


def _megabytes(result: FioResult) -> float:
    return result.bytes_per_second / 1e6


def _iops(result: FioResult) -> float:
    return result.iops


@dataclass(frozen=True, slots=True)
class Goal:
    """At least this part of plaintext's figure is wanted."""

    measurement: Measurement
    ratio: float


NBD = (
    Goal(Measurement("NBD read of 1 MiB, QD8", "read", 8, _megabytes, "MB/s", "1m"), 0.6),
    Goal(Measurement("NBD write of 1 MiB, QD8", "write", 8, _megabytes, "MB/s", "1m"), 0.6),
    Goal(Measurement("NBD random read of 4 KiB, QD32", "randread", 32, _iops, "IOPS"), 0.7),
    Goal(Measurement("NBD random write of 4 KiB, QD32", "randwrite", 32, _iops, "IOPS"), 0.7),
)
MIRROR = (
    Goal(Measurement("mirrored write of 1 MiB, QD8", "write", 8, _megabytes, "MB/s", "1m"), 0.6),
    Goal(Measurement("mirrored random write of 4 KiB, QD32", "randwrite", 32, _iops, "IOPS"), 0.7),
)

Run = Callable[[Measurement, float], float]


@contextlib.contextmanager
def nbd_servers(folder: Path) -> Iterator[dict[str, Run]]:
    """One plain server and one with TLS, each on a file of its own; what runs a measurement against each."""
    authority = Authority.create(folder / "ca")
    certificates = folder / "server"
    authority.issue(Identity(Role.DATA, "server"), certificates, hosts=["localhost", "127.0.0.1"])
    for name in ("cert.pem", "key.pem"):
        (certificates / f"server-{name}").symlink_to(name)  # as nbdkit calls them
    home = folder / "home"
    authority.issue(Identity(Role.CLIENT, "fio"), home / ".pki" / "libnbd")
    for entry in (folder, home / ".pki" / "libnbd"):
        entry.chmod(0o755)
    for place, folders, files in os.walk(home):
        for name in (".", *folders, *files):
            os.chown(Path(place, name), 65534, 65534)
    with contextlib.ExitStack() as stack:
        runs: dict[str, Run] = {}
        for name, tls in (("plaintext", False), ("TLS", True), ("nbdkit plaintext", False), ("nbdkit TLS", True)):
            port = free_port()
            file = str(make_file(folder / name.replace(" ", "-"), SIZE))
            if name.startswith("nbdkit"):
                command = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port)]
                command += ["--tls=require", f"--tls-certificates={certificates}", "--tls-verify-peer"] if tls else []
                command += ["file", file]
            else:
                command = [sys.executable, "-m", "stillpoint.nbd", "--port", str(port), "--file", file]
                command += ["--tls", str(certificates)] if tls else []
            stack.enter_context(process(command, ready=accepts(port)))
            runs[name] = _runner(f"{'nbds' if tls else 'nbd'}://127.0.0.1:{port}/", home if tls else None)
        yield runs


@contextlib.contextmanager
def mirrored_pairs(folder: Path) -> Iterator[dict[str, Run]]:
    with contextlib.ExitStack() as stack:
        yield {
            name: _runner(stack.enter_context(stillpoint_pair(folder / name, "tcp", tls=tls)), None)
            for name, tls in (("plaintext", False), ("TLS", True))
        }


def _runner(uri: str, home: Path | None) -> Run:
    def run(measurement: Measurement, seconds: float) -> float:
        return measurement.value(
            fio(
                uri,
                mode=measurement.mode,
                depth=measurement.depth,
                block_size=measurement.block_size,
                seconds=seconds,
                size=str(SIZE),
                home=home,
            )
        )

    return run


def measure(goal: Goal, runs: dict[str, Run], rounds: int, seconds: float) -> list[str]:
    measurement = goal.measurement
    results = take_turns(
        {name: (lambda run=run: run(measurement, seconds)) for name, run in runs.items()},  # type: ignore[misc]
        rounds=rounds,
        on_round=lambda line: print(f"{measurement.title}: {line}", file=sys.stderr),
    )
    plain, secured, *peer = medians(results).values()
    figures = [f"{value:,.0f} {measurement.unit}" for value in (plain, secured)]
    peers_ratio = f"{peer[1] / peer[0]:.2f}" if peer else "-"
    return [measurement.title, *figures, f"{secured / plain:.2f}", f"{goal.ratio}", peers_ratio]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tls", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each fio run")
    parser.add_argument("--only", default="", help="measurements whose title contains this")
    options = parser.parse_args()
    rows: list[list[str]] = []
    try:
        find_tools("fio", "setpriv", "nbdkit")
        if os.geteuid() != 0:
            raise BenchmarkError("needs root, to run fio as a user that has certificates")
        for goals, contestants in ((NBD, nbd_servers), (MIRROR, mirrored_pairs)):
            chosen = [goal for goal in goals if options.only in goal.measurement.title]
            if not chosen:
                continue
            with memory_folder() as folder, contestants(folder) as runs:
                rows += [measure(goal, runs, options.rounds, options.seconds) for goal in chosen]
    except BenchmarkError as error:
        print(f"benchmarks.tls: {error}", file=sys.stderr)
        return 1
    print(markdown_table(["", "plaintext", "TLS", "ratio", "wanted", "nbdkit's ratio"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
