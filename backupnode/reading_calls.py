"""The calls of BackupService that read backups back: to verify, check, restore, or hand out their bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Executor
from contextlib import aclosing
from typing import Any

from stillpoint.errors import InvalidRequest, NotFound
from stillpoint.target import open_target
from stillpoint.wire.status import Context, answers
from stillpoint.wire.v1 import backup_pb2

from .export import BackupExports
from .jobs import Jobs
from .messages import check_message, encoded_piece, progress_message
from .progress import Progress, Report
from .repository import BackupId, CheckReport, Repository, parse_backup_id
from .restore import restore, verify
from .restore_test import RestoreTest, RestoreTestResult
from .streaming import stream


class ReadingCalls:
    """A part of BackupService, which sets the attributes."""

    _repository: Repository
    _exports: BackupExports
    _executor: Executor
    _jobs: Jobs
    _nbd_address: str
    _restore_test: RestoreTest

    @answers
    async def VerifyBackup(self, request: backup_pb2.BackupId, context: Context) -> None:
        backup = parse_backup_id(request.id)
        with self._jobs.reading():
            await self._run_counted(lambda report: verify(self._repository, backup, self._executor, report), context)

    @answers
    async def TestRestore(self, request: backup_pb2.BackupId, _: Context) -> backup_pb2.RestoreTest:
        backup = parse_backup_id(request.id)
        with self._jobs.reading():
            result = await self._jobs.run(lambda _report: self._test(backup), _tell_nobody)
        return backup_pb2.RestoreTest(
            passed=result.passed,
            detail=result.detail,
            finished_ns=result.finished_ns,
            duration_ns=result.duration_ns,
        )

    @answers
    async def CheckRepository(self, request: backup_pb2.CheckRequest, context: Context) -> None:
        async def send(progress: Progress) -> None:
            await context.write(backup_pb2.CheckEvent(progress=progress_message(progress)))

        async def job(report: Report) -> tuple[CheckReport, list[BackupId]]:
            return await self._check(report, deep=request.deep, budget_s=request.budget_s or None)

        with self._jobs.reading():
            found, whole = await self._jobs.run(job, send)
        await context.write(backup_pb2.CheckEvent(report=check_message(found, whole)))

    @answers
    async def ExportBackup(self, request: backup_pb2.ExportBackupRequest, _: Context) -> backup_pb2.BackupExport:
        if request.writable and request.discard:
            raise InvalidRequest("what is written to an export cannot be kept and discarded at once")
        record = await self._repository.get(parse_backup_id(request.id))
        if request.discard:
            export = self._exports.discard(record)
        else:
            export = self._exports.make_writable(record) if request.writable else self._exports.of(record)
        return backup_pb2.BackupExport(name=export.name, address=self._nbd_address, writable=not export.read_only)

    @answers
    async def RestoreBackup(self, request: backup_pb2.RestoreBackupRequest, context: Context) -> None:
        backup = parse_backup_id(request.id)
        if "://" not in request.target and not request.target.startswith("/"):
            raise InvalidRequest(f"{request.target[:200]!r}: the backup node needs an absolute path or an nbd:// URI")

        async def job(report: Report) -> None:
            reader = await asyncio.to_thread(self._repository.open, backup)
            try:
                target = await open_target(
                    request.target,
                    size=reader.record.origin.size,
                    force=request.force,
                    differences=request.differences,
                    verify=request.verify,
                )
                await restore(reader, target, self._executor, report)
            finally:
                reader.close()

        with self._jobs.reading():
            await self._run_counted(job, context)

    @answers
    async def ReadBackup(self, request: backup_pb2.ReadBackupRequest, _: Context) -> AsyncIterator[bytes]:
        backup = parse_backup_id(request.id)
        with self._jobs.reading():
            reader = await asyncio.to_thread(self._repository.open, backup)
            try:
                async with aclosing(stream(reader, self._executor)) as pieces:
                    async for piece in pieces:
                        yield encoded_piece(piece)
            finally:
                reader.close()

    async def _test(self, backup: BackupId) -> RestoreTestResult:
        """Put it to the test, and note the result with it."""
        record = await self._repository.get(backup)
        result = await self._restore_test.run(record, lambda: self._repository.open(backup))
        error = "" if result.passed else result.detail
        await self._repository.record_tested(backup, result.finished_ns, error)
        return result

    async def _check(self, report: Report, *, deep: bool, budget_s: float | None) -> tuple[CheckReport, list[BackupId]]:
        """What was found, and the ids of the backups that were there before and are whole."""
        before = (await self._repository.list()).backups
        found = await self._repository.check(
            self._executor,
            deep=deep,
            report=lambda done, total: report(Progress("verify", done, total, done)),
            budget_s=budget_s,
        )
        whole = [record.id for record in before if record.id not in found.affected]
        for record in before if deep else []:
            # Of one that came after the pass began, some packs may have been left out.
            if record.id in whole and record.finished_ns <= found.pass_started_ns:
                try:
                    await self._repository.record_verified(record.id, found.pass_started_ns)
                except NotFound:
                    whole.remove(record.id)  # deleted meanwhile
        return found, whole

    async def _run_counted(self, job: Callable[[Report], Coroutine[Any, Any, None]], context: Context) -> None:
        """Run a job that only reports progress; the last message says that it is done."""
        last = Progress("")

        async def send(progress: Progress) -> None:
            nonlocal last
            last = progress
            await context.write(progress_message(progress))

        await self._jobs.run(job, send)
        await context.write(progress_message(last, done=True))


async def _tell_nobody(_: Progress) -> None:
    """A restore test does not say how far it is."""
