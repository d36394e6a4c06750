"""Backup and restore rates, beside `zstd -1` and `cp` of the same image.

    python -m benchmarks.backup [--rounds N] [--size MiB]

The image holds real files of this machine, 30 % of it free. Image, repository and copies are on tmpfs. Rates are of
the image's data, its holes left out. "pull" is the whole way of a backup: another process serves the image as a
snapshot over gRPC, this one checks, hashes, compresses and stores it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from backupnode.progress import Progress
from backupnode.puller import Puller
from backupnode.repository import BackupId, BackupRecord, Origin, Repository, open_directory
from backupnode.restore import restore
from backupnode.standby_client import StandbyClient
from backupnode.streaming import stream
from stillpoint.config import Address
from stillpoint.devices import FileDevice
from stillpoint.extents import Extent, split
from stillpoint.target import open_target
from tests.support.standby import StandInStandby, serving

from .support import BenchmarkError, find_tools, markdown_table, medians, memory_folder, resident_bytes, take_turns

MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backup", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=1024, metavar="MiB", help="of the image")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        asyncio.run(serve(options.serve))
        return 0
    try:
        find_tools("zstd", "cp", "tar")
        print(run(options.rounds, options.size * MIB))
    except BenchmarkError as error:
        print(f"benchmarks.backup: {error}", file=sys.stderr)
        return 1
    return 0


def run(rounds: int, size: int) -> str:
    with memory_folder() as folder:
        image = folder / "image"
        data_size = make_image(image, size)
        bench = Bench(folder, image, data_size)
        with bench.server():
            results = take_turns(
                bench.contestants(), rounds=rounds, on_round=lambda line: print(f"MB/s: {line}", file=sys.stderr)
            )
        figures = medians(results)
    rows = [[name, f"{rate:,.0f} MB/s"] for name, rate in figures.items()]
    rows.append(["repository, part of the data", f"{bench.stored_share:.1%}"])
    rows.append(["zstd -1, part of the data", f"{bench.zstd_share:.1%}"])
    rows.append(["memory of the process that pulls", f"{bench.resident_bytes_max / MIB:.0f} MiB"])
    return markdown_table(["", f"{size // MIB} MiB image"], rows)


class Bench:
    """Each contestant returns MB/s of the image's data."""

    def __init__(self, folder: Path, image: Path, data_size: int) -> None:
        self._folder = folder
        self._image = image
        self._data_size = data_size
        self._address = Address("127.0.0.1", 0)
        self.stored_share = self.zstd_share = 0.0
        self.resident_bytes_max = 0

    def contestants(self) -> dict[str, Callable[[], float]]:
        packed, unpacked = self._folder / "image.zst", self._folder / "copy"
        zstd = ("zstd", "-q", "-f", str(self._image), "-o", str(packed))
        return {
            "write into the repository": lambda: self._with_repository(self._write),
            "read back and check": lambda: self._with_repository(self._read_back),
            "pull over gRPC": lambda: self._with_repository(self._pull),
            "restore to a file": lambda: self._with_repository(self._restore),
            "zstd -1": lambda: self._command(packed, *zstd, "-1"),
            "zstd -1 -T2": lambda: self._command(packed, *zstd, "-1", "-T2"),
            "zstd -d": lambda: self._unpack(packed, unpacked),
            "cp": lambda: self._command(unpacked, "cp", "--sparse=auto", str(self._image), str(unpacked)),
        }

    @contextlib.contextmanager
    def server(self) -> Iterator[None]:
        """The process that stands in for the standby."""
        command = [sys.executable, "-m", "benchmarks.backup", "--serve", str(self._image)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            self._address = Address.parse(process.stdout.readline().strip())
            try:
                yield
            finally:
                process.terminate()

    def _with_repository(self, work: Callable[[Repository], Coroutine[Any, Any, float]]) -> float:
        async def main() -> float:
            repository = await open_directory(self._folder / "repository")
            try:
                return await work(repository)
            finally:
                await repository.close()

        try:
            return asyncio.run(main())
        finally:
            shutil.rmtree(self._folder / "repository")

    async def _write(self, repository: Repository) -> float:
        started = time.perf_counter()
        await self._store(repository)
        return self._rate(started)

    async def _store(self, repository: Repository) -> BackupRecord:
        device = FileDevice(self._image, read_only=True)
        writer = await repository.begin(Origin("vol1", "u", "s", device.size, 1))
        for extent in device.extents(0, device.size):
            if extent.hole:
                await writer.hole(extent.length)
                continue
            for piece in split(Extent(extent.offset, extent.length), limit=MIB):
                buffer = memoryview(bytearray(piece.length))
                device.read_into(piece.offset, buffer)
                await writer.write(buffer)
        device.close()
        record = await writer.commit(received_bytes=0)
        self.stored_share = record.stored_bytes / self._data_size
        return record

    async def _read_back(self, repository: Repository) -> float:
        reader = repository.open((await self._store(repository)).id)
        started = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            async with contextlib.aclosing(stream(reader, pool)) as pieces:
                async for _ in pieces:
                    pass
        reader.close()
        return self._rate(started)

    async def _pull(self, repository: Repository) -> float:
        standby = StandbyClient(standby=self._address, export=self._address)
        started = time.perf_counter()
        await Puller(standby, repository).run("vol1", report=self._note_memory)
        rate = self._rate(started)
        await standby.close()
        return rate

    def _note_memory(self, _: Progress) -> None:
        self.resident_bytes_max = max(self.resident_bytes_max, resident_bytes(os.getpid()))

    async def _restore(self, repository: Repository) -> float:
        backup: BackupId = (await self._store(repository)).id
        started = time.perf_counter()
        reader = repository.open(backup)
        target = await open_target(str(self._folder / "restored"), size=reader.record.origin.size)
        with ThreadPoolExecutor(2) as pool:
            await restore(reader, target, pool, lambda _: None)
        reader.close()
        rate = self._rate(started)
        (self._folder / "restored").unlink()
        return rate

    def _unpack(self, packed: Path, unpacked: Path) -> float:
        subprocess.run(["zstd", "-1", "-q", "-f", str(self._image), "-o", str(packed)], check=True)
        return self._command(unpacked, "zstd", "-d", "-q", "-f", str(packed), "-o", str(unpacked))

    def _command(self, output: Path, *command: str) -> float:
        started = time.perf_counter()
        subprocess.run(command, check=True)
        rate = self._rate(started)
        if output.suffix == ".zst":
            self.zstd_share = output.stat().st_size / self._data_size
        output.unlink()
        return rate

    def _rate(self, started: float) -> float:
        return self._data_size / (time.perf_counter() - started) / 1e6


def make_image(path: Path, size: int) -> int:
    """Real files as an archive, then a hole of 30 %. Returns the bytes of data."""
    wanted = size * 7 // 10 // MIB * MIB
    with path.open("wb") as image:
        tar = subprocess.Popen(["tar", "-c", "-C", "/", "usr"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert tar.stdout is not None
        left = wanted
        while left and (data := tar.stdout.read(min(left, MIB))):
            left -= image.write(data)
        tar.kill()
        tar.wait()
        tar.stdout.close()
        image.truncate(size)
    if left:
        raise BenchmarkError(f"/usr holds less than {wanted // MIB} MiB; use a smaller --size")
    return wanted


async def serve(image: Path) -> None:
    device = FileDevice(image, read_only=True)
    async with serving(StandInStandby({"vol1": device})) as address:
        print(address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    sys.exit(main())
