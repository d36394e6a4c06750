"""Backups that were interrupted: the next one reads what is new, and what was read before only if it changed since."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from backupnode.maintenance import Maintenance
from backupnode.puller import Puller
from backupnode.repository import BackupId, BackupRecord, Origin, Partial, Region, open_directory
from backupnode.repository.writer import PackWriter
from backupnode.retention import RetentionPolicy
from backupnode.starts import Start, starts
from stillpoint.devices import MemoryDevice
from stillpoint.errors import PeerUnavailable, Refused
from tests.conformance.test_repositories import origin as some_origin
from tests.conformance.test_repositories import read_all
from tests.support.standby import Fault
from tests.unit.backupnode.test_incremental import MIB, QUICK, SIZE, Bench, ignore, with_bench

DAY = 86400 * 1_000_000_000


def packs(bench: Bench) -> list[Path]:
    return list((Path(bench.repository.description) / "packs").iterdir())


def partial_note(bench: Bench) -> Path:
    return Path(bench.repository.description) / "notes" / "partial-vol1"


def goes_after(size: int) -> Fault:
    """The connection ends after so many bytes, of all streams that have this fault, and stays away."""
    left = size

    def fault(message: bytes, index: int) -> list[bytes]:
        nonlocal left
        left -= len(message)
        if left < 0:
            raise PeerUnavailable("going away")
        return [message]

    return fault


async def interrupted(bench: Bench, after: int) -> None:
    """The standby goes for good after so many bytes."""
    bench.standby.faults = [goes_after(after)] * 100
    with pytest.raises(PeerUnavailable, match="given up"):
        await bench.puller.run("vol1", report=ignore)
    bench.standby.faults.clear()


async def reopen(bench: Bench) -> None:
    """As after a kill: only what is on the disk counts."""
    await bench.repository.close()
    bench.repository = await open_directory(Path(bench.repository.description))
    bench.puller = Puller(bench.client, bench.repository, retry=QUICK)


async def listed(bench: Bench) -> list[str]:
    listing = await bench.repository.list()
    assert not listing.damaged
    return [record.id for record in listing.backups]


def test_what_the_first_backup_had_read_is_not_read_again(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        await interrupted(bench, 6 * MIB + 65536)
        assert await listed(bench) == [] and partial_note(bench).exists()
        bench.write(MIB, b"changed in what was read")
        bench.write(7 * MIB, b"changed in what was not")
        before = bench.standby.sent_bytes
        record = await bench.back_up()
        # The two that were not read, the block that changed, the end of the volume, and the sample of the audit.
        assert bench.standby.sent_bytes - before <= 2 * MIB + 65536 + 4096 + 16 * 65536
        assert record.origin.base is None and await listed(bench) == [record.id]
        assert not partial_note(bench).exists()
        assert (await bench.back_up()).origin.base == record.id

    with_bench(tmp_path, body)


def test_where_the_standby_cannot_tell_what_changed_everything_is_read(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        await interrupted(bench, 6 * MIB + 65536)
        bench.write(MIB, b"changed in what was read")
        bench.standby.lost_answers = ["ChangedExtents"]
        before = bench.standby.sent_bytes
        await bench.back_up()
        assert bench.standby.sent_bytes - before > 8 * MIB

    with_bench(tmp_path, body)


def test_a_node_that_dies_goes_on_from_its_last_note(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bench.standby.delay_s = 0.03
        puller = Puller(bench.client, bench.repository, retry=QUICK, checkpoint_s=0)
        run = asyncio.create_task(puller.run("vol1", report=ignore))
        while (partial := await bench.repository.partial("vol1")) is None or partial.regions[0].end < 3 * MIB:
            assert not run.done()
            await asyncio.sleep(0.01)
        run.cancel()
        await asyncio.wait([run])
        bench.standby.delay_s = 0
        await reopen(bench)
        before = bench.standby.sent_bytes
        assert await listed(bench) == []
        await bench.back_up()
        # What was not noted, the end of the volume, and the sample of the audit.
        assert bench.standby.sent_bytes - before <= 5 * MIB + 4096 + 16 * 65536

    with_bench(tmp_path, body)


def test_an_incremental_that_is_interrupted_again_and_again_ends_right(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        first = await bench.back_up()
        for round_ in range(3):
            bench.write(round_ * 2 * MIB, random.Random(round_).randbytes(8 * MIB - round_ * 2 * MIB))
            await interrupted(bench, 4 * MIB)
        partial = await bench.repository.partial("vol1")
        assert partial is not None and len(partial.regions) >= 2
        assert partial.regions[-1].end == SIZE and await listed(bench) == [first.id]
        # What is left of the first is needed, though it is gone.
        await bench.repository.delete(first.id)
        await bench.repository.collect()
        second = await bench.back_up()
        assert second.origin.base == first.id

    with_bench(tmp_path, body)


def test_collections_keep_what_an_interrupted_backup_has_until_it_is_forgotten(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        await interrupted(bench, 6 * MIB + 65536)
        assert (await bench.repository.collect()).deleted_packs == 0 and packs(bench)
        assert await bench.repository.partial_volumes() == ["vol1"]
        await bench.repository.forget_partial("vol1")
        await bench.repository.forget_partial("vol1")
        await bench.repository.collect()
        assert not packs(bench)
        await bench.back_up()

    with_bench(tmp_path, body)


def test_what_nobody_took_up_for_a_month_is_forgotten(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        await interrupted(bench, 6 * MIB)

        async def tidy(after_ns: int, done: Callable[[], bool] = lambda: False) -> None:
            """At that time, until it is done or for a moment."""
            clock = time.time_ns() + after_ns
            maintenance = Maintenance(bench.repository, RetentionPolicy(), bench.repository.delete, clock=lambda: clock)
            maintenance.ask()
            task = asyncio.create_task(maintenance.run())
            for _ in range(15 if after_ns < 30 * DAY else 500):
                await asyncio.sleep(0.02)
                if done():
                    break
            task.cancel()
            await asyncio.wait([task])

        await tidy(29 * DAY)
        assert await bench.repository.partial_volumes() == ["vol1"] and packs(bench)
        await tidy(31 * DAY, lambda: not packs(bench))
        assert not await bench.repository.partial_volumes() and not packs(bench)

    with_bench(tmp_path, body)


def test_a_damaged_note_or_lost_chunks_cost_time_and_nothing_else(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        await interrupted(bench, 6 * MIB + 65536)
        note = partial_note(bench)
        note.write_bytes(note.read_bytes()[:-5])
        assert await bench.repository.partial("vol1") is None
        await bench.back_up()

        bench.write(0, random.Random(9).randbytes(8 * MIB))
        kept = {path.name for path in packs(bench)}
        await interrupted(bench, 6 * MIB + 65536)
        for pack in packs(bench):
            if pack.name not in kept:
                pack.unlink()
        await reopen(bench)
        await bench.back_up()

    with_bench(tmp_path, body)


def test_another_life_or_size_of_the_volume_resumes_nothing(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        await interrupted(bench, 6 * MIB + 65536)
        bench.standby.incarnation = "life-2"
        bench.write(0, b"not noted", noted=False)
        await bench.back_up()
        await bench.repository.delete(BackupId((await listed(bench))[0]))
        await interrupted(bench, 6 * MIB + 65536)
        larger = MemoryDevice(SIZE + 65536)
        bench.standby.volumes["vol1"] = larger
        record = await bench.puller.run("vol1", report=ignore)
        assert await read_all(bench.repository, record.id) == bytes(SIZE + 65536)

    with_bench(tmp_path, body)


@pytest.mark.parametrize("seed", range(6))
def test_any_history_of_interruptions_is_backed_up_as_it_was(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)

    async def body(bench: Bench) -> None:
        bench.puller = Puller(bench.client, bench.repository, retry=QUICK, checkpoint_s=source.choice([0, 0.02]))
        for _ in range(10):
            for _ in range(source.randrange(4)):
                offset = source.randrange(SIZE)
                length = min(SIZE - offset, source.choice([1, 65536, 300_000, 3 * MIB]))
                bench.write(offset, bytes(length) if source.random() < 0.3 else source.randbytes(length))
            before = await listed(bench)
            if source.random() < 0.6:
                bench.standby.faults = [goes_after(source.randrange(8 * MIB))] * source.randrange(1, 60)
                try:
                    await bench.back_up(full=source.random() < 0.1)
                except PeerUnavailable:
                    assert await listed(bench) == before
                bench.standby.faults.clear()
            else:
                await bench.back_up()
            backups = await listed(bench)
            if backups and source.random() < 0.4:
                await bench.repository.delete(source.choice((await bench.repository.list()).backups).id)
                await bench.repository.collect()
        await bench.back_up()

    with_bench(tmp_path, body)


def test_a_writer_that_was_fenced_notes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_directory(tmp_path / "repository", chunk_size=4096)
        writer: PackWriter = await repository.begin(some_origin(50 * 4096))
        await writer.write(random.Random(1).randbytes(20 * 4096))
        await repository.collect(fence=True)
        with pytest.raises(Refused, match="fenced"):
            await writer.checkpoint()
        await writer.abort()
        assert await repository.partial("vol1") is None
        await repository.close()

    asyncio.run(main())


@pytest.mark.parametrize("given", [0, 1, 4096, 5000, 20 * 4096, 50 * 4096 - 1, 50 * 4096])
def test_a_note_speaks_of_whole_chunks_and_the_writer_goes_on(tmp_path: Path, given: int) -> None:
    image = random.Random(1).randbytes(50 * 4096)

    async def main() -> None:
        repository = await open_directory(tmp_path / "repository", chunk_size=4096)
        origin = replace(some_origin(len(image)), incarnation="life", generation=7)
        writer = await repository.begin(origin)
        await writer.write(image[:given])
        await writer.checkpoint()
        partial = await repository.partial("vol1")
        assert partial is not None
        end = given if given == len(image) else given // 4096 * 4096
        rest = () if end == len(image) else (Region(len(image), "", 0),)
        assert partial.regions == (Region(end, "life", 7), *rest)
        other = await repository.begin(origin, resume=True)
        assert other.regions == partial.regions
        await other.unchanged(end)
        await other.write(image[end:])
        made = await other.commit(received_bytes=0)
        assert await read_all(repository, made.id) == image and made.data_bytes == len(image)
        await writer.write(image[given:])
        assert await read_all(repository, (await writer.commit(received_bytes=0)).id) == image
        await repository.close()

    asyncio.run(main())


def _record(generation: int, *, incarnation: str = "life", size: int = 100, uuid: str = "u") -> BackupRecord:
    origin = Origin("vol1", uuid, "s", size, 1, incarnation, generation)
    return BackupRecord(f"b{generation}", origin, 0, 0, 0, 0, 0)  # type: ignore[arg-type]


def test_the_newest_that_fits_is_built_on() -> None:
    now = _record(9).origin
    old, new = _record(3), _record(5)
    between, newest = Partial(_record(4), ()), Partial(_record(6), ())
    assert starts(now, [], None) == []
    assert starts(now, [old, new], None) == [Start(new.id)]
    assert starts(now, [old, new], between) == [Start(new.id)]
    assert starts(now, [old, new], newest) == [Start(None, resume=True), Start(new.id)]
    for other in (_record(7, incarnation="x"), _record(7, size=99), _record(7, uuid="x"), _record(10)):
        assert starts(now, [other], Partial(other, ())) == []
    assert starts(_record(9, incarnation="").origin, [_record(5, incarnation="")], None) == []
