"""What an administrator must know of backups: one line each, with what to do. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from .repository import BackupRecord, Listing
from .scheduler import ScheduleStatus

# A run that is due waits for a backup of the volume that somebody else began; longer than this is a problem.
_OVERDUE_NS: Final = 3600 * 1_000_000_000


def find_problems(
    listing: Listing, schedules: Sequence[ScheduleStatus], *, damaged_blobs: int, now_ns: int
) -> list[str]:
    """damaged_blobs: parts of backups that count as missing."""
    return [
        *_of_schedules(schedules, now_ns),
        *_of_backups(listing.backups),
        *(
            f"backup {each} is damaged: its manifest cannot be read; back the volume up and delete it"
            for each in listing.damaged
        ),
        *_of_repository(damaged_blobs),
    ]


def _of_schedules(schedules: Sequence[ScheduleStatus], now_ns: int) -> Iterator[str]:
    for status in schedules:
        state, label = status.state, status.config.label
        if state.failures:
            runs = "run" if state.failures == 1 else f"{state.failures} runs in a row"
            yield f"schedule {label}: the last {runs} failed: {state.error}"
        elif status.due is not None and not state.running and now_ns - status.due.at_ns > _OVERDUE_NS:
            hours = (now_ns - status.due.at_ns) // _OVERDUE_NS
            yield f"schedule {label} is overdue by {hours} h; see the log of the backup node"


def _of_backups(records: Sequence[BackupRecord]) -> Iterator[str]:
    """Of each volume, the last test and the newest backup count: what came before may be mended since."""
    for volume in sorted({record.origin.volume for record in records}):
        own = [record for record in records if record.origin.volume == volume]
        tested = max(own, key=lambda record: record.tested_ns)
        if tested.test_error:
            yield f"{volume}: the restore test of backup {tested.id} failed: {tested.test_error}"
        newest = max(own, key=lambda record: record.origin.snapshot_ns)
        if newest.alarm:
            yield f"{volume}: {newest.alarm}; everything was read instead, so backup {newest.id} is right"


def _of_repository(damaged_blobs: int) -> Iterator[str]:
    if damaged_blobs:
        parts = "1 part" if damaged_blobs == 1 else f"{damaged_blobs} parts"
        yield f"{parts} of the repository damaged; `standbyctl backup check` names the backups that need it"
