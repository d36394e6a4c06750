"""Any backup as an NBD export, `VOLUME@BACKUPID`, from its commit on; writable on an overlay if asked for.

Reads run in threads of low priority: a backup that is being made goes before one that is being looked at.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Final, NoReturn

from stillpoint.devices import BlockDevice, Buffer
from stillpoint.errors import PermissionRefused, Refused, StillpointError
from stillpoint.extents import Extent, MappedExtent, check_range, coalesce, split
from stillpoint.nbd.export import DeviceExport

from .overlays import Overlays
from .repository import BackupId, BackupReader, BackupRecord

logger = logging.getLogger(__name__)

# Of each export that is being read.
_CACHED_BYTES: Final = 8 << 20
_NICENESS: Final = 10


def low_priority_executor() -> ThreadPoolExecutor:
    """Two threads that yield the processor to the rest of the process."""
    return ThreadPoolExecutor(2, thread_name_prefix="export", initializer=_lower_priority)


def _lower_priority() -> None:
    # On Linux the niceness belongs to the thread.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


class BackupDevice:
    """A backup as a read-only BlockDevice. The reader is opened by the first use and closed by `release`."""

    read_only = True

    def __init__(self, record: BackupRecord, open_reader: Callable[[], BackupReader]) -> None:
        self.size = record.origin.size
        self.description = f"backup {record.id}"
        self._open_reader = open_reader
        self._reader: BackupReader | None = None
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, bytes | None] = OrderedDict()

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        check_range(offset=offset, length=len(buffer), size=self.size)
        # Whoever holds the lock may be waiting for the disk.
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self._reader is None:
                return False
            chunk_size = self._reader.chunk_size
            extents = list(split(Extent(offset, len(buffer)), limit=chunk_size))
            if any(extent.offset // chunk_size not in self._cache for extent in extents):
                return False
            for extent in extents:
                _copy(self._cache[extent.offset // chunk_size], extent, chunk_size, buffer[extent.offset - offset :])
        finally:
            self._lock.release()
        return True

    def read_into(self, offset: int, buffer: memoryview) -> None:
        check_range(offset=offset, length=len(buffer), size=self.size)
        chunk_size = self._opened().chunk_size
        for extent in split(Extent(offset, len(buffer)), limit=chunk_size):
            chunk = self._chunk(extent.offset // chunk_size)
            _copy(chunk, extent, chunk_size, buffer[extent.offset - offset :])

    def extents(self, offset: int, length: int) -> Iterator[MappedExtent]:
        check_range(offset=offset, length=length, size=self.size)
        return coalesce(self._extents(Extent(offset, length)))

    def _extents(self, wanted: Extent) -> Iterator[MappedExtent]:
        reader = self._opened()
        position = wanted.offset
        for index in reader.data_chunks(wanted.offset // reader.chunk_size):
            start = max(position, index * reader.chunk_size)
            if start >= wanted.end:
                break
            end = min(wanted.end, (index + 1) * reader.chunk_size)
            yield MappedExtent(position, start - position, hole=True)
            yield MappedExtent(start, end - start, hole=False)
            position = end
        yield MappedExtent(position, wanted.end - position, hole=True)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._refuse()

    def trim(self, offset: int, length: int) -> None:
        self._refuse()

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        self._refuse()

    def resize(self, size: int) -> None:
        self._refuse()

    def flush(self) -> None:
        """Nothing is ever written."""

    def close(self) -> None:
        self.release()

    def release(self) -> None:
        """Give back files and memory until the next use. No call may be running in another thread."""
        with self._lock:
            reader, self._reader = self._reader, None
            self._cache.clear()
        if reader is not None:
            reader.close()

    def _opened(self) -> BackupReader:
        with self._lock:
            if self._reader is None:
                self._reader = self._open_reader()
            return self._reader

    def _chunk(self, index: int) -> bytes | None:
        reader = self._opened()
        with self._lock:
            if index in self._cache:
                self._cache.move_to_end(index)
                return self._cache[index]
        chunk = reader.read_chunk(index)
        with self._lock:
            self._cache[index] = chunk
            if len(self._cache) * reader.chunk_size > _CACHED_BYTES:
                self._cache.popitem(last=False)
        return chunk

    def _refuse(self) -> NoReturn:
        raise PermissionRefused(f"{self.description}: is read-only")


def _copy(chunk: bytes | None, extent: Extent, chunk_size: int, buffer: memoryview) -> None:
    start = extent.offset % chunk_size
    buffer[: extent.length] = bytes(extent.length) if chunk is None else chunk[start : start + extent.length]


class BackupExport(DeviceExport):
    """Holds its reader only while somebody is connected. `overlays`: has one for the backup, so it is writable."""

    def __init__(
        self,
        record: BackupRecord,
        open_reader: Callable[[], BackupReader],
        executor: Executor,
        overlays: Overlays | None = None,
    ) -> None:
        self._backup_device = BackupDevice(record, open_reader)
        device: BlockDevice = self._backup_device
        if overlays is not None:
            device = overlays.over(self._backup_device, record)
        super().__init__(export_name(record), device, executor, read_only=device.read_only)
        self.record = record

    def closed(self) -> None:
        super().closed()
        if not self.connection_count:
            self._backup_device.release()

    def close(self) -> None:
        """Make what was written durable and give everything back. Nobody may be connected. May wait for the disk."""
        self._device.flush()
        self._device.close()


def export_name(record: BackupRecord) -> str:
    return f"{record.origin.volume}@{record.id}"


class BackupExports(Mapping[str, BackupExport]):
    """The directory of what an NBD client may ask for: every backup, read-only unless it has an overlay."""

    def __init__(self, open_reader: Callable[[BackupId], BackupReader], executor: Executor, overlays: Overlays) -> None:
        self._open_reader = open_reader
        self._executor = executor
        self._overlays = overlays
        self._exports: dict[str, BackupExport] = {}

    def add(self, record: BackupRecord) -> None:
        """An overlay that cannot be used is left alone, and the backup read-only."""
        overlays = self._overlays if self._overlays.exists(record.id) else None
        try:
            self._put(record, overlays)
        except StillpointError as error:
            logger.error("backup %s is exported read-only: %s", record.id, error)
            self._put(record, None)

    def of(self, record: BackupRecord) -> BackupExport:
        return self[export_name(record)]

    def make_writable(self, record: BackupRecord) -> BackupExport:
        """From now on, with what is written in an overlay. May wait for the disk. Raises Refused, DeviceError.

        One that is writable stays as it is.
        """
        export = self.of(record)
        if export.read_only:
            self._refuse_if_used(export)
            self._overlays.create(record)
            self._put(record, self._overlays)
        return self.of(record)

    def discard(self, record: BackupRecord) -> BackupExport:
        """Throw away what was written, and serve the backup read-only again. Raises Refused, DeviceError."""
        export = self.of(record)
        if not export.read_only:
            self._refuse_if_used(export)
            export.close()
            self._put(record, None)
        self._overlays.delete(record.id)
        return self.of(record)

    def remove(self, backup: BackupId) -> BackupExport | None:
        """Take it out; the caller ends its connections, and then calls `forget`."""
        for name, export in self._exports.items():
            if export.record.id == backup:
                return self._exports.pop(name)
        return None

    def forget(self, backup: BackupId) -> None:
        """What was written to a backup that is gone. Raises DeviceError."""
        self._overlays.delete(backup)

    def close(self) -> None:
        """When nobody is connected any more."""
        for export in self._exports.values():
            if not export.read_only:
                with contextlib.suppress(StillpointError):
                    export.close()

    def _put(self, record: BackupRecord, overlays: Overlays | None) -> None:
        export = BackupExport(record, lambda: self._open_reader(record.id), self._executor, overlays)
        self._exports[export.name] = export

    def _refuse_if_used(self, export: BackupExport) -> None:
        if export.connection_count:
            raise Refused(f"export {export.name} is in use by {export.connection_count} connections; end them first")

    def __getitem__(self, name: str) -> BackupExport:
        return self._exports[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._exports)

    def __len__(self) -> int:
        return len(self._exports)
