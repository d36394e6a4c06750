"""Reads backups back: into a target, or only to compare checksums."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import aclosing

from stillpoint.target import Target

from .progress import Progress, Report
from .repository import BackupId, BackupReader, Repository
from .streaming import stream


async def restore(reader: BackupReader, target: Target, executor: Executor, report: Report) -> None:
    """Write all of the backup to the target and finish it; aborts it when that fails or is cancelled.

    Raises DataCorrupt at the first damaged chunk, and what the target raises.
    """
    size = reader.record.origin.size
    try:
        async with aclosing(stream(reader, executor)) as pieces:
            async for piece in pieces:
                if piece.data is None:
                    await target.zeroes(piece.offset, piece.length)
                else:
                    await target.write(piece.offset, piece.data)
                report(Progress("restore", piece.offset + piece.length, size, target.written_bytes))
        await target.finish()
    except BaseException:
        await target.abort()
        raise


async def verify(
    repository: Repository,
    backup: BackupId,
    executor: Executor,
    report: Report,
    *,
    clock: Callable[[], int] = time.time_ns,
) -> None:
    """Read everything back against its checksums, and note the time, durably. Raises NotFound or DataCorrupt."""
    reader = await asyncio.to_thread(repository.open, backup)
    try:
        await asyncio.to_thread(reader.check_frame)
        size = reader.record.origin.size
        moved = 0
        async with aclosing(stream(reader, executor)) as pieces:
            async for piece in pieces:
                moved += 0 if piece.data is None else piece.length
                report(Progress("verify", piece.offset + piece.length, size, moved))
    finally:
        reader.close()
    await repository.record_verified(backup, clock())
