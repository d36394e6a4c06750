"""Incremental backups over a real gRPC connection: what is read, what is trusted, and what when trust fails."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from backupnode.audit import AuditMiss, audit
from backupnode.progress import Progress
from backupnode.puller import Puller
from backupnode.repository import BackupRecord, PackRepository, open_directory
from backupnode.source import RetryPolicy, Source, joined, without
from backupnode.standby_client import SnapshotName, StandbyClient
from stillpoint.devices import MemoryDevice
from stillpoint.errors import StillpointError
from stillpoint.extents import Extent
from tests.conformance.test_repositories import read_all
from tests.support.standby import StandInStandby, breaks_at, damages, serving

MIB = 1 << 20
SIZE = 12 * MIB + 4096
QUICK = RetryPolicy(attempts=3, first_delay_s=0.01, delay_s_max=0.02, interruptions_max=20)


@dataclass
class Bench:
    standby: StandInStandby
    device: MemoryDevice
    repository: PackRepository
    client: StandbyClient
    puller: Puller

    def write(self, offset: int, data: bytes, *, noted: bool = True) -> None:
        self.device.write(offset, [data])
        if noted:
            self.standby.note_changed(offset // 65536 * 65536, -(-(offset % 65536 + len(data)) // 65536) * 65536)

    async def back_up(self, *, full: bool = False) -> BackupRecord:
        """And prove it."""
        record = await self.puller.run("vol1", full=full, report=ignore)
        image = bytearray(SIZE)
        self.device.read_into(0, memoryview(image))
        assert await read_all(self.repository, record.id) == image
        return record


@asynccontextmanager
async def bench(folder: Path) -> AsyncIterator[Bench]:
    device = MemoryDevice(SIZE)
    device.write(0, [random.Random(1).randbytes(8 * MIB)])
    device.write(SIZE - 100, [b"the end"])
    standby = StandInStandby({"vol1": device})
    async with serving(standby) as address:
        repository = await open_directory(folder / "repository")
        client = StandbyClient(standby=address, export=address)
        try:
            yield Bench(standby, device, repository, client, Puller(client, repository, retry=QUICK))
        finally:
            await client.close()
            await repository.close()


def with_bench(folder: Path, body: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        async with bench(folder) as made:
            await body(made)

    asyncio.run(main())


def ignore(_: Progress) -> None:
    pass


def test_only_what_changed_is_read_and_stored(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        first = await bench.back_up()
        before = bench.standby.sent_bytes
        bench.write(3 * MIB + 70_000, b"changed" * 100)
        bench.write(7 * MIB, bytes(MIB))
        second = await bench.back_up()
        assert second.origin.base == first.id
        # The changed blocks, and the sample of the audit.
        assert bench.standby.sent_bytes - before <= 65536 + MIB + 16 * 65536
        assert second.stored_bytes < 600_000
        third = await bench.back_up()
        assert third.origin.base == second.id and third.stored_bytes == 0
        assert third.data_bytes == second.data_bytes == first.data_bytes - MIB

    with_bench(tmp_path, body)


def test_many_small_changes_take_few_calls(tmp_path: Path) -> None:
    async def body(made: Bench) -> None:
        await made.back_up()
        before = made.standby.stream_count
        for number in range(0, 100, 2):
            made.write(number * 65536, b"changed")
        record = await made.back_up()
        assert record.received_bytes < 70 * 65536
        # 50 of them in batches of 16, and the audit's 16 samples.
        assert made.standby.stream_count - before <= 4 + 16

    with_bench(tmp_path, body)


def test_the_snapshot_becomes_a_bookmark_and_older_ones_go(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bench.standby.bookmarks["vol1", "of-somebody-else"] = 0
        for _ in range(3):
            record = await bench.back_up()
        assert not bench.standby.snapshots
        assert set(bench.standby.bookmarks) == {("vol1", "of-somebody-else"), ("vol1", record.origin.snapshot)}

    with_bench(tmp_path, body)


def test_the_bookmark_is_right_though_the_connection_breaks_at_each_call_that_makes_it(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        await bench.back_up()
        for lost in (
            ["DeleteSnapshot"],
            ["ListBookmarks"],
            ["DeleteBookmark"],
            ["DeleteSnapshot", "ListBookmarks", "DeleteBookmark", "DeleteBookmark"],
        ):
            bench.standby.lost_answers = list(lost)
            record = await bench.back_up()
            assert not bench.standby.snapshots, lost
            assert set(bench.standby.bookmarks) == {("vol1", record.origin.snapshot)}, lost

    with_bench(tmp_path, body)


def test_a_full_backup_reads_everything_and_stores_nothing_twice(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        await bench.back_up()
        before = bench.standby.sent_bytes
        again = await bench.back_up(full=True)
        assert again.origin.base is None and again.stored_bytes == 0
        assert bench.standby.sent_bytes - before > 8 * MIB

    with_bench(tmp_path, body)


def test_another_life_of_the_volume_is_compared_in_full(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        await bench.back_up()
        bench.standby.incarnation = "life-2"
        bench.write(0, b"not noted", noted=False)
        again = await bench.back_up()
        assert again.origin.base is None and again.stored_bytes < MIB

    with_bench(tmp_path, body)


def test_a_change_that_was_not_told_raises_an_alarm_and_everything_is_read(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        await bench.back_up()
        bench.write(0, random.Random(2).randbytes(8 * MIB), noted=False)
        again = await bench.back_up()
        assert again.origin.base is None and "called unchanged" in again.alarm
        assert (await bench.repository.get(again.id)).alarm == again.alarm
        assert (await bench.back_up()).alarm == ""

    with_bench(tmp_path, body)


def test_a_chunk_that_was_damaged_in_the_base_is_read_again_and_heals_it(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        first = await bench.back_up()
        (pack,) = (Path(bench.repository.description) / "packs").iterdir()
        for position in (20 + 88 + 5, 20 + 10 * (88 + 262144)):
            with pack.open("r+b") as file:
                file.seek(position)
                file.write(b"\xff\x00\xff\x01")
        # One block of the first chunk changed, so the rest of it is needed of the base.
        bench.write(70_000, b"changed")
        second = await bench.back_up()
        assert second.origin.base is None, "the base could not be built on"
        third = await bench.back_up()
        assert third.origin.base == second.id
        with pytest.raises(StillpointError, match="chunk 0"):
            await read_all(bench.repository, first.id)

    with_bench(tmp_path, body)


def test_chunks_known_to_be_missing_are_read_with_the_changes(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        first = await bench.back_up()
        for pack in (Path(bench.repository.description) / "packs").iterdir():
            with pack.open("r+b") as file:
                file.seek(20 + 88 + 5)
                file.write(b"\xff\x00\xff\x01")
        with pytest.raises(StillpointError, match="chunk 0"):
            await read_all(bench.repository, first.id)
        before = bench.standby.sent_bytes
        second = await bench.back_up()
        assert second.origin.base == first.id
        assert bench.standby.sent_bytes - before < 3 * MIB
        image = bytearray(SIZE)
        bench.device.read_into(0, memoryview(image))
        assert await read_all(bench.repository, first.id) == image

    with_bench(tmp_path, body)


@pytest.mark.parametrize("fault", [breaks_at(0), damages(0)], ids=["broken", "damaged"])
def test_an_extent_that_does_not_arrive_is_asked_for_again(tmp_path: Path, fault: object) -> None:
    async def body(bench: Bench) -> None:
        await bench.back_up()
        for number in range(6):
            bench.write(number * MIB + 5, b"changed")
        bench.write(6 * MIB, random.Random(3).randbytes(2 * MIB + 5))
        bench.standby.faults = [fault] * 2  # type: ignore[list-item]
        assert (await bench.back_up()).origin.base is not None

    with_bench(tmp_path, body)


@pytest.mark.parametrize("seed", range(4))
def test_any_history_of_changes_is_backed_up_as_it_was(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)

    async def body(bench: Bench) -> None:
        for _ in range(6):
            for _ in range(source.randrange(12)):
                offset = source.randrange(SIZE)
                length = min(SIZE - offset, source.choice([1, 512, 65536, 300_000, 3 * MIB]))
                bench.write(offset, bytes(length) if source.random() < 0.4 else source.randbytes(length))
            await bench.back_up(full=source.random() < 0.1)
            if source.random() < 0.4:
                listed = (await bench.repository.list()).backups
                await bench.repository.delete(source.choice(listed).id)
                await bench.repository.collect()

    with_bench(tmp_path, body)


def test_the_rate_is_limited(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        puller = Puller(bench.client, bench.repository, rate_bytes_s=16 * MIB)
        record = await puller.run("vol1", report=ignore)
        assert record.duration_ns > 0.45e9

    with_bench(tmp_path, body)


def test_the_audit_finds_a_difference_wherever_it_looks(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        record = await bench.back_up()
        name = SnapshotName("vol1", "s1")
        await bench.client.create_snapshot(name)
        source = Source(bench.client, name, QUICK)
        await source.describe()
        everything_but = [Extent(0, 5 * MIB), Extent(6 * MIB, SIZE - 6 * MIB)]
        await audit(source, bench.repository.open(record.id), everything_but, seed=1)
        bench.write(5 * MIB, bytes(MIB), noted=False)
        with pytest.raises(AuditMiss, match="differ from backup"):
            await audit(source, bench.repository.open(record.id), everything_but, seed=1)

    with_bench(tmp_path, body)


@pytest.mark.parametrize(
    ("extents", "expected"),
    [
        ([], []),
        ([(0, 5), (5, 5)], [(0, 10)]),
        ([(10, 5), (0, 5)], [(0, 5), (10, 5)]),
        ([(0, 20), (5, 5), (30, 1)], [(0, 20), (30, 1)]),
    ],
)
def test_extents_are_joined(extents: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    made = joined(Extent(*each) for each in extents)
    assert made == [Extent(*each) for each in expected]
    rest = without(Extent(0, 40), made)
    assert sum(each.length for each in rest) + sum(each.length for each in made) == 40
    assert joined([*rest, *made]) == [Extent(0, 40)]
