"""What the backup node tells Prometheus: how old each volume's last backup is, what was verified, the repository."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from stillpoint.metrics import Families, nbd_statistics
from stillpoint.nbd.server import NbdServer

from .puller import Puller
from .repository import BackupRecord, Listing, Repository
from .scheduler import Scheduler, ScheduleStatus

# A listing reads every manifest; a scraper that comes more often than this is shown the one before.
_LISTING_AGE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Listed:
    at: float
    listing: Listing
    stored_bytes: int


class Metrics:
    """`gather` is what `stillpoint.metrics` calls."""

    def __init__(self, repository: Repository, puller: Puller, nbd: NbdServer, scheduler: Scheduler) -> None:
        self._repository = repository
        self._puller = puller
        self._nbd = nbd
        self._scheduler = scheduler
        self._listed: _Listed | None = None

    async def gather(self, families: Families) -> None:
        families.nbd_server(nbd_statistics(self._nbd), exports="backups")
        families.gauge("backups_running", "Backups that are being taken.", self._puller.running)
        for result, count in (("ok", self._puller.succeeded_count), ("failed", self._puller.failed_count)):
            families.counter("backup_runs", "Backups that ended since the node started.", count, result=result)
        text = "Bytes a second at which all backups together may read from the standby now; 0: not limited."
        families.gauge("backup_throttle_bytes", text, self._puller.throttle_rate)
        for status in self._scheduler.statuses():
            _schedule(families, status)
        listed = await self._list()
        families.gauge("repository_bytes", "Bytes that the repository occupies.", listed.stored_bytes)
        text = "Backups whose manifests cannot be read any more."
        families.gauge("repository_damaged_backups", text, len(listed.listing.damaged))
        text = "Parts of backups found damaged and not written anew since."
        families.gauge("repository_damaged_blobs", text, self._repository.quarantined_count)
        by_volume: dict[str, list[BackupRecord]] = {}
        for record in listed.listing.backups:
            by_volume.setdefault(record.origin.volume, []).append(record)
        for volume, records in sorted(by_volume.items()):
            _volume(families, volume, records)

    async def _list(self) -> _Listed:
        if self._listed is None or time.monotonic() - self._listed.at > _LISTING_AGE_S:
            listing = await self._repository.list()
            self._listed = _Listed(time.monotonic(), listing, await self._repository.stored_bytes())
        return self._listed


def _schedule(families: Families, status: ScheduleStatus) -> None:
    config, state = status.config, status.state
    labels = {"schedule": config.label, "volume": config.volume}
    text = "When a run of the schedule last succeeded, Unix time; 0: never."
    families.gauge("schedule_last_success_timestamp_seconds", text, state.success_ns / 1e9, **labels)
    text = "When the schedule is due next, Unix time; in the past while it is overdue; 0: never."
    families.gauge("schedule_due_timestamp_seconds", text, status.due.at_ns / 1e9 if status.due else 0, **labels)
    text = "Runs of the schedule that failed, in a row."
    families.gauge("schedule_failures", text, state.failures, **labels)
    families.gauge("schedule_running", "Whether the schedule runs now.", state.running, **labels)
    families.gauge("schedule_paused", "Whether the schedule is paused.", state.paused, **labels)


def _volume(families: Families, volume: str, records: list[BackupRecord]) -> None:
    """records: at least one, oldest first."""
    last = max(records, key=lambda record: record.origin.snapshot_ns)
    families.gauge("backups", "Backups there are.", len(records), volume=volume)
    text = "The instant that the newest backup shows, Unix time."
    families.gauge("backup_last_timestamp_seconds", text, last.origin.snapshot_ns / 1e9, volume=volume)
    text = "When the last backup was committed, Unix time."
    success_ns = max(record.finished_ns for record in records)
    families.gauge("backup_last_success_timestamp_seconds", text, success_ns / 1e9, volume=volume)
    text = "How long the newest backup took."
    families.gauge("backup_last_duration_seconds", text, last.duration_ns / 1e9, volume=volume)
    text = "What the newest backup added to the repository."
    families.gauge("backup_last_stored_bytes", text, last.stored_bytes, volume=volume)
    text = "When a backup of the volume was last read back and found right, Unix time; 0: never."
    verified_ns = max(record.verified_ns for record in records)
    families.gauge("backup_verified_timestamp_seconds", text, verified_ns / 1e9, volume=volume)
    tested = max(records, key=lambda record: record.tested_ns)
    text = "When a backup of the volume was last put to a restore test, Unix time; 0: never."
    families.gauge("backup_tested_timestamp_seconds", text, tested.tested_ns / 1e9, volume=volume)
    text = "Whether the last restore test of the volume failed."
    families.gauge("backup_test_failed", text, bool(tested.test_error), volume=volume)
    text = "Backups that are protected from deletion."
    families.gauge("backups_protected", text, sum(record.protected for record in records), volume=volume)
    text = "Backups that found the standby's change tracking wrong."
    families.gauge("backup_alarms", text, sum(bool(record.alarm) for record in records), volume=volume)
