"""The calls of BackupService that speak of backups as a whole: what there is, what it occupies, what may go."""

from __future__ import annotations

from stillpoint.wire.status import Context, answers
from stillpoint.wire.v1 import backup_pb2, common_pb2

from .maintenance import Maintenance
from .messages import backup_message, collection_message, policy_of
from .repository import Repository, parse_backup_id


class CatalogCalls:
    """A part of BackupService, which sets the attributes."""

    _repository: Repository
    _maintenance: Maintenance

    @answers
    async def ListBackups(self, request: backup_pb2.ListBackupsRequest, _: Context) -> backup_pb2.BackupList:
        listing = await self._repository.list(request.volume or None)
        return backup_pb2.BackupList(
            backups=[backup_message(record) for record in listing.backups],
            damaged=listing.damaged,
            repository_bytes=await self._repository.stored_bytes(),
        )

    @answers
    async def GetBackup(self, request: backup_pb2.BackupId, _: Context) -> backup_pb2.Backup:
        return backup_message(await self._repository.get(parse_backup_id(request.id)))

    @answers
    async def GetUsage(self, request: backup_pb2.BackupId, _: Context) -> backup_pb2.BackupUsage:
        usage = await self._repository.usage(parse_backup_id(request.id))
        return backup_pb2.BackupUsage(referenced_bytes=usage.referenced_bytes, unique_bytes=usage.unique_bytes)

    @answers
    async def ProtectBackup(self, request: backup_pb2.ProtectBackupRequest, _: Context) -> backup_pb2.Backup:
        backup = parse_backup_id(request.id)
        await self._repository.protect(backup, request.protected)
        return backup_message(await self._repository.get(backup))

    @answers
    async def DeleteBackup(self, request: backup_pb2.BackupId, _: Context) -> common_pb2.Empty:
        await self._maintenance.delete(parse_backup_id(request.id))
        return common_pb2.Empty()

    @answers
    async def PruneBackups(self, request: backup_pb2.PruneRequest, _: Context) -> backup_pb2.PruneReport:
        policy = policy_of(request.policy) if request.HasField("policy") else None
        verdicts = await self._maintenance.prune(policy=policy, volume=request.volume or None, dry_run=request.dry_run)
        if not request.dry_run:
            self._maintenance.ask()
        return backup_pb2.PruneReport(
            verdicts=[
                backup_pb2.PruneVerdict(backup=backup_message(verdict.record), kept_by=verdict.kept_by)
                for verdict in verdicts
            ]
        )

    @answers
    async def CollectGarbage(self, request: backup_pb2.CollectRequest, _: Context) -> backup_pb2.CollectReport:
        return collection_message(await self._repository.collect(fence=request.fence, dry_run=request.dry_run))
