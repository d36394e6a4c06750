"""Backups beside borg and restic: full, 2 % changed, unchanged, restore, in turn on the same image.

    python -m benchmarks.backup_peers [--rounds N] [--size MiB]

The image is an ext4 file system of real files of this machine, about 30 % of it free. Image, repositories and copies
are on tmpfs. borg compresses with zstd,1 and does not encrypt; restic compresses as it does by default, and always
encrypts. Ours is timed from the request to the durable backup, with the snapshot served by another process over gRPC;
theirs are whole commands that read the image as a file. The limit of reading is nbdcopy of the image to /dev/null.
The ratios are medians of the rounds' own, as what else the machine does hits the contestants of a round alike.
"processor" is the processor time of all processes of a step, the standby's too, which other work disturbs less.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backupnode.puller import Puller
from backupnode.repository import BackupId, open_directory
from backupnode.restore import restore
from backupnode.standby_client import StandbyClient
from stillpoint.config import Address
from stillpoint.devices import FileDevice
from stillpoint.extents import Extent
from stillpoint.target import open_target
from stillpoint.wire.status import Context
from stillpoint.wire.v1 import export_pb2
from tests.support.standby import StandInStandby, serving

from .support import BenchmarkError, find_tools, markdown_table, medians, memory_folder, nbdkit_file

MIB = 1 << 20
BLOCK = 64 << 10
SPARSE_SIZE = 1 << 40


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.backup_peers", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=2048, metavar="MiB", help="of the image")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        asyncio.run(serve(options.serve))
        return 0
    try:
        find_tools("borg", "restic", "mke2fs", "nbdcopy", "nbdkit")
        print(run(options.rounds, options.size * MIB))
    except BenchmarkError as error:
        print(f"benchmarks.backup_peers: {error}", file=sys.stderr)
        return 1
    return 0


def run(rounds: int, size: int) -> str:
    results: dict[str, list[float]] = {}
    with memory_folder() as folder:
        make_file_system(folder, folder / "original", size)
        for number in range(rounds):
            contestants: list[Contestant] = [Ours(folder), Borg(folder), Restic(folder), Limit(folder)]
            # Each goes first once, so that none always finds the machine the others left.
            turn = number % len(contestants)
            for contestant in contestants[turn:] + contestants[:turn]:
                for step, figure in contestant.measure(seed=number).items():
                    results.setdefault(f"{contestant.name}: {step}", []).append(figure)
                    print(f"{number}: {contestant.name}: {step}: {figure:.2f}", file=sys.stderr)
    rows = [[name, f"{figure:,.2f}"] for name, figure in [*medians(results).items(), *ratios(results)]]
    return markdown_table(["", f"{size // MIB} MiB ext4 image: s, or MiB"], rows)


def ratios(results: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, float]]:
    for peer in (Borg.name, Restic.name):
        for step in ("full", "full, processor", "2 % changed", "2 % changed, processor", "restore", "repository, MiB"):
            pairs = zip(results[f"{peer}: {step}"], results[f"{Ours.name}: {step}"], strict=True)
            yield f"{peer} / {Ours.name}: {step}", statistics.median(theirs / ours for theirs, ours in pairs)


def make_file_system(folder: Path, image: Path, size: int) -> None:
    """Real files, as many as fill about 70 % of it."""
    files, left = folder / "files", size * 68 // 100
    for root, _, names in os.walk("/usr"):
        for name in names:
            path = Path(root) / name
            if not path.is_file() or path.is_symlink() or path.stat().st_size > left:
                continue
            target = files / path.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            left -= -(-path.stat().st_size // 4096) * 4096
        if left < 4 * MIB:
            break
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(files), str(image)], check=True)
    shutil.rmtree(files)


def change(image: Path, seed: int) -> list[int]:
    """New contents for 2 % of the blocks. Returns where."""
    source = random.Random(seed)
    count = image.stat().st_size // BLOCK
    offsets = sorted(number * BLOCK for number in source.sample(range(count), count // 50))
    with image.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            file.write(source.randbytes(BLOCK // 2) + b"text " * (BLOCK // 10))
    return offsets


@dataclass
class Contestant:
    folder: Path
    name = ""

    @property
    def image(self) -> Path:
        return self.folder / "image"

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    def measure(self, seed: int) -> dict[str, float]:
        subprocess.run(["cp", "--sparse=always", str(self.folder / "original"), str(self.image)], check=True)
        (self.folder / "changes.json").write_text("[]")
        try:
            return self.steps(seed)
        finally:
            for path in (self.repository, self.folder / "home"):
                shutil.rmtree(path, ignore_errors=True)
            (self.folder / "restored").unlink(missing_ok=True)

    def steps(self, seed: int) -> dict[str, float]:
        raise NotImplementedError

    def note_change(self, seed: int) -> None:
        (self.folder / "changes.json").write_text(json.dumps(change(self.image, seed)))

    def check_restored(self) -> None:
        subprocess.run(["cmp", str(self.image), str(self.folder / "restored")], check=True)

    def repository_mib(self) -> float:
        return sum(path.stat().st_size for path in self.repository.rglob("*") if path.is_file()) / MIB


class Command(Contestant):
    """A program that is started for each step."""

    create: tuple[str, ...] = ()
    backup: tuple[str, ...] = ()
    restore_to_stdout: tuple[str, ...] = ()

    def steps(self, seed: int) -> dict[str, float]:
        self._run(*self.create)
        figures = {}
        for step, name in (("full", "a"), ("2 % changed", "b")):
            processor_s = children_processor_s()
            figures[step] = self._back_up(name)
            figures[f"{step}, processor"] = children_processor_s() - processor_s
            if name == "a":
                figures["repository, MiB"] = self.repository_mib()
                self.note_change(seed)
        started = time.perf_counter()
        with (self.folder / "restored").open("wb") as output:
            subprocess.run(self._fill(self.restore_to_stdout, "b"), check=True, stdout=output, env=self._environment())
        figures["restore"] = time.perf_counter() - started
        self.check_restored()
        return figures

    def _back_up(self, name: str) -> float:
        started = time.perf_counter()
        self._run(*self._fill(self.backup, name))
        return time.perf_counter() - started

    def _fill(self, command: tuple[str, ...], name: str) -> list[str]:
        values = {"name": name, "image": str(self.image), "repository": str(self.repository)}
        return [part.format(**values) for part in command]

    def _run(self, *command: str) -> None:
        subprocess.run(self._fill(command, ""), check=True, stdout=subprocess.DEVNULL, env=self._environment())

    def _environment(self) -> dict[str, str]:
        home = str(self.folder / "home")
        more = {"HOME": home, "BORG_BASE_DIR": home, "RESTIC_PASSWORD": "x", "RESTIC_CACHE_DIR": home}
        return {**os.environ, **more, "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes"}


class Borg(Command):
    name = "borg"
    create = ("borg", "init", "-e", "none", "{repository}")
    backup = ("borg", "create", "--read-special", "-C", "zstd,1", "{repository}::{name}", "{image}")
    restore_to_stdout = ("borg", "extract", "--stdout", "{repository}::{name}")


class Restic(Command):
    name = "restic"
    create = ("restic", "-q", "-r", "{repository}", "init")
    backup = ("restic", "-q", "-r", "{repository}", "backup", "{image}")
    restore_to_stdout = ("restic", "-q", "-r", "{repository}", "dump", "latest", "{image}")


class Limit(Contestant):
    name = "nbdcopy to /dev/null"

    def steps(self, seed: int) -> dict[str, float]:
        with nbdkit_file(self.image) as uri:
            started = time.perf_counter()
            subprocess.run(["nbdcopy", uri, "null:"], check=True)
            return {"read": time.perf_counter() - started}


class Ours(Contestant):
    name = "stillpoint"
    _server_pid = 0

    def steps(self, seed: int) -> dict[str, float]:
        with self._server() as address:
            return asyncio.run(self._steps(address, seed))

    async def _steps(self, address: Address, seed: int) -> dict[str, float]:
        repository = await open_directory(self.repository)
        standby = StandbyClient(standby=address, export=address)
        puller = Puller(standby, repository)
        figures = {}

        async def back_up(step: str, volume: str = "vol1") -> BackupId:
            started, processor_s = time.perf_counter(), time.process_time() + self._server_processor_s()
            record = await puller.run(volume, report=lambda _: None)
            figures[step] = time.perf_counter() - started
            figures[f"{step}, processor"] = time.process_time() + self._server_processor_s() - processor_s
            self.received_bytes = record.received_bytes
            return record.id

        await back_up("full")
        figures["repository, MiB"] = self.repository_mib()
        self.note_change(seed)
        backup = await back_up("2 % changed")
        changed_bytes = len(json.loads((self.folder / "changes.json").read_text())) * BLOCK
        figures["sent for 2 %, part of what changed"] = self.received_bytes / changed_bytes
        started = time.perf_counter()
        reader = repository.open(backup)
        target = await open_target(str(self.folder / "restored"), size=reader.record.origin.size)
        with ThreadPoolExecutor(2) as pool:
            await restore(reader, target, pool, lambda _: None)
        figures["restore"] = time.perf_counter() - started
        self.check_restored()
        await back_up("1 TiB sparse, full", "sparse")
        await back_up("1 TiB sparse, unchanged", "sparse")
        await standby.close()
        await repository.close()
        return figures

    @contextmanager
    def _server(self) -> Iterator[Address]:
        """The process that stands in for the standby."""
        command = [sys.executable, "-m", "benchmarks.backup_peers", "--serve", str(self.folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            self._server_pid = process.pid
            try:
                yield Address.parse(process.stdout.readline().strip())
            finally:
                process.terminate()

    def _server_processor_s(self) -> float:
        fields = Path(f"/proc/{self._server_pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children_processor_s() -> float:
    """Of processes that have ended and were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Standby(StandInStandby):
    """Takes the changes of the image from the file beside it."""

    changes_of: Callable[[], list[int]]

    async def ChangedExtents(
        self, request: export_pb2.ChangedExtentsRequest, context: Context
    ) -> AsyncIterator[export_pb2.ChangedExtentsPart]:
        self.changes = [(1 << 30, Extent(offset, BLOCK)) for offset in self.changes_of() if request.volume == "vol1"]
        async for part in super().ChangedExtents(request, context):
            yield part


async def serve(folder: Path) -> None:
    image = FileDevice(folder / "image", read_only=True)
    sparse = FileDevice.create(folder / f"sparse-{os.getpid()}", SPARSE_SIZE)
    sparse.path.unlink()
    for place in (0, SPARSE_SIZE // 3, SPARSE_SIZE - 512):
        sparse.write(place, [b"x" * 512])
    standby = Standby({"vol1": image, "sparse": sparse})
    standby.changes_of = lambda: list(json.loads((folder / "changes.json").read_text()))
    async with serving(standby) as address:
        print(address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    sys.exit(main())
