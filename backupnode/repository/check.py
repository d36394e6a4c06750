"""Proves the whole repository: every pack against its name, or every blob against its id, then every backup's index.

What is found damaged counts as missing from then on, durably, so the next backup of the same bytes stores them anew and
heals every backup that has them. A backup is affected while something that it names is missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING

from blake3 import blake3

from stillpoint.errors import DataCorrupt, NotFound, Refused

from .backup_id import BackupId
from .blobs import BLOB_HEADER_SIZE, BlobKind, check_stored, decode
from .interface import CheckReport
from .packs import FOLDER, scan_blobs

if TYPE_CHECKING:
    from .repository import PackRepository


async def check(
    repository: PackRepository, executor: Executor, *, deep: bool, report: Callable[[int, int], None]
) -> CheckReport:
    """deep: also decrypt, decompress and hash every blob; without it no key is needed.

    report: bytes of packs done, and in all. Raises DeviceError.
    """
    loop = asyncio.get_running_loop()
    result = CheckReport()
    storage = repository.storage
    for name, count in (await loop.run_in_executor(repository.packs.thread, repository.packs.lose_gone)).items():
        result.damaged_packs.append(name)
        result.lost_blobs += count
    names = await asyncio.to_thread(storage.names, FOLDER)
    sizes = {name: await loop.run_in_executor(executor, storage.size, f"{FOLDER}/{name}") for name in names}
    total = sum(sizes.values())
    for name, size in sizes.items():
        lost = await loop.run_in_executor(executor, lambda name=name: check_pack(repository, name, deep=deep))  # type: ignore[misc]
        if lost is not None:
            result.damaged_packs.append(name)
            result.lost_blobs += await repository.lose(name, lost)
        result.checked_packs += 1
        result.checked_bytes += size
        report(result.checked_bytes, total)
    for backup in await asyncio.to_thread(lambda: list(repository.ids())):
        wrong = await loop.run_in_executor(executor, _check_backup, repository, backup)
        if wrong:
            result.affected[backup] = wrong
    return result


def check_pack(repository: PackRepository, name: str, *, deep: bool) -> frozenset[int] | None:
    """None: it is right. Otherwise the offsets of the blobs in it that are right nevertheless."""
    try:
        data = memoryview(repository.storage.read(f"{FOLDER}/{name}"))
    except NotFound:
        return None  # collected meanwhile
    whole = blake3(data).hexdigest() == name
    if whole and not deep:
        return None
    right, wrong = set[int](), 0
    for offset, header in scan_blobs(name, len(data), lambda offset, length: data[offset : offset + length]):
        blob = data[offset : offset + header.blob_size]
        try:
            if deep:
                decode(blob, BlobKind(header.kind), header.id, repository.packs.keys)
            else:
                check_stored(header, blob[BLOB_HEADER_SIZE:])
            right.add(offset)
        except DataCorrupt:
            wrong += 1
    return None if whole and not wrong else frozenset(right)


def _check_backup(repository: PackRepository, backup: BackupId) -> str:
    """What is wrong with it; "": nothing."""
    try:
        missing = sum(1 for _ in repository.open(backup).missing_chunks())
    except NotFound:
        return ""  # deleted meanwhile
    except (DataCorrupt, Refused) as error:
        return str(error)
    return f"{missing} of its chunks are damaged or missing" if missing else ""
