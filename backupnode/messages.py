"""The backup node's values as messages, and back."""

from __future__ import annotations

from collections.abc import Sequence

from stillpoint.wire import chunks
from stillpoint.wire.v1 import backup_pb2, common_pb2

from .progress import Progress
from .repository import BackupRecord, CheckReport, CollectionReport
from .retention import RetentionPolicy
from .scheduler import ScheduleStatus
from .streaming import Piece


def encoded_piece(piece: Piece) -> bytes:
    if piece.data is None:
        return chunks.encode_hole(piece.offset, piece.length)
    return chunks.encode_data(piece.offset, piece.data)


def progress_message(progress: Progress, *, done: bool = False) -> common_pb2.Progress:
    return common_pb2.Progress(
        phase=progress.phase,
        done_bytes=progress.done_bytes,
        total_bytes=progress.total_bytes,
        moved_bytes=progress.moved_bytes,
        done=done,
    )


def backup_message(record: BackupRecord) -> backup_pb2.Backup:
    origin = record.origin
    return backup_pb2.Backup(
        id=record.id,
        volume=origin.volume,
        volume_uuid=origin.volume_uuid,
        snapshot=origin.snapshot,
        size=origin.size,
        snapshot_ns=origin.snapshot_ns,
        finished_ns=record.finished_ns,
        data_bytes=record.data_bytes,
        stored_bytes=record.stored_bytes,
        received_bytes=record.received_bytes,
        duration_ns=record.duration_ns,
        base=origin.base or "",
        verified_ns=record.verified_ns,
        protected=record.protected,
        alarm=record.alarm,
        tested_ns=record.tested_ns,
        test_error=record.test_error,
    )


def policy_of(message: backup_pb2.RetentionPolicy) -> RetentionPolicy:
    return RetentionPolicy(
        last=message.last,
        hourly=message.hourly,
        daily=message.daily,
        weekly=message.weekly,
        monthly=message.monthly,
        yearly=message.yearly,
    )


def collection_message(report: CollectionReport) -> backup_pb2.CollectReport:
    return backup_pb2.CollectReport(
        deleted_packs=report.deleted_packs,
        deleted_bytes=report.deleted_bytes,
        repacked_bytes=report.repacked_bytes,
        pending_packs=report.pending_packs,
        pending_bytes=report.pending_bytes,
        unreferenced_bytes=report.unreferenced_bytes,
    )


def check_message(report: CheckReport, whole: Sequence[str]) -> backup_pb2.CheckReport:
    return backup_pb2.CheckReport(
        checked_bytes=report.checked_bytes,
        checked_packs=report.checked_packs,
        damaged_packs=report.damaged_packs,
        lost_blobs=report.lost_blobs,
        affected=[backup_pb2.AffectedBackup(id=backup, reason=reason) for backup, reason in report.affected.items()],
        whole=whole,
        damaged_notes=report.damaged_notes,
        complete=report.complete,
        pass_started_ns=report.pass_started_ns,
    )


def schedule_message(status: ScheduleStatus) -> backup_pb2.Schedule:
    config, state = status.config, status.state
    return backup_pb2.Schedule(
        name=config.label,
        volume=config.volume,
        when=config.when,
        full=config.full,
        paused=state.paused,
        running=state.running,
        due_ns=status.due.at_ns if status.due else 0,
        due_is_retry=status.due.retry if status.due else False,
        failures=state.failures,
        started_ns=state.started_ns,
        finished_ns=state.finished_ns,
        success_ns=state.success_ns,
        backup=state.backup,
        error=state.error,
    )
