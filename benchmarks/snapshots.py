"""What the snapshot engine costs: taking snapshots, writing under them, reading and deleting them.

    python -m benchmarks.snapshots [--dir DIR] [--quick]

Everything on files in DIR (default /dev/shm, so that the engine is measured and not a disk); one process, no network.
Ratios matter, not figures.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from standby.cow import SnapshotEngine, StoreDirectory, open_virtual_device
from stillpoint.devices import FileDevice

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
PAGE = memoryview(random.Random(0).randbytes(4 * KIB))


class Bench:
    """A volume with its engine in a folder of its own."""

    def __init__(self, parent: Path, *, size: int, block_size: int = 64 * KIB) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="snapshots-", dir=parent))
        self.path = self.folder / "mirror"
        self.mirror = FileDevice.create(self.path, size)
        self.stores = StoreDirectory(self.folder / "stores", default_size=2 * GIB)
        self.stores.create("memory", kind="memory", size=2 * GIB)
        started = time.perf_counter()
        self.engine = SnapshotEngine.create(
            self.folder / "state", "volume", self.mirror, self.stores, block_size=block_size, mirror_paths=[self.path]
        )
        self.create_s = time.perf_counter() - started

    async def snapshot(self, name: str, store: str | None = None) -> float:
        started = time.perf_counter()
        await self.engine.finish(self.engine.cut(name, store))
        return time.perf_counter() - started

    async def close(self) -> None:
        await self.engine.close()
        self.stores.close()
        self.mirror.close()
        shutil.rmtree(self.folder)


async def creating(parent: Path, *, size: int, label: str, count: int) -> None:
    bench = Bench(parent, size=size)
    times = []
    for number in range(count):
        for _ in range(20):
            bench.engine.write(random.randrange(size // 4096) * 4096, PAGE)
        await bench.engine.flush()
        times.append(1000 * await bench.snapshot(f"s{number}"))
        if number >= 32:
            await bench.engine.delete(f"s{number - 32}")
    times.sort()
    print(
        f"snapshot create, {label:12} p50 {statistics.median(times):6.2f} ms"
        f"   p99 {times[int(len(times) * 0.99)]:6.2f} ms   (volume create {bench.create_s * 1000:.0f} ms)"
    )
    await bench.close()


async def writing(parent: Path, *, size: int, count: int) -> None:
    choose = random.Random(1)
    offsets = [choose.randrange(size // 4096) * 4096 for _ in range(count)]
    bench = Bench(parent, size=size)
    for offset in range(0, size, MIB):
        bench.mirror.write(offset, [PAGE] * 256)
    plain = await _rate(lambda o: bench.mirror.write(o, (PAGE,)), bench, offsets)
    base = await _rate(lambda o: bench.engine.write(o, PAGE), bench, offsets)
    print(f"4 KiB random writes: bare device {plain:9,.0f}/s   engine without a snapshot {base:9,.0f}/s")
    for store in (None, "memory"):
        await bench.snapshot("s", store)
        first = await _rate(lambda o: bench.engine.write(o, PAGE), bench, offsets[:5000])
        for offset in range(0, size, 64 * KIB):
            bench.engine.write(offset, PAGE)
            if bench.engine.wants_commit:
                await bench.engine.commit()
        await bench.engine.commit()
        steady = await _rate(lambda o: bench.engine.write(o, PAGE), bench, offsets)
        kind = "file store" if store is None else "memory store"
        print(f"  {kind:13} first touch {first:9,.0f}/s   all touched {steady:9,.0f}/s ({steady / base:.2f} of none)")
        await bench.engine.delete("s")
    for number in range(64):
        await bench.snapshot(f"s{number}")
    many = await _rate(lambda o: bench.engine.write(o, PAGE), bench, offsets[:5000])
    print(f"  64 snapshots: first touch {many:9,.0f}/s")
    await bench.close()


async def _rate(write: Callable[[int], None], bench: Bench, offsets: list[int]) -> float:
    """Writes a second, the last commit included."""
    started = time.perf_counter()
    for index, offset in enumerate(offsets):
        write(offset)
        if index & 31 == 31 and bench.engine.wants_commit:
            await bench.engine.commit()
    await bench.engine.commit()
    return len(offsets) / (time.perf_counter() - started)


async def reading(parent: Path, *, size: int) -> None:
    bench = Bench(parent, size=size)
    for offset in range(0, size, MIB):
        bench.mirror.write(offset, [PAGE] * 256)
    await bench.snapshot("s")
    for share, label in ((0.0, "all live"), (0.5, "half preserved"), (1.0, "all preserved")):
        chosen = random.Random(2)
        for offset in range(0, size, 64 * KIB):
            if chosen.random() < share:
                bench.engine.write(offset, PAGE)
            if bench.engine.wants_commit:
                await bench.engine.commit()
        await bench.engine.commit()
        device = open_virtual_device(bench.engine.describe(), "s")
        buffer = memoryview(bytearray(MIB))
        started = time.perf_counter()
        for offset in range(0, size, MIB):
            device.read_into(offset, buffer)
        rate = size / (time.perf_counter() - started) / 1e6
        device.close()
        print(f"virtual device, 1 MiB reads, {label:15} {rate:8,.0f} MB/s")
    await bench.close()


async def deleting(parent: Path, *, size: int, block_size: int, count: int) -> None:
    bench = Bench(parent, size=size, block_size=block_size)
    for content in (b"a", b"b"):
        for offset in range(0, count * block_size, MIB):
            bench.engine.write(offset, memoryview(content * MIB))
            if bench.engine.wants_commit:
                await bench.engine.commit()
        await bench.engine.commit()
        if content == b"a":
            await bench.snapshot("old")
            await bench.snapshot("s")
    await _delete(bench, "s", f"delete of {count:,} preserved blocks, all handed on: ")
    await bench.snapshot("new")
    base = bench.engine.get("old").generation
    started = time.perf_counter()
    await bench.engine.changed("new", base=base, incarnation=bench.engine.incarnation)
    print(f"changed extents of {size // block_size:,} blocks {1000 * (time.perf_counter() - started):6.1f} ms")
    await bench.engine.close()
    bench.stores.close()
    started = time.perf_counter()
    bench.stores = StoreDirectory(bench.folder / "stores")
    bench.engine = SnapshotEngine.open(bench.folder / "state", bench.mirror, bench.stores)
    print(f"open with that many records {time.perf_counter() - started:6.3f} s")
    await _delete(bench, "old", f"delete of {count:,} preserved blocks, all freed:     ")
    await bench.close()


async def _delete(bench: Bench, name: str, label: str) -> None:
    """Delete a snapshot while watching how long the loop is kept from its other work."""
    stalls = []
    deletion = asyncio.create_task(bench.engine.delete(name))
    started = last = time.perf_counter()
    while not deletion.done():
        await asyncio.sleep(0)
        now = time.perf_counter()
        stalls.append(now - last)
        last = now
    await deletion
    print(f"{label}{time.perf_counter() - started:6.3f} s, longest stall of the loop {1000 * max(stalls):.1f} ms")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--quick", action="store_true", help="smaller runs")
    arguments = parser.parse_args()
    scale = 1 if arguments.quick else 4
    for size, label in ((GIB, "1 GiB"), (4 * TIB, "4 TiB sparse")):
        await creating(arguments.dir, size=size, label=label, count=100 * scale)
    await writing(arguments.dir, size=256 * MIB, count=25_000 * scale)
    await reading(arguments.dir, size=128 * MIB * scale)
    await deleting(arguments.dir, size=64 * GIB, block_size=4 * KIB, count=50_000 * scale)


if __name__ == "__main__":
    asyncio.run(main())
