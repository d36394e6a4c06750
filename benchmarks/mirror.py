"""Writes to a synchronously mirrored volume: ours beside qemu's blockdev-mirror onto a second qemu-storage-daemon.

    python -m benchmarks.mirror [--rounds N] [--seconds S] [--carrier tcp|grpc]

Both ends of both pairs are on this machine, their files on tmpfs; fio's nbd engine is the client. qemu mirrors with
copy-mode=write-blocking: a write is answered when both copies have it, as in our mode `sync`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .nbd import Measurement
from .support import (
    BenchmarkError,
    accepts,
    find_tools,
    fio,
    free_port,
    make_file,
    markdown_table,
    medians,
    memory_folder,
    process,
    qemu_storage_daemon,
    take_turns,
)

SIZE = 256 << 20

MEASUREMENTS = (
    Measurement("mirrored random write of 4 KiB, QD32", "randwrite", 32, lambda result: result.iops, "IOPS"),
    Measurement("mirrored random write of 4 KiB, QD1, p50", "randwrite", 1, lambda result: result.p50_us, "µs"),
    Measurement(
        "mirrored sequential write of 1 MiB, QD8",
        "write",
        8,
        lambda result: result.bytes_per_second / 1e6,
        "MB/s",
        "1m",
    ),
)


def standbyctl(*arguments: str) -> Any:
    command = [sys.executable, "-m", "stillpoint.cli", "--json", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if run.returncode != 0:
        raise BenchmarkError(f"standbyctl {' '.join(arguments)}: {run.stderr.strip()}")
    return json.loads(run.stdout) if run.stdout.strip() else None


@contextlib.contextmanager
def stillpoint_pair(folder: Path, carrier: str, *, size: int = SIZE, tls: bool = False) -> Iterator[str]:
    """A cluster in `folder` with one volume, written once so that every page exists; yields the volume's URI.

    tls: on the data link; without, as the pair of qemu's that it is compared with. `benchmarks.tls` compares the two.
    """
    security = [] if tls else ["--insecure"]
    standbyctl("local", "up", "--dir", str(folder), "--volume", f"bench:{size}", "--carrier", carrier, *security)
    try:
        uri = f"{standbyctl('local', 'env', '--dir', str(folder))['primary']['nbd']}/bench"
        fio(uri, mode="write", block_size="1m", depth=8, seconds=2.0, size=str(size))
        yield uri
    finally:
        standbyctl("local", "down", "--dir", str(folder))


@contextlib.contextmanager
def qemu_pair(folder: Path, *, size: int = SIZE, preserve_in: Path | None = None) -> Iterator[str]:
    """Two qemu-storage-daemons, the first mirroring to the second over NBD; yields the first one's URI.

    preserve_in: where the second one takes what is overwritten, from the first write on.
    """
    port, control = free_port(), folder / "qmp"
    with qemu_storage_daemon(make_file(folder / "target", size), preserve_in=preserve_in) as target:
        target_port = int(target.rsplit(":", 1)[1].split("/")[0])
        command = [
            "qemu-storage-daemon",
            "--blockdev",
            f"driver=file,node-name=disk,filename={make_file(folder / 'source', size)},cache.direct=off,discard=unmap",
            "--blockdev",
            f"driver=nbd,node-name=mirror,server.type=inet,server.host=127.0.0.1,server.port={target_port},export=disk",
            "--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={port},max-connections=16",
            "--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on",
            "--chardev", f"socket,id=control,path={control},server=on,wait=off",
            "--monitor", "chardev=control",
        ]  # fmt: skip
        with process(command, ready=accepts(port)):
            _start_mirror(control)
            yield f"nbd://127.0.0.1:{port}/disk"


def _start_mirror(control: Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(control))
        stream = connection.makefile("rw")

        def ask(command: str, **arguments: object) -> Any:
            stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            stream.flush()
            while True:
                answer = json.loads(stream.readline())
                if "error" in answer:
                    raise BenchmarkError(f"qemu: {command}: {answer['error']['desc']}")
                if "return" in answer:
                    return answer["return"]

        stream.readline()
        ask("qmp_capabilities")
        ask(
            "blockdev-mirror",
            # Both files hold the same already, so nothing has to be copied first.
            **{"job-id": "mirror", "device": "disk", "target": "mirror", "sync": "none", "copy-mode": "write-blocking"},
        )
        deadline = time.monotonic() + 60
        while not all(job["ready"] for job in ask("query-block-jobs")):
            if time.monotonic() > deadline:
                raise BenchmarkError("qemu's mirror is not ready after 60 s")
            time.sleep(0.1)


def run(rounds: int, seconds: float, carrier: str, only: str) -> str:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(memory_folder())
        uris = {
            "stillpoint": stack.enter_context(stillpoint_pair(folder / "stillpoint", carrier)),
            "qemu blockdev-mirror": stack.enter_context(qemu_pair(folder)),
        }
        chosen = [measurement for measurement in MEASUREMENTS if only in measurement.title]
        rows = [_measure(measurement, uris, rounds, seconds) for measurement in chosen]
    return markdown_table(["", *uris, "ours / qemu"], rows)


def _measure(measurement: Measurement, uris: dict[str, str], rounds: int, seconds: float) -> list[str]:
    def contestant(uri: str) -> Callable[[], float]:
        return lambda: measurement.value(
            fio(
                uri,
                mode=measurement.mode,
                depth=measurement.depth,
                block_size=measurement.block_size,
                seconds=seconds,
                size=str(SIZE),
            )
        )

    results = take_turns(
        {name: contestant(uri) for name, uri in uris.items()},
        rounds=rounds,
        on_round=lambda line: print(f"{measurement.title}: {line}", file=sys.stderr),
    )
    ours, qemu = medians(results).values()
    return [
        measurement.title,
        f"{ours:,.0f} {measurement.unit}",
        f"{qemu:,.0f} {measurement.unit}",
        f"{ours / qemu:.2f}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mirror", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each fio run")
    parser.add_argument("--carrier", choices=["tcp", "grpc"], default="tcp")
    parser.add_argument("--only", default="", help="measurements whose title contains this")
    options = parser.parse_args()
    try:
        find_tools("fio", "qemu-storage-daemon")
        print(run(options.rounds, options.seconds, options.carrier, options.only))
    except BenchmarkError as error:
        print(f"benchmarks.mirror: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
