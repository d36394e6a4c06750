"""BackupService: the edge between gRPC and the backup node. A call that is cancelled stops its work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Executor
from contextlib import aclosing, contextmanager
from typing import Any, Final, TypeVar

import grpc

from stillpoint.errors import InvalidRequest, PeerUnavailable, Refused
from stillpoint.nbd.server import NbdServer
from stillpoint.runtime import node_info
from stillpoint.target import open_target
from stillpoint.wire import chunks, streams
from stillpoint.wire.status import Context, answers
from stillpoint.wire.v1 import backup_pb2, backup_pb2_grpc, common_pb2

from .export import BackupExports
from .maintenance import Maintenance
from .progress import Progress, Report
from .puller import Puller
from .repository import BackupId, BackupRecord, Repository, parse_backup_id
from .restore import restore, verify
from .retention import RetentionPolicy
from .streaming import Piece, stream

SERVICE_NAME: Final = "stillpoint.wire.v1.BackupService"

# Between two messages of a stream of progress.
_PROGRESS_INTERVAL_S: Final = 0.2
# Backups being verified, restored or read at once; each may hold 12 MiB.
_READING_MAX: Final = 8

T = TypeVar("T")


class BackupService(backup_pb2_grpc.BackupServiceServicer):
    """Register with `add_to`; `stop` before the server stops."""

    def __init__(
        self,
        repository: Repository,
        puller: Puller,
        exports: BackupExports,
        nbd: NbdServer,
        executor: Executor,
        *,
        node: str,
        retention: RetentionPolicy,
        standby_address: str,
        nbd_address: str,
    ) -> None:
        self._repository = repository
        self._puller = puller
        self._exports = exports
        self._nbd = nbd
        self._executor = executor
        self._node = node
        self._maintenance = Maintenance(repository, retention, self._delete)
        self._standby_address = standby_address
        self._nbd_address = nbd_address
        self._jobs: set[asyncio.Task[Any]] = set()
        self._stopping = False
        self._reading_count = 0

    def add_to(self, server: grpc.aio.Server) -> None:
        backup_pb2_grpc.add_BackupServiceServicer_to_server(self, streams.RawServer(server))

    async def maintain(self) -> None:
        """Prune and collect when there is reason to. Until cancelled."""
        await self._maintenance.run()

    async def stop(self) -> None:
        """Cancel the jobs and wait until each has cleaned up after itself."""
        self._stopping = True
        jobs = list(self._jobs)
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)

    @answers
    async def RunBackup(self, request: backup_pb2.RunBackupRequest, context: Context) -> None:
        async def send(progress: Progress) -> None:
            await context.write(backup_pb2.BackupEvent(progress=progress_message(progress)))

        async def job(report: Report) -> BackupRecord:
            record = await self._puller.run(request.volume, snapshot=request.snapshot, full=request.full, report=report)
            # Here, so that it is exported also when nobody waits for the answer any more.
            self._exports.add(record)
            self._maintenance.ask()
            return record

        record = await self._run_job(job, send)
        await context.write(backup_pb2.BackupEvent(backup=backup_message(record)))

    @answers
    async def ListBackups(self, request: backup_pb2.ListBackupsRequest, _: Context) -> backup_pb2.BackupList:
        listing = await self._repository.list(request.volume or None)
        return backup_pb2.BackupList(
            backups=[backup_message(record) for record in listing.backups], damaged=listing.damaged
        )

    @answers
    async def GetBackup(self, request: backup_pb2.BackupId, _: Context) -> backup_pb2.Backup:
        return backup_message(await self._repository.get(parse_backup_id(request.id)))

    @answers
    async def DeleteBackup(self, request: backup_pb2.BackupId, _: Context) -> common_pb2.Empty:
        await self._delete(parse_backup_id(request.id))
        self._maintenance.ask()
        return common_pb2.Empty()

    @answers
    async def VerifyBackup(self, request: backup_pb2.BackupId, context: Context) -> None:
        backup = parse_backup_id(request.id)
        with self._reading():
            await self._run_counted(lambda report: verify(self._repository, backup, self._executor, report), context)

    @answers
    async def RestoreBackup(self, request: backup_pb2.RestoreBackupRequest, context: Context) -> None:
        backup = parse_backup_id(request.id)
        if "://" not in request.target and not request.target.startswith("/"):
            raise InvalidRequest(f"{request.target[:200]!r}: the backup node needs an absolute path or an nbd:// URI")

        async def job(report: Report) -> None:
            reader = await asyncio.to_thread(self._repository.open, backup)
            try:
                target = await open_target(request.target, size=reader.record.origin.size, force=request.force)
                await restore(reader, target, self._executor, report)
            finally:
                reader.close()

        with self._reading():
            await self._run_counted(job, context)

    @answers
    async def ReadBackup(self, request: backup_pb2.ReadBackupRequest, _: Context) -> AsyncIterator[bytes]:
        backup = parse_backup_id(request.id)
        with self._reading():
            reader = await asyncio.to_thread(self._repository.open, backup)
            try:
                async with aclosing(stream(reader, self._executor)) as pieces:
                    async for piece in pieces:
                        yield _encode(piece)
            finally:
                reader.close()

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
        )

    async def _delete(self, backup: BackupId) -> None:
        await self._repository.delete(backup)
        export = self._exports.remove(backup)
        if export is not None:
            await self._nbd.drop(export)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Raises Refused when the memory set aside for reading is taken."""
        if self._reading_count >= _READING_MAX:
            raise Refused(f"the backup node is reading {_READING_MAX} backups already; wait until one of them is done")
        self._reading_count += 1
        try:
            yield
        finally:
            self._reading_count -= 1

    async def _run_counted(self, job: Callable[[Report], Coroutine[Any, Any, None]], context: Context) -> None:
        """Run a job that only reports progress; the last message says that it is done."""
        last = Progress("")

        async def send(progress: Progress) -> None:
            nonlocal last
            last = progress
            await context.write(progress_message(progress))

        await self._run_job(job, send)
        await context.write(progress_message(last, done=True))

    async def _run_job(
        self, job: Callable[[Report], Coroutine[Any, Any, T]], send: Callable[[Progress], Awaitable[None]]
    ) -> T:
        """Run `job` and send what it last reported, a few times a second and at its end.

        The job is cancelled, and has cleaned up, when this call is cancelled.
        """
        latest: Progress | None = None

        def report(progress: Progress) -> None:
            nonlocal latest
            latest = progress

        if self._stopping:
            raise PeerUnavailable("the backup node is stopping")
        task = asyncio.create_task(job(report))
        self._jobs.add(task)
        try:
            while True:
                await asyncio.wait([task], timeout=_PROGRESS_INTERVAL_S)
                if latest is not None:
                    progress, latest = latest, None
                    await send(progress)
                if task.done():
                    break
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
            self._jobs.discard(task)
        if task.cancelled():
            raise PeerUnavailable("the backup node is stopping")
        return task.result()


def _encode(piece: Piece) -> bytes:
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
    )
