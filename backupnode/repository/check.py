"""Proves the repository: every pack against its name, or every blob against its id, then every backup's index.

What is found damaged counts as missing from then on, durably, so the next backup of the same bytes stores them anew and
heals every backup that has them. A backup is affected while something that it names is missing.

A check of limited time goes through the packs in the order of their names, which are hashes and so never change places,
and notes where it stopped; the next one goes on there. A pass ends at the last name.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from stillpoint.errors import DataCorrupt, NotFound, Refused

from .backup_id import BackupId
from .blobs import BLOB_HEADER_SIZE, BlobHeader, BlobKind, check_stored, decode
from .interface import CheckReport
from .notes import Pass
from .packs import FOLDER, scan_blobs

if TYPE_CHECKING:
    from .repository import PackRepository

# Packs in memory at once.
_AT_ONCE: Final = 2


async def check(
    repository: PackRepository,
    executor: Executor,
    *,
    deep: bool,
    report: Callable[[int, int], None],
    budget_s: float | None = None,
    clock: Callable[[], int] = time.time_ns,
) -> CheckReport:
    """deep: also decrypt, decompress and hash every blob; without it no key is needed for the packs.

    report: bytes of packs done, and in all. budget_s: for the packs; then it stops, and the next such check goes on
    where this one ended. Raises DeviceError.
    """
    loop = asyncio.get_running_loop()
    result = CheckReport()
    repository.storage.forget_read()
    for name, count in (await loop.run_in_executor(repository.packs.thread, repository.packs.lose_gone)).items():
        result.damaged_packs.append(name)
        result.lost_blobs += count
    before = Pass(clock()) if budget_s is None else await asyncio.to_thread(repository.notes.open_pass, deep=deep)
    under_way = before if before is not None else Pass(clock())
    try:
        under_way = await _check_packs(repository, executor, under_way, result, deep, report, budget_s)
    finally:
        if budget_s is not None:
            await asyncio.to_thread(repository.notes.put_pass, under_way, deep=deep)
    result.pass_started_ns = under_way.started_ns if result.complete else 0
    result.damaged_notes = await asyncio.to_thread(repository.notes.damaged)
    for backup in await asyncio.to_thread(repository.gone):
        result.affected[backup] = "its manifest is gone"
    for backup in await asyncio.to_thread(lambda: list(repository.ids())):
        wrong = await loop.run_in_executor(executor, _check_backup, repository, backup)
        if wrong:
            result.affected[backup] = wrong
    return result


async def _check_packs(
    repository: PackRepository,
    executor: Executor,
    under_way: Pass,
    result: CheckReport,
    deep: bool,
    report: Callable[[int, int], None],
    budget_s: float | None,
) -> Pass:
    """Returns where to go on."""
    loop = asyncio.get_running_loop()
    started_s = time.monotonic()
    sizes = await asyncio.to_thread(repository.storage.sizes, FOLDER)
    left = deque(sorted(name for name in sizes if name > under_way.after))
    total = sum(sizes[name] for name in left)
    checking: deque[tuple[str, asyncio.Future[dict[int, BlobHeader] | None]]] = deque()

    def out_of_time() -> bool:
        return budget_s is not None and time.monotonic() - started_s >= budget_s and result.checked_packs > 0

    try:
        while left or checking:
            while left and len(checking) < _AT_ONCE and not out_of_time():
                name = left.popleft()
                call = partial(check_pack, repository, name, deep=deep)
                checking.append((name, loop.run_in_executor(executor, call)))
            if not checking:
                return under_way
            name, future = checking.popleft()
            right = await future
            if right is not None:
                result.damaged_packs.append(name)
                result.lost_blobs += await repository.lose(name, right)
            result.checked_packs += 1
            result.checked_bytes += sizes[name]
            under_way = Pass(under_way.started_ns, name)
            report(result.checked_bytes, total)
    finally:
        await asyncio.gather(*(future for _, future in checking), return_exceptions=True)
    result.complete = True
    return Pass(under_way.started_ns, "", ended=True)


def check_pack(repository: PackRepository, name: str, *, deep: bool) -> dict[int, BlobHeader] | None:
    """None: it is right. Otherwise the blobs in it that are right nevertheless, by their offsets."""
    try:
        data = memoryview(repository.storage.read(f"{FOLDER}/{name}"))
    except NotFound:
        return None  # collected meanwhile
    whole = blake3(data).hexdigest() == name
    if whole and not deep:
        return None
    right, wrong = dict[int, BlobHeader](), 0
    for offset, header in scan_blobs(name, len(data), lambda offset, length: data[offset : offset + length]):
        blob = data[offset : offset + header.blob_size]
        try:
            if deep:
                decode(blob, BlobKind(header.kind), header.id, repository.packs.keys)
            else:
                check_stored(header, blob[BLOB_HEADER_SIZE:])
            right[offset] = header
        except DataCorrupt:
            wrong += 1
    return None if whole and not wrong else right


def _check_backup(repository: PackRepository, backup: BackupId) -> str:
    """What is wrong with it; "": nothing."""
    try:
        missing = sum(1 for _ in repository.open(backup).missing_chunks())
    except NotFound:
        return ""  # deleted meanwhile
    except (DataCorrupt, Refused) as error:
        return str(error)
    return f"{missing} of its chunks are damaged or missing" if missing else ""
