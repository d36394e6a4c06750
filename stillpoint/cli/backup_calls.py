"""What the commands of `standbyctl backup` ask of the backup node, and how they show a backup."""

from __future__ import annotations

from typing import Any

from ..errors import ProtocolError
from ..wire.v1 import backup_pb2, common_pb2
from .nodes import Nodes
from .output import ProgressBar, iso_time


def backup_document(backup: backup_pb2.Backup) -> dict[str, Any]:
    return {
        "id": backup.id,
        "state": "complete",
        "volume": backup.volume,
        "volume_uuid": backup.volume_uuid,
        "snapshot": backup.snapshot,
        "size": backup.size,
        "instant": iso_time(backup.snapshot_ns),
        "finished": iso_time(backup.finished_ns),
        "data_bytes": backup.data_bytes,
        "stored_bytes": backup.stored_bytes,
        "dedup_ratio": ratio(backup.data_bytes, backup.stored_bytes),
        "received_bytes": backup.received_bytes,
        "duration_s": backup.duration_ns / 1e9,
        "base": backup.base or None,
        "verified": iso_time(backup.verified_ns),
        "protected": backup.protected,
        "tested": iso_time(backup.tested_ns),
        "test_error": backup.test_error or None,
        "alarm": backup.alarm or None,
    }


def ratio(data_bytes: int, stored_bytes: int) -> float | None:
    """How many bytes of data for each that was stored; None when nothing had to be stored."""
    return round(data_bytes / stored_bytes, 2) if stored_bytes else None


async def run_backup(
    nodes: Nodes, volume: str, *, snapshot: str = "", full: bool = False, bar: ProgressBar
) -> backup_pb2.Backup:
    request = backup_pb2.RunBackupRequest(volume=volume, snapshot=snapshot, full=full)
    return await follow_backup(nodes, "RunBackup", request, volume, bar)


async def follow_backup(nodes: Nodes, method: str, request: Any, what: str, bar: ProgressBar) -> backup_pb2.Backup:
    """The backup made by a call that reports its progress. Raises ProtocolError when it ends without one."""
    made: backup_pb2.Backup | None = None
    async for event in nodes.backup.stream(method, request, backup_pb2.BackupEvent):
        if event.HasField("progress"):
            bar.update(event.progress.done_bytes, event.progress.total_bytes)
        if event.HasField("backup"):
            made = event.backup
    if made is None:
        raise ProtocolError(f"{what}: the backup node ended without saying what became of the backup")
    return made


async def list_backups(nodes: Nodes, volume: str = "") -> backup_pb2.BackupList:
    """The oldest first."""
    request = backup_pb2.ListBackupsRequest(volume=volume)
    return await nodes.backup.call("ListBackups", request, backup_pb2.BackupList)


async def get_backup(nodes: Nodes, identity: str) -> backup_pb2.Backup:
    return await nodes.backup.call("GetBackup", backup_pb2.BackupId(id=identity), backup_pb2.Backup)


async def follow(nodes: Nodes, method: str, request: Any, bar: ProgressBar) -> int:
    """Bytes moved by a job that reports its progress. Raises ProtocolError when it ends without being done."""
    last = common_pb2.Progress()
    async for last in nodes.backup.stream(method, request, common_pb2.Progress):
        bar.update(last.done_bytes, last.total_bytes)
    if not last.done:
        raise ProtocolError(f"backup {request.id}: the backup node ended in the middle of it")
    return last.moved_bytes
