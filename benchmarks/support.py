"""What the benchmarks share: starting peers, running fio, medians, and tables in Markdown.

Every comparison is paired: the contestants take turns within one run, so that what else the machine does hits all
of them, and the median of several rounds is compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 10.0


class BenchmarkError(Exception):
    """A peer did not start or a tool failed; the line says which and why."""


def find_tools(*names: str) -> None:
    """Raise BenchmarkError naming what is not installed."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        raise BenchmarkError(f"not installed: {', '.join(missing)}")


def free_port() -> int:
    """A loopback port nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder on tmpfs, so that no disk takes part in what is measured."""
    with tempfile.TemporaryDirectory(prefix="stillpoint-bench-", dir="/dev/shm") as folder:
        yield Path(folder)


def make_file(path: Path, size: int) -> Path:
    """A file whose every page exists, so that no contestant pays for allocating them."""
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(b"\xa5" * (1 << 20))
    return path


@contextlib.contextmanager
def process(
    command: Sequence[str], *, ready: Callable[[], bool], environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` for the length of a `with`, from when `ready` says yes. Its errors go to ours."""
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env={**os.environ, **(environment or {})}, start_new_session=True
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready():
            if child.poll() is not None:
                raise BenchmarkError(f"{command[0]} ended at once, with status {child.returncode}")
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{command[0]} is not ready after {START_TIMEOUT_S:g} s")
            time.sleep(0.02)
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def accepts(port: int) -> Callable[[], bool]:
    """Ready when something accepts connections on the loopback port."""

    def ready() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    return ready


@contextlib.contextmanager
def stillpoint_nbd(path: Path) -> Iterator[str]:
    """Our plain NBD server on a file; yields its URI."""
    port = free_port()
    command = [sys.executable, "-m", "stillpoint.nbd", "--file", str(path), "--port", str(port)]
    with process(command, ready=accepts(port)):
        yield f"nbd://127.0.0.1:{port}/"


@contextlib.contextmanager
def nbdkit_file(path: Path) -> Iterator[str]:
    port = free_port()
    with process(["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "file", str(path)], ready=accepts(port)):
        yield f"nbd://127.0.0.1:{port}/"


@contextlib.contextmanager
def qemu_storage_daemon(path: Path, *, preserve_in: Path | None = None) -> Iterator[str]:
    """qemu's NBD server on a raw file, through the page cache as the others.

    preserve_in: a file of the same size to which its filter copy-before-write takes what is overwritten.
    """
    port = free_port()
    filters = [
        "--blockdev", f"driver=file,node-name=kept,filename={preserve_in},cache.direct=off,discard=unmap",
        "--blockdev", "driver=copy-before-write,node-name=filter,file=disk,target=kept",
    ]  # fmt: skip
    command = [
        "qemu-storage-daemon",
        "--blockdev", f"driver=file,node-name=disk,filename={path},cache.direct=off,discard=unmap",
        *(filters if preserve_in else ()),
        "--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={port},max-connections=16",
        "--export", f"type=nbd,id=export,node-name={'filter' if preserve_in else 'disk'},name=disk,writable=on",
    ]  # fmt: skip
    with process(command, ready=accepts(port)):
        yield f"nbd://127.0.0.1:{port}/disk"


@dataclass(frozen=True, slots=True)
class FioResult:
    """One fio run. Latencies are from submission to completion, in microseconds."""

    iops: float
    bytes_per_second: float
    p50_us: float
    p99_us: float


def fio(
    uri: str,
    *,
    mode: str,
    block_size: str = "4k",
    depth: int = 32,
    seconds: float = 3.0,
    size: str = "",
    jobs: int = 1,
    home: Path | None = None,
) -> FioResult:
    """Run fio's nbd engine. mode: fio's `rw`, such as randread.

    home: of the user `nobody`, as whom it then runs. fio lets no URI name certificates, and libnbd looks for those of
    any user but root in `.pki/libnbd` there.
    """
    command = [
        *(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", f"HOME={home}"] if home else []),
        "fio", "--name=run", "--ioengine=nbd", f"--uri={uri}", f"--rw={mode}", f"--bs={block_size}",
        f"--iodepth={depth}", "--time_based", f"--runtime={seconds}", "--ramp_time=0.5", "--output-format=json",
        f"--numjobs={jobs}", "--group_reporting", "--randrepeat=0", "--norandommap",
        # Total latency: fio counts what an engine does while it submits apart, and engines differ in what that is.
        "--lat_percentiles=1", "--clat_percentiles=0",
    ]  # fmt: skip
    if size:
        command.append(f"--size={size}")
    with tempfile.TemporaryDirectory(prefix="stillpoint-fio-") as folder:
        Path(folder).chmod(0o777)
        run = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=seconds * 5 + 60, check=False)
    if run.returncode != 0:
        raise BenchmarkError(f"fio failed on {uri}: {run.stderr.strip() or run.stdout.strip()}")
    side = json.loads(run.stdout[run.stdout.index("{") :])["jobs"][0]["read" if "read" in mode else "write"]
    percentiles = side["lat_ns"]["percentile"]
    return FioResult(
        iops=side["iops"],
        bytes_per_second=side["bw_bytes"],
        p50_us=percentiles["50.000000"] / 1000,
        p99_us=percentiles["99.000000"] / 1000,
    )


def take_turns(
    contestants: Mapping[str, Callable[[], float]], *, rounds: int, on_round: Callable[[str], None] | None = None
) -> dict[str, list[float]]:
    """Measure each contestant once a round, starting with another one each round."""
    names = list(contestants)
    results: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            results[name].append(contestants[name]())
            if on_round is not None:
                on_round(f"round {number + 1} of {rounds}: {name}: {results[name][-1]:,.1f}")
    return results


def medians(results: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in results.items()}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table for a README, its columns lined up."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise BenchmarkError(f"process {pid} is gone")


def peak_resident_bytes(pid: int) -> int:
    """The most memory of a process that ever was in RAM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise BenchmarkError(f"process {pid} is gone")
