"""A repository in a local directory: one data file and one manifest for each backup. Format: README.md.

Invariants:
- A backup exists if and only if its manifest does. The manifest is made after everything it speaks of is durable, and
  goes, durably, before anything it speaks of.
- One process at a time has it open. Files in the making are locked (flock) by whoever makes them: what is unlocked and
  belongs to no manifest is left over from a crash, and is removed when the repository is opened.
- Only names that pass `parse_backup_id` become paths.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from stillpoint.errors import AlreadyExists, DataCorrupt, InUse, InvalidRequest, NotFound, Refused, StillpointError

from .backup_id import BackupId, new_backup_id, parse_backup_id
from .data_file import DataFile
from .folder import TEMPORARY_PREFIX, create_whole, fsync_folder, remove_if_unheld, replace_whole, system_errors
from .interface import BackupRecord, BackupWriter, Listing, Origin
from .manifest import Manifest
from .reader import DirectoryReader
from .records import SEALED_SIZE_MAX, SealedKind, seal, unseal
from .writer import DirectoryWriter

logger = logging.getLogger(__name__)

CHUNK_SIZE: Final = 256 << 10
_CHUNK_SIZE_MIN: Final = 4 << 10
_CHUNK_SIZE_MAX: Final = 4 << 20

_FORMAT_FILE: Final = "repository"
_DATA, _MANIFEST, _VERIFIED = ".data", ".manifest", ".verified"


class DirectoryRepository:
    """A Repository under one directory. Made by `open_directory`."""

    def __init__(
        self, root: Path, document: dict[str, Any], *, lock: int, level: int, threads: int, clock: Callable[[], int]
    ) -> None:
        self._root = root
        self._lock = lock
        self._uuid = str(document["uuid"])
        self._chunk_size = int(document["chunk_size"])
        self._level = level
        self._clock = clock
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="repository")

    @property
    def description(self) -> str:
        return str(self._root)

    @property
    def uuid(self) -> str:
        return self._uuid

    async def begin(self, origin: Origin) -> BackupWriter:
        backup, file = await asyncio.to_thread(self._create_data_file, origin)
        return DirectoryWriter(
            backup,
            origin,
            file,
            manifest_path=self._path(backup, _MANIFEST),
            chunk_size=self._chunk_size,
            level=self._level,
            executor=self._executor,
            clock=self._clock,
        )

    async def list(self, volume: str | None = None) -> Listing:
        return await asyncio.to_thread(self._list, volume)

    async def get(self, backup: BackupId) -> BackupRecord:
        return await asyncio.to_thread(lambda: self._manifest(backup).record)

    def open(self, backup: BackupId) -> DirectoryReader:
        manifest = self._manifest(backup)
        try:
            return DirectoryReader(self._path(backup, _DATA), manifest, chunk_size=self._chunk_size)
        except DataCorrupt:
            self._manifest(backup)  # NotFound when it was deleted meanwhile
            raise

    async def delete(self, backup: BackupId) -> None:
        await asyncio.to_thread(self._delete, backup)

    async def record_verified(self, backup: BackupId, verified_ns: int) -> None:
        contents = seal(SealedKind.VERIFIED, {"id": backup, "verified_ns": verified_ns})
        await asyncio.to_thread(self._record_verified, backup, contents)

    async def stored_bytes(self) -> int:
        return await asyncio.to_thread(self._stored_bytes)

    async def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def sweep(self) -> None:
        """Remove what a crashed writer, or a crash in the middle of a deletion, left behind."""
        with system_errors("looking for leftovers", self._root):
            for path in list(self._root.iterdir()):
                if path.name.startswith(TEMPORARY_PREFIX):
                    swept = remove_if_unheld(path)
                elif path.suffix in (_DATA, _VERIFIED) and _id_of(path) is not None:
                    swept = remove_if_unheld(path, unless=path.with_suffix(_MANIFEST))
                else:
                    continue
                if swept:
                    logger.info("removed a leftover of an interrupted backup", extra={"path": str(path)})

    def _path(self, backup: BackupId, suffix: str) -> Path:
        # An id passed the pattern when it was made; this is the last place before it becomes a path.
        return self._root / (parse_backup_id(backup) + suffix)

    def _create_data_file(self, origin: Origin) -> tuple[BackupId, DataFile]:
        if origin.size <= 0:
            raise InvalidRequest(f"volume {origin.volume} has {origin.size} bytes; there is nothing to back up")
        while True:
            backup = new_backup_id(origin.volume, self._clock())
            path = self._path(backup, _DATA)
            try:
                with system_errors("creating it", path):
                    return backup, DataFile(path, chunk_size=self._chunk_size, volume_size=origin.size)
            except StillpointError as error:
                if not isinstance(error.__cause__, FileExistsError):
                    raise

    def _ids(self) -> Iterator[BackupId]:
        with system_errors("listing it", self._root):
            names = sorted(os.listdir(self._root))
        for name in names:
            path = Path(name)
            if path.suffix == _MANIFEST and (backup := _id_of(path)) is not None:
                yield backup

    def _list(self, volume: str | None) -> Listing:
        backups, damaged = [], []
        for backup in self._ids():
            try:
                record = self._manifest(backup).record
            except NotFound:
                continue  # deleted meanwhile
            except (DataCorrupt, Refused) as error:
                logger.warning("%s", error)
                damaged.append(backup)
                continue
            if volume in (None, record.origin.volume):
                backups.append(record)
        return Listing(sorted(backups, key=lambda record: (record.origin.snapshot_ns, record.id)), damaged)

    def _manifest(self, backup: BackupId) -> Manifest:
        data = _read_small(self._path(backup, _MANIFEST), missing=f"there is no backup {backup}")
        try:
            manifest = Manifest.decode(data, backup=backup)
        except (DataCorrupt, Refused) as error:
            raise type(error)(f"backup {backup} is damaged: its manifest: {error}") from None
        return replace(manifest, record=replace(manifest.record, verified_ns=self._verified_ns(backup)))

    def _verified_ns(self, backup: BackupId) -> int:
        try:
            document = unseal(SealedKind.VERIFIED, _read_small(self._path(backup, _VERIFIED), missing="never verified"))
        except (NotFound, DataCorrupt, Refused):
            return 0  # nothing is lost but the knowledge that it was verified
        return int(document["verified_ns"]) if document["id"] == backup else 0

    def _record_verified(self, backup: BackupId, contents: bytes) -> None:
        self._manifest(backup)
        replace_whole(self._path(backup, _VERIFIED), contents)

    def _delete(self, backup: BackupId) -> None:
        manifest = self._path(backup, _MANIFEST)
        try:
            with system_errors("deleting it", manifest):
                manifest.unlink()
        except StillpointError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise NotFound(f"there is no backup {backup}") from None
            raise
        with system_errors("deleting it", manifest):
            fsync_folder(self._root)
            for suffix in (_DATA, _VERIFIED):
                self._path(backup, suffix).unlink(missing_ok=True)

    def _stored_bytes(self) -> int:
        total = 0
        with system_errors("measuring it", self._root), os.scandir(self._root) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_size
        return total


async def open_directory(
    root: Path,
    *,
    level: int = 1,
    chunk_size: int = CHUNK_SIZE,
    threads: int | None = None,
    clock: Callable[[], int] = time.time_ns,
) -> DirectoryRepository:
    """Open the repository at `root`, making it when there is none, and remove leftovers of crashes.

    level: of zstd. chunk_size: of a new repository; an existing one keeps its own. threads: for compression.
    Raises InUse when another process has it open, Refused when the directory holds something else or a format this
    program does not know, DataCorrupt, DeviceError.
    """
    threads = threads or min(4, os.cpu_count() or 1)

    def work() -> DirectoryRepository:
        document = _read_or_make_format(root, chunk_size=chunk_size, clock=clock)
        lock = _lock(root)
        try:
            repository = DirectoryRepository(root, document, lock=lock, level=level, threads=threads, clock=clock)
            repository.sweep()
        except BaseException:
            os.close(lock)
            raise
        return repository

    return await asyncio.to_thread(work)


def _read_or_make_format(root: Path, *, chunk_size: int, clock: Callable[[], int]) -> dict[str, Any]:
    assert _CHUNK_SIZE_MIN <= chunk_size <= _CHUNK_SIZE_MAX and chunk_size.bit_count() == 1
    path = root / _FORMAT_FILE
    if not path.exists():
        with system_errors("making the repository", root):
            root.mkdir(parents=True, exist_ok=True)
            fsync_folder(root.parent)
            if any(not entry.name.startswith(TEMPORARY_PREFIX) for entry in root.iterdir()):
                raise Refused(f"{root} is not empty and not a repository; name an empty directory")
        document = {"chunk_size": chunk_size, "created_ns": clock(), "uuid": str(uuid.uuid4())}
        with contextlib.suppress(AlreadyExists):
            create_whole(path, seal(SealedKind.REPOSITORY, document))
    try:
        return unseal(SealedKind.REPOSITORY, _read_small(path, missing=f"{path}: does not exist"))
    except (DataCorrupt, Refused) as error:
        raise type(error)(f"the repository {root} cannot be used: its file {_FORMAT_FILE!r}: {error}") from None


def _lock(root: Path) -> int:
    """The descriptor that holds the repository: two nodes on one would take each other's snapshots for leftovers."""
    path = root / _FORMAT_FILE
    with system_errors("locking it", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InUse(f"the repository {root} is in use by another process") from None
    return descriptor


def _id_of(path: Path) -> BackupId | None:
    try:
        return parse_backup_id(path.stem)
    except InvalidRequest:
        return None


def _read_small(path: Path, *, missing: str) -> bytes:
    try:
        with system_errors("reading it", path), path.open("rb") as file:
            return file.read(SEALED_SIZE_MAX + 1)
    except StillpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise NotFound(missing) from None
        raise
