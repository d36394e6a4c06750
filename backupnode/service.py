"""BackupService: the edge between gRPC and the backup node. A call that is cancelled stops its work."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor
from typing import Final

import grpc

from stillpoint.nbd.server import NbdServer
from stillpoint.runtime import node_info
from stillpoint.wire import streams
from stillpoint.wire.status import Context, answers
from stillpoint.wire.v1 import backup_pb2, backup_pb2_grpc, common_pb2

from .catalog_calls import CatalogCalls
from .config import BackupNodeConfig
from .export import BackupExports
from .jobs import Jobs
from .maintenance import Maintenance
from .messages import backup_message, progress_message
from .notify import Notifier
from .problems import find_problems
from .progress import Progress, Report
from .puller import Puller
from .reading_calls import ReadingCalls
from .repository import BackupId, BackupRecord, Repository
from .restore_test import RestoreTest
from .schedule_calls import ScheduleCalls
from .scheduler import Scheduler

SERVICE_NAME: Final = "stillpoint.wire.v1.BackupService"


class BackupService(CatalogCalls, ReadingCalls, ScheduleCalls, backup_pb2_grpc.BackupServiceServicer):
    """Register with `add_to`; `stop` before the server stops."""

    def __init__(
        self,
        repository: Repository,
        puller: Puller,
        exports: BackupExports,
        nbd: NbdServer,
        executor: Executor,
        config: BackupNodeConfig,
        *,
        nbd_address: str,
    ) -> None:
        self._repository = repository
        self._puller = puller
        self._exports = exports
        self._nbd = nbd
        self._executor = executor
        self._node = config.node
        self._maintenance = Maintenance(repository, config.retention, self._forget)
        self.scheduler = Scheduler(
            config.schedules,
            config.state_dir / "schedules.json",
            self._back_up,
            self._test,
            puller.is_running,
            Notifier(config.notify),
            node=config.node,
        )
        self._restore_test = RestoreTest(config.state_dir, config.restore_test, executor)
        self._standby_address = str(config.standby.grpc)
        self._nbd_address = nbd_address
        self._jobs = Jobs()

    def add_to(self, server: grpc.aio.Server) -> None:
        backup_pb2_grpc.add_BackupServiceServicer_to_server(self, streams.RawServer(server))

    async def maintain(self) -> None:
        """Prune and collect when there is reason to. Until cancelled."""
        await self._maintenance.run()

    async def keep_schedules(self) -> None:
        """Back up when it is time. Until cancelled; what runs then has cleaned up."""
        await self.scheduler.run()

    async def stop(self) -> None:
        """Cancel the jobs and wait until each has cleaned up after itself."""
        await self._jobs.stop()

    @answers
    async def RunBackup(self, request: backup_pb2.RunBackupRequest, context: Context) -> None:
        async def send(progress: Progress) -> None:
            await context.write(backup_pb2.BackupEvent(progress=progress_message(progress)))

        async def job(report: Report) -> BackupRecord:
            return await self._back_up(request.volume, snapshot=request.snapshot, full=request.full, report=report)

        record = await self._jobs.run(job, send)
        await context.write(backup_pb2.BackupEvent(backup=backup_message(record)))

    @answers
    async def GetStatus(self, _request: common_pb2.Empty, _: Context) -> backup_pb2.BackupStatus:
        listing = await self._repository.list()
        return backup_pb2.BackupStatus(
            info=node_info(self._node),
            repository=self._repository.description,
            repository_bytes=await self._repository.stored_bytes(),
            backup_count=len(listing.backups),
            standby_address=self._standby_address,
            nbd_address=self._nbd_address,
            running=self._puller.running,
            problems=find_problems(
                listing,
                self.scheduler.statuses(),
                damaged_blobs=self._repository.quarantined_count,
                now_ns=time.time_ns(),
            ),
        )

    async def _back_up(self, volume: str, *, snapshot: str = "", full: bool, report: Report) -> BackupRecord:
        record = await self._puller.run(volume, snapshot=snapshot, full=full, report=report)
        # Here, so that it is exported also when nobody waits for the answer any more.
        self._exports.add(record)
        self._maintenance.ask()
        return record

    async def _forget(self, backup: BackupId) -> None:
        await self._repository.delete(backup)
        export = self._exports.remove(backup)
        if export is not None:
            await self._nbd.drop(export)
            await asyncio.to_thread(self._exports.forget, backup)
