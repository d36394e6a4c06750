"""What a policy keeps, and that pruning deletes exactly the rest."""

from __future__ import annotations

import asyncio
import calendar
import random
import time
from pathlib import Path

import pytest

from backupnode.maintenance import Maintenance
from backupnode.repository import BackupId, BackupRecord, Origin, open_directory
from backupnode.retention import RetentionPolicy, kept
from stillpoint.errors import ConfigError, Refused


def record(stamp: str, *, protected: bool = False) -> BackupRecord:
    """stamp: YYYY-MM-DD HH:MM, its id too."""
    instant_ns = calendar.timegm(time.strptime(stamp, "%Y-%m-%d %H:%M")) * 1_000_000_000
    origin = Origin("vol1", "u", "s", 1, instant_ns)
    return BackupRecord(BackupId(stamp), origin, 0, 0, 0, 0, 0, protected=protected)


HISTORY = [
    "2025-12-31 23:00",
    "2026-01-01 01:00",
    "2026-01-31 01:00",
    "2026-02-01 01:00",
    "2026-02-01 05:10",
    "2026-02-01 05:50",
    "2026-02-02 01:00",
]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (RetentionPolicy(), {0, 1, 2, 3, 4, 5, 6}),
        (RetentionPolicy(last=1), {6}),
        (RetentionPolicy(last=3), {4, 5, 6}),
        (RetentionPolicy(last=100), {0, 1, 2, 3, 4, 5, 6}),
        (RetentionPolicy(hourly=3), {3, 5, 6}),
        (RetentionPolicy(daily=2), {5, 6}),
        # 1 February 2026 is the Sunday of the week of 31 January; the year's first days lie in one week.
        (RetentionPolicy(weekly=3), {1, 5, 6}),
        (RetentionPolicy(monthly=3), {0, 2, 6}),
        (RetentionPolicy(yearly=5), {0, 6}),
        (RetentionPolicy(last=1, yearly=2), {0, 6}),
    ],
)
def test_the_newest_of_each_period_is_kept(policy: RetentionPolicy, expected: set[int]) -> None:
    records = [record(stamp) for stamp in HISTORY]
    random.Random(1).shuffle(records)
    assert {*kept(records, policy)} == {HISTORY[number] for number in expected}


def test_protected_ones_are_kept_whatever_the_policy() -> None:
    records = [record(stamp, protected=stamp == HISTORY[1]) for stamp in HISTORY]
    assert kept(records, RetentionPolicy(last=1)) == {HISTORY[6]: "last", HISTORY[1]: "protected"}


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"retention\.daily is -1"):
        RetentionPolicy(daily=-1)


def test_pruning_deletes_the_rest_of_each_volume_and_a_dry_run_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_directory(tmp_path / "repository", chunk_size=4096)
        images, made = {}, []
        for number in range(6):
            image = random.Random(number).randbytes(30_000)
            writer = await repository.begin(Origin(f"vol{number % 2}", "u", "s", len(image), 1 + number))
            await writer.write(image)
            made.append((await writer.commit(received_bytes=0)).id)
            images[made[-1]] = image
        await repository.protect(made[0], True)
        with pytest.raises(Refused, match="is protected"):
            await repository.delete(made[0])
        maintenance = Maintenance(repository, RetentionPolicy(last=1), repository.delete)
        verdicts = await maintenance.prune(dry_run=True)
        assert [each.record.id for each in verdicts if not each.kept_by] == [made[1], made[2], made[3]]
        assert [each.kept_by for each in verdicts if each.kept_by] == ["protected", "last", "last"]
        assert len((await repository.list()).backups) == 6
        before = await repository.stored_bytes()
        maintenance.ask()
        task = asyncio.create_task(maintenance.run())
        async with asyncio.timeout(10):
            while await repository.stored_bytes() > before - 80_000:
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert {each.id for each in (await repository.list()).backups} == {made[0], made[4], made[5]}
        await repository.close()

    asyncio.run(main())


def test_no_deletion_leaves_fewer_than_the_minimum(tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_directory(tmp_path / "repository", chunk_size=4096)
        made = []
        for number in range(4):
            writer = await repository.begin(Origin("vol1", "u", "s", 5000, 1 + number))
            await writer.write(bytes([number]) * 5000)
            made.append((await writer.commit(received_bytes=0)).id)
        maintenance = Maintenance(repository, RetentionPolicy(minimum=2), repository.delete)
        assert RetentionPolicy(minimum=2).keeps_everything
        # A policy from the command line does not go below the configured minimum either.
        verdicts = await maintenance.prune(policy=RetentionPolicy(last=1), dry_run=True)
        assert [each.kept_by for each in verdicts] == ["", "", "minimum", "last"]
        with pytest.raises(Refused, match="there is no policy"):
            await maintenance.prune()
        # Two at once see each other.
        done = await asyncio.gather(*(maintenance.delete(each) for each in made[:3]), return_exceptions=True)
        assert done[:2] == [None, None]
        assert isinstance(done[2], Refused) and "one of the last 2 of volume vol1" in str(done[2])
        assert [record.id for record in (await repository.list()).backups] == made[2:]
        # A damaged one is no use to its volume, so it may go, and it does not count.
        manifest = tmp_path / "repository" / "manifests" / made[2]
        manifest.write_bytes(manifest.read_bytes()[:-1])
        with pytest.raises(Refused, match="one of the last 2"):
            await maintenance.delete(made[3])
        with pytest.raises(Refused, match="nothing is pruned while the manifest"):
            await maintenance.prune(policy=RetentionPolicy(last=1))
        await maintenance.delete(made[2])
        assert [record.id for record in (await repository.list()).backups] == made[3:]
        await repository.close()

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(5))
def test_pruning_again_takes_nothing_more(seed: int) -> None:
    source = random.Random(seed)
    days = {(source.randrange(1, 13), source.randrange(1, 29), source.randrange(10)) for _ in range(60)}
    stamps = [f"2026-{month:02}-{day:02} 0{hour}:00" for month, day, hour in sorted(days)]
    records = [record(stamp, protected=source.random() < 0.1) for stamp in stamps]
    numbers = {name: source.randrange(4) for name in ("hourly", "daily", "weekly", "monthly", "yearly")}
    policy = RetentionPolicy(last=source.randrange(1, 4), minimum=source.randrange(8), **numbers)
    stays = kept(records, policy)
    left = [each for each in records if each.id in stays]
    assert {*kept(left, policy)} == {*stays}
    assert len(left) >= min(policy.minimum, len(records))
    assert all(each.id in stays for each in records if each.protected) and records[-1].id in stays
