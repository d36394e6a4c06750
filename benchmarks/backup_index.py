"""Memory and time of the repository's index at the scale of a large volume.

    python -m benchmarks.backup_index [--tib N]

The repository is made of real index pages and a real cache of the index, for a volume of N TiB in chunks of 256 KiB
that all differ; the packs that would hold those chunks are empty files, as no chunk is read. Then a process with all of
the backup node's code opens it, as after a restart, and makes a backup that changes nothing, marks what is live as a
collection does, and stores new chunks. Figures are the peak of that process's memory so far, and the time of the step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from blake3 import blake3

import backupnode.node  # noqa: F401 - what a node loads counts too
from backupnode.repository import BackupId, Origin, open_directory
from backupnode.repository.blobs import BlobKind, ChunkId, encode, id_of
from backupnode.repository.format import CHUNK_SIZE
from backupnode.repository.index import Location
from backupnode.repository.tree import IDS_PER_PAGE, store_ids

from .support import markdown_table, memory_folder

TIB = 1 << 40
MIB = 1 << 20
# What a chunk takes in a pack on the average: half of it.
STORED_SIZE = 128 << 10
CHUNKS_PER_PACK = (32 << 20) // STORED_SIZE
NEW_BYTES = 512 * MIB


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.backup_index", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--tib", type=int, default=4, metavar="N", help="of the volume")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        asyncio.run(measure(options.measure))
        return 0
    with memory_folder() as folder:
        make = [sys.executable, "-m", "benchmarks.backup_index", "--measure", str(folder)]
        asyncio.run(build(folder, options.tib * TIB))
        figures = json.loads(subprocess.run(make, check=True, stdout=subprocess.PIPE).stdout)
    rows = [[name, f"{peak / 1e6:,.0f}", f"{seconds:.1f}"] for name, peak, seconds in figures]
    print(markdown_table([f"{options.tib} TiB", "peak memory, MB", "s"], rows))
    return 0


async def build(folder: Path, size: int) -> None:
    repository = await open_directory(folder)
    packs, keys = repository.packs, repository.packs.keys

    def work() -> ChunkId:
        stored = 0
        number = -1

        def store(page: bytes) -> ChunkId:
            identity = id_of(BlobKind.PAGE, page, keys)
            packs.add([encode(BlobKind.PAGE, identity, page, keys, level=1)])
            return identity

        lowest = bytearray()
        for _ in range(size // CHUNK_SIZE // IDS_PER_PAGE):
            page = os.urandom(32 * IDS_PER_PAGE)
            for start in range(0, len(page), 32):
                if stored % CHUNKS_PER_PACK == 0:
                    name = blake3(b"%d" % stored).hexdigest()
                    (folder / "packs" / name).touch()
                    number = packs.index.pack_number(name)
                place = Location(number, stored % CHUNKS_PER_PACK * STORED_SIZE, STORED_SIZE)
                packs.index.add(ChunkId(page[start : start + 32]), place)
                stored += 1
            lowest += store(page)
        root = store_ids(lowest, store)
        packs.seal()
        return root

    root = await asyncio.get_running_loop().run_in_executor(packs.thread, work)
    # A backup of the volume, whose index is the one made above.
    writer = await repository.begin(Origin("vol1", "u", "s", size, 1, "life", 1))
    await writer.hole(size)
    finish = writer._finish_index
    writer._finish_index = lambda: (finish(), root)[1]  # type: ignore[method-assign]
    await writer.commit(received_bytes=0)
    await repository.close()


async def measure(folder: Path) -> None:
    figures: list[tuple[str, int, float]] = []

    async def step(name: str, work: Callable[[], Awaitable[None]]) -> None:
        started = time.perf_counter()
        await work()
        figures.append((name, peak_bytes(), time.perf_counter() - started))

    async def nothing() -> None:
        pass

    await step("a node without a repository", nothing)
    started = time.perf_counter()
    repository = await open_directory(folder)
    figures.append(("the repository opened", peak_bytes(), time.perf_counter() - started))
    base = (await repository.list()).backups[0]

    async def unchanged() -> None:
        size = base.origin.size
        writer = await repository.begin(Origin("vol1", "u", "t", size, 2, "life", 2, BackupId(base.id)))
        await writer.unchanged(size)
        await writer.commit(received_bytes=0)

    async def looked_through() -> None:
        repository.packs.may_miss = True
        await unchanged()

    async def marked() -> None:
        await repository.collect(dry_run=True)

    async def new_chunks() -> None:
        writer = await repository.begin(Origin("vol2", "v", "s", NEW_BYTES, 3))
        for _ in range(NEW_BYTES // MIB):
            await writer.write(os.urandom(MIB))
        await writer.commit(received_bytes=0)

    await step("a backup that changes nothing", unchanged)
    await step("the same after damage: every page looked through", looked_through)
    await step("what is live, marked", marked)
    await step(f"{NEW_BYTES // MIB} MiB of new chunks stored", new_chunks)
    await step("closed: the cache written", repository.close)
    print(json.dumps(figures))


def peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


if __name__ == "__main__":
    sys.exit(main())
