"""What the snapshot engine costs: taking snapshots, writing under them, reading and deleting them.

    python -m benchmarks.snapshots [--dir DIR] [--quick]

Everything on files in DIR (default /dev/shm, so that the engine is measured and not a disk; 14 GiB of it, with --quick
4); one process, no network.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from standby.changes import Changes, Instant
from standby.cow import SnapshotEngine, StoreDirectory, open_virtual_device
from standby.cow.association_forms import FORMS
from stillpoint.devices import FileDevice

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
PAGE = memoryview(random.Random(0).randbytes(4 * KIB))


class Bench:
    """A volume with its engine in a folder of its own."""

    def __init__(self, parent: Path, *, size: int, block_size: int = 64 * KIB, store_size: int = 2 * GIB) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="snapshots-", dir=parent))
        self.path = self.folder / "mirror"
        self.mirror = FileDevice.create(self.path, size)
        self.stores = StoreDirectory(self.folder / "stores", default_size=store_size)
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

    def reopen(self, boot: str) -> float:
        """Open everything as if this were that boot; an engine not closed before just goes. Returns seconds."""
        self.stores.close()
        started = time.perf_counter()
        self.stores = StoreDirectory(self.folder / "stores")
        self.engine = SnapshotEngine.open(self.folder / "state", self.mirror, self.stores, boot=lambda: boot)
        return time.perf_counter() - started

    def changes(self, base: str, snapshot: str) -> Callable[[], int]:
        """Ask, as the export process does, how many extents differ between the two."""
        incarnation = str(self.engine.incarnation)
        device = open_virtual_device(self.engine.describe(), snapshot)
        instant = Instant(incarnation, self.engine.get(base).generation)
        changes = Changes(device, instant, incarnation=incarnation, block_size=self.engine.block_size)
        return lambda: sum(len(runs) for runs in changes.runs(0, device.size))

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


async def deleting(parent: Path, form: str, *, count: int) -> None:
    """Delete snapshots of `count` blocks of 4 KiB while the mirror takes writes, half of them first touches."""
    block_size, piece = 4 * KIB, 64 * KIB
    half = count * block_size
    bench = Bench(parent, size=2 * half, block_size=block_size, store_size=4 * half)
    bench.stores.create("formed", kind="file", size=4 * half, map_form=form)
    content = memoryview(random.Random(0).randbytes(piece))
    for offset in range(0, 2 * half, piece):
        bench.mirror.write(offset, (content,))
    await bench.snapshot("old", "formed")
    await bench.snapshot("new", "formed")
    offsets = list(range(0, half, piece))
    random.Random(1).shuffle(offsets)
    for offset in offsets:
        bench.engine.write(offset, content)
        if bench.engine.is_worth_commit:
            await bench.engine.commit()
    await bench.engine.commit()
    fresh = iter(range(half, 2 * half, block_size))
    for name, what in (("new", "all handed on"), ("old", "all freed")):
        asked_s = _time(lambda name=name: bench.engine.statistics(name))  # type: ignore[misc]
        began = time.perf_counter()
        longest_s = await _write_until(asyncio.create_task(bench.engine.delete(name)), bench.engine, fresh)
        print(
            f"delete of {count:,} blocks, {form:>9}, {what:>13}: {time.perf_counter() - began:6.3f} s, at most"
            f" {1000 * longest_s:6.1f} ms without a write   (statistics {1e6 * asked_s:.0f} µs)"
        )
    await bench.close()


async def _write_until(work: asyncio.Task[None], engine: SnapshotEngine, fresh: Iterator[int]) -> float:
    """Write as a mirror does, a first touch and another in turn. Returns the longest time between two writes."""
    commit: asyncio.Task[None] | None = None
    longest_s = 0.0
    last = time.perf_counter()
    while not work.done():
        for offset in (next(fresh, 0), 0):
            engine.write(offset, PAGE)
        if engine.is_worth_commit and (commit is None or commit.done()):
            commit = asyncio.create_task(engine.commit())
        if engine.wants_commit:
            await engine.commit()
        await asyncio.sleep(0.0002)  # about what the network leaves between two batches
        now = time.perf_counter()
        longest_s = max(longest_s, now - last)
        last = now
    await work
    await engine.commit()
    return longest_s


def _time(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


async def opening(parent: Path, *, counts: Sequence[int]) -> None:
    """Open a volume of 1 TiB in blocks of 64 KiB, closed or after a power loss, with so many records in the log."""
    for count in counts:
        bench = Bench(parent, size=TIB)
        await bench.snapshot("a")
        for block in random.Random(3).sample(range(TIB // (64 * KIB)), count):
            bench.engine.write(block * 64 * KIB, PAGE)
            if bench.engine.is_worth_commit:
                await bench.engine.commit()
        await bench.engine.commit()
        await bench.snapshot("b")
        changed_s = statistics.median(_time(bench.changes("a", "b")) for _ in range(5))
        for stop, boot in (("clean", "same"), ("power loss", "another")):
            if boot == "same":
                await bench.engine.close()
            seconds = bench.reopen(boot)
            print(f"open 1 TiB, {count:9,} records, after {stop:10}: {seconds:6.3f} s")
        print(f"changed extents of 1 TiB, {count:,} blocks here and there: {1000 * changed_s:.1f} ms")
        await bench.close()


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
    for form in FORMS:
        await deleting(arguments.dir, form, count=250_000 * scale)
    await opening(arguments.dir, counts=(0, 25_000 * scale, 50_000 * scale))


if __name__ == "__main__":
    asyncio.run(main())
