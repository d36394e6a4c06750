"""Catching up with a standby: how fast all of a volume is copied, how fast 1 %, and what clients notice of it.

    python -m benchmarks.resync [--rounds N] [--size SIZE_MIB]

One cluster on this machine, its files on tmpfs. The plain copy beside it reads the volume's file, sends it through a
TCP connection on loopback to another process, and writes it there. What clients notice is measured with 4 KiB writes at
queue depth 8, without a resync and during one that is limited to 20 MiB a second.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .mirror import standbyctl
from .support import BenchmarkError, find_tools, fio, free_port, markdown_table, memory_folder

_CHUNK = 64 << 10
_RATE = 20 << 20


class Bench:
    """The cluster, and what it is asked."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size
        self.cluster = ["--cluster", str(folder / "cluster.yaml")]
        env = standbyctl("local", "env", "--dir", str(folder))
        self.uri = f"{env['primary']['nbd']}/bench"
        self.path = Path(env["volumes"]["bench"]["primary_path"])

    def ctl(self, *arguments: str) -> Any:
        return standbyctl(*self.cluster, *arguments)

    def seconds_until_in_sync(self, started: float) -> float:
        while (pair := self.ctl("volume", "show", "bench")["pair"])["state"] != "in_sync" or pair["dirty_bytes"]:
            if time.monotonic() - started > 300:
                raise BenchmarkError(f"not in sync after 300 s: {pair}")
            time.sleep(0.02)
        log = (self.folder / "logs" / "primary.log").read_text().splitlines()
        return _seconds_of_the_last_resync(log)

    def full(self) -> float:
        """Copy everything again."""
        started = time.monotonic()
        self.ctl("mirror", "resync", "bench")
        return self.seconds_until_in_sync(started)

    def after(self, dirty_percent: int) -> float:
        """Write that much, evenly spread, while the standby is down; the time from its return to being in sync."""
        standbyctl("local", "kill", "standby", "--dir", str(self.folder))
        step = _CHUNK * 100 // dirty_percent
        offsets = list(range(0, self.size, step))
        for at in range(0, len(offsets), 500):
            writes = [
                part for offset in offsets[at : at + 500] for part in ("-c", f"write -q -P {at % 250} {offset} 4k")
            ]
            subprocess.run(
                ["qemu-io", "-f", "raw", *writes, self.uri], check=True, stdout=subprocess.DEVNULL, timeout=120
            )
        standbyctl("local", "start", "standby", "--dir", str(self.folder))
        return self.seconds_until_in_sync(time.monotonic())

    def p99_us(self, seconds: float) -> float:
        return fio(self.uri, mode="randwrite", depth=8, seconds=seconds, size=str(self.size)).p99_us


def _seconds_of_the_last_resync(log: list[str]) -> float:
    """From when the standby was attached until it was in sync, by the primary's own log."""
    times: dict[str, float] = {}
    for line in log:
        stamp = (
            time.mktime(time.strptime(line[:19], "%Y-%m-%dT%H:%M:%S")) + float(line[19:23]) if line[:2] == "20" else 0
        )
        if "standby attached" in line:
            times["attached"] = stamp
        elif "pair in sync" in line:
            times["in sync"] = stamp
    return times["in sync"] - times["attached"]


def plain_copy(source: Path, target: Path) -> float:
    """Seconds to copy the file through a TCP connection into another process."""
    port = free_port()
    script = (
        "import socket,sys\n"
        "s=socket.create_server(('127.0.0.1',int(sys.argv[1])));print('ready',flush=True);c,_=s.accept()\n"
        "b=bytearray(1<<20);v=memoryview(b)\n"
        "with open(sys.argv[2],'wb',buffering=0) as f:\n"
        " while (n:=c.recv_into(b)): f.write(v[:n])\n"
        "c.sendall(b'.')\n"
    )
    command = [sys.executable, "-c", script, str(port), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout is not None
        receiver.stdout.readline()
        buffer = bytearray(1 << 20)
        started = time.monotonic()
        with socket.create_connection(("127.0.0.1", port)) as connection, source.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                connection.sendall(memoryview(buffer)[:count])
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)
        seconds = time.monotonic() - started
    target.unlink()
    return seconds


def run(rounds: int, size: int) -> str:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(memory_folder())
        standbyctl("local", "up", "--dir", str(folder), "--volume", f"bench:{size}")
        stack.callback(standbyctl, "local", "down", "--dir", str(folder))
        bench = Bench(folder, size)
        fio(bench.uri, mode="write", block_size="1m", depth=8, seconds=size / (100 << 20), size=str(size))
        full, plain, little, quiet, busy = [], [], [], [], []
        for number in range(rounds):
            full.append(bench.full())
            plain.append(plain_copy(bench.path, folder / "copy"))
            little.append(bench.after(1))
            bench.ctl("volume", "set", "bench", "--resync-rate", str(_RATE))
            quiet.append(bench.p99_us(3.0))
            bench.ctl("mirror", "resync", "bench")
            busy.append(bench.p99_us(3.0))
            bench.ctl("volume", "set", "bench", "--resync-rate", "0")
            bench.seconds_until_in_sync(time.monotonic())
            copies = f"full {full[-1]:.2f} s, plain {plain[-1]:.2f} s, 1 %: {little[-1]:.2f} s"
            line = f"{copies}, p99 {quiet[-1]:.0f} and {busy[-1]:.0f} µs"
            print(f"round {number + 1} of {rounds}: {line}", file=sys.stderr)
    return _table(size, *(statistics.median(values) for values in (full, plain, little, quiet, busy)))


def _table(size: int, full: float, plain: float, little: float, quiet: float, busy: float) -> str:
    rate, plain_rate = size / full / 1e6, size / plain / 1e6
    rows = [
        ["full resync", f"{rate:,.0f} MB/s", f"plain copy: {plain_rate:,.0f} MB/s", f"{rate / plain_rate:.2f} of it"],
        ["resync of 1 % dirty", f"{little:.2f} s", f"full: {full:.2f} s", f"allowed: {0.02 * full + 1:.2f} s"],
        [
            "4 KiB writes during a resync, p99",
            f"{busy:,.0f} µs",
            f"without: {quiet:,.0f} µs",
            f"{busy / quiet:.2f} times",
        ],
    ]
    return markdown_table(["", "measured", "beside", ""], rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resync", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=1024, help="of the volume, MiB")
    options = parser.parse_args()
    try:
        find_tools("fio", "qemu-io")
        print(run(options.rounds, options.size << 20))
    except (BenchmarkError, subprocess.SubprocessError) as error:
        print(f"benchmarks.resync: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
