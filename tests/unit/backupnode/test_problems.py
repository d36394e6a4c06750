"""What `standbyctl status` is told of backups."""

from __future__ import annotations

from dataclasses import replace

from backupnode.problems import find_problems
from backupnode.repository import BackupId, BackupRecord, Listing, Origin
from backupnode.schedule import Due, ScheduleConfig, ScheduleState
from backupnode.scheduler import ScheduleStatus
from tests.unit.backupnode.test_schedule import DAY, HOUR, START

GOOD = BackupRecord(BackupId("b1"), Origin("vol1", "u", "s", 1, 1), 0, 0, 0, 0, 0)
WAITING = ScheduleStatus(ScheduleConfig("vol1", "daily"), ScheduleState(START), Due(START + DAY, retry=False))


def problems(
    *records: BackupRecord, damaged: tuple[str, ...] = (), schedule: ScheduleStatus = WAITING, blobs: int = 0
) -> list[str]:
    listing = Listing(list(records), [BackupId(each) for each in damaged])
    return find_problems(listing, [schedule], damaged_blobs=blobs, now_ns=START)


def test_all_well_is_no_problem() -> None:
    assert problems() == problems(GOOD, replace(GOOD, tested_ns=5, verified_ns=5)) == []


def test_a_schedule_that_fails_or_is_overdue_is_one() -> None:
    failed = replace(WAITING, state=replace(WAITING.state, failures=1, error="no standby"))
    assert problems(schedule=failed) == ["schedule vol1: the last run failed: no standby"]
    again = replace(WAITING, state=replace(WAITING.state, failures=3, error="no standby"))
    assert problems(schedule=again) == ["schedule vol1: the last 3 runs in a row failed: no standby"]
    for late_ns, expected in (
        (HOUR, []),
        (5 * HOUR + 1, ["schedule vol1 is overdue by 5 h; see the log of the backup node"]),
    ):
        late = replace(WAITING, due=Due(START - late_ns, retry=False))
        assert problems(schedule=late) == expected
        assert problems(schedule=replace(late, state=replace(late.state, running=True))) == []
    assert problems(schedule=replace(WAITING, due=None)) == []


def test_only_the_last_restore_test_and_the_newest_backup_of_a_volume_count() -> None:
    failed = replace(GOOD, id=BackupId("b2"), tested_ns=5, test_error="no file system")
    assert problems(GOOD, failed) == ["vol1: the restore test of backup b2 failed: no file system"]
    assert problems(failed, replace(GOOD, tested_ns=6)) == []
    alarmed = replace(GOOD, id=BackupId("b3"), alarm="bytes differ", origin=replace(GOOD.origin, snapshot_ns=2))
    assert problems(GOOD, alarmed) == ["vol1: bytes differ; everything was read instead, so backup b3 is right"]
    assert problems(alarmed, replace(GOOD, origin=replace(GOOD.origin, snapshot_ns=3))) == []


def test_damage_is_one() -> None:
    (manifest,) = problems(GOOD, damaged=("b9",))
    assert manifest.startswith("backup b9 is damaged")
    assert problems(blobs=1) == [
        "1 part of the repository damaged; `standbyctl backup check` names the backups that need it"
    ]
    assert problems(blobs=7)[0].startswith("7 parts of the repository damaged")
