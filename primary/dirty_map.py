"""Which chunks of a volume its mirror may lack: one byte for each 64 KiB, in a file mapped into memory.

| value | meaning |
|---|---|
| 0 | the mirror has it, durably |
| 1, 2 | sent, not known to be durable there. Two tags: while a flush covers the one, writes get the other |
| 255 | dirty: has to be sent again |

Invariants
- A chunk is marked before its write starts, here or there.
- A chunk becomes 0 only after the standby said that a flush sent after the write is durable. So a standby that comes
  back having forgotten what it had only acknowledged is sent that again.
- The map never says less than the truth. It survives any end of this process (the page cache holds it), and a power
  loss after a clean stop. After any other power loss it is what the file holds, every mark of which counts as dirty,
  and the extents that the log of hot extents names: outside of these, marks were made durable (`write_intent.py`).
  Where there is no such log, every chunk counts as dirty.

File: a page of 4 KiB with the fields of `_HEADER`, then one byte a chunk. Memory and disk: 16 MiB for each TiB.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stillpoint.checksum import crc32
from stillpoint.document import boot_id, fsync_folder
from stillpoint.errors import DataCorrupt, DeviceError
from stillpoint.extents import Extent

CHUNK_SHIFT = 16
CHUNK_SIZE = 1 << CHUNK_SHIFT

_CLEAN = 0
_DIRTY = 255
_PAGE = 4096
_MAGIC = b"SPDIRTY1"
# magic, format version, clean flag, chunk size, number of chunks, boot id; then a CRC-32 of these
_HEADER = struct.Struct("<8sIIQQ36s")
_CRC = struct.Struct("<I")
_VERSION = 1
# Chunks looked at in one go when searching or counting; bounds the temporary arrays.
_SCAN = 1 << 20


class DirtyMap:
    """Opened for one volume. `connected` says whether new writes are tagged (sent) or dirty (only here)."""

    def __init__(self, path: Path, size: int, *, create: bool, suspects: Iterable[Extent] | None = None) -> None:
        """size: of the volume, bytes. suspects: what a power loss makes dirty, if there was one; None: everything.

        Durable on return. Raises DeviceError, DataCorrupt.
        """
        self._count = -(-size >> CHUNK_SHIFT)
        self._volume_size = size
        total = _PAGE + self._count
        try:
            flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
            self._fd = os.open(path, flags, 0o600)
            if create:
                # Allocated beforehand: a mapped page without space would end the process, not the write.
                os.posix_fallocate(self._fd, 0, total)
                fsync_folder(path.parent)
            if os.fstat(self._fd).st_size < total:
                raise DataCorrupt(f"{path} does not belong to a volume of {size} bytes")
            self._map()
        except OSError as error:
            raise DeviceError(f"cannot open {path}: {error.strerror}", error.errno or 0) from error
        self._tag = _DIRTY
        self._singles: list[int] = []
        self._ranges: list[tuple[int, int]] = []
        self._flushing: tuple[int, list[int], list[tuple[int, int]]] | None = None
        self._failed = ""
        if not create:
            survived = self._survived(path)
            self._retag_all(everything=not survived and suspects is None)
            for extent in () if survived else suspects or ():
                self._chunks(extent)[:] = _DIRTY
        self.dirty_count = self._count_dirty()
        self._write_header(clean=False)

    def _map(self) -> None:
        self._mapping = mmap.mmap(self._fd, _PAGE + self._count)
        self._bytes = memoryview(self._mapping)[_PAGE:]
        self._array: npt.NDArray[np.uint8] = np.frombuffer(self._mapping, np.uint8, offset=_PAGE)

    def grow(self, size: int) -> None:
        """For a volume that is about to have `size` bytes; what is new is clean. Durable on return.

        A volume that did not grow after all opens the longer map as its own. Raises DeviceError; nothing changed then.
        """
        count = -(-size >> CHUNK_SHIFT)
        assert count >= self._count
        if count == self._count:
            self._volume_size = size
            return
        end = _PAGE + self._count
        try:
            os.ftruncate(self._fd, end)  # what a growth that was interrupted left there is forgotten
            os.posix_fallocate(self._fd, end, _PAGE + count - end)
            os.fsync(self._fd)
        except OSError as error:
            raise DeviceError(f"no space for a larger dirty map: {error.strerror}", error.errno or 0) from error
        self._unmap()
        self._count, self._volume_size = count, size
        self._map()
        self._write_header(clean=False)

    def _unmap(self) -> None:
        del self._array
        self._bytes.release()
        self._mapping.close()

    # --- the hot path

    def mark(self, offset: int, length: int) -> None:
        """A write of this range (bytes, not empty) is about to start."""
        first = offset >> CHUNK_SHIFT
        last = (offset + length - 1) >> CHUNK_SHIFT
        if first == last:
            value = self._bytes[first]
            if value != self._tag and value != _DIRTY:
                self._bytes[first] = self._tag
                if self._tag == _DIRTY:
                    self.dirty_count += 1
                else:
                    self._singles.append(first)
            return
        part = self._array[first : last + 1]
        fresh = part != _DIRTY
        if self._tag == _DIRTY:
            self.dirty_count += int(np.count_nonzero(fresh))
            part[:] = _DIRTY
        else:
            part[fresh] = self._tag
            self._ranges.append((first, last + 1))

    # --- the life of a connection

    @property
    def unflushed_bytes(self) -> int:
        """Tagged, not dirty: an upper bound."""
        lists = [(self._singles, self._ranges)]
        if self._flushing is not None:
            lists.append(self._flushing[1:])
        chunks = sum(len(singles) + sum(end - start for start, end in ranges) for singles, ranges in lists)
        return min(chunks, self._count) << CHUNK_SHIFT

    @property
    def dirty_bytes(self) -> int:
        return min(self.dirty_count << CHUNK_SHIFT, self._volume_size)

    def connect(self) -> None:
        """From now on writes are sent to the mirror."""
        assert self._tag == _DIRTY
        self._tag = 1

    def disconnect(self) -> None:
        """The mirror is away: all that it is not known to hold durably is dirty, and so is every write from now on."""
        self._tag = _DIRTY
        groups = [(self._singles, self._ranges)]
        if self._flushing is not None:
            groups.append(self._flushing[1:])
        for singles, ranges in groups:
            for start, end in (*((single, single + 1) for single in singles), *ranges):
                part = self._array[start:end]
                part[part != _CLEAN] = _DIRTY
        self._singles, self._ranges, self._flushing = [], [], None
        self.dirty_count = self._count_dirty()

    def begin_flush(self) -> None:
        """A flush is being sent: it covers every write marked until now. One at a time."""
        assert self._flushing is None and self._tag != _DIRTY
        self._flushing = (self._tag, self._singles, self._ranges)
        self._singles, self._ranges = [], []
        self._tag = 3 - self._tag

    def flushed(self) -> None:
        """The standby holds durably what was marked before `begin_flush`."""
        assert self._flushing is not None
        tag, singles, ranges = self._flushing
        self._flushing = None
        array = self._array
        if len(singles) < 64:
            values = self._bytes
            for single in singles:
                if values[single] == tag:
                    values[single] = _CLEAN
        else:
            indices = np.array(singles, dtype=np.int64)
            array[indices[array[indices] == tag]] = _CLEAN
        for start, end in ranges:
            part = array[start:end]
            part[part == tag] = _CLEAN

    # --- resync

    def next_dirty(self, from_offset: int, *, limit: int) -> Extent | None:
        """The first dirty run at or after `from_offset`, at most `limit` bytes of it (both whole chunks)."""
        at = (from_offset + CHUNK_SIZE - 1) >> CHUNK_SHIFT
        while at < self._count:
            found = np.flatnonzero(self._array[at : at + _SCAN] == _DIRTY)
            if len(found):
                first = at + int(found[0])
                end_max = min(first + (limit >> CHUNK_SHIFT), self._count)
                clean = np.flatnonzero(self._array[first:end_max] != _DIRTY)
                end = first + int(clean[0]) if len(clean) else end_max
                offset = first << CHUNK_SHIFT
                return Extent(offset, min(end << CHUNK_SHIFT, self._volume_size) - offset)
            at += _SCAN
        return None

    def sent(self, extent: Extent) -> None:
        """The current content of whole dirty chunks is on its way to the mirror."""
        assert self._tag != _DIRTY
        first, end = extent.offset >> CHUNK_SHIFT, (extent.end + CHUNK_SIZE - 1) >> CHUNK_SHIFT
        part = self._array[first:end]
        dirty = part == _DIRTY
        part[dirty] = self._tag
        self.dirty_count -= int(np.count_nonzero(dirty))
        self._ranges.append((first, end))

    def _chunks(self, extent: Extent) -> npt.NDArray[np.uint8]:
        return self._array[extent.offset >> CHUNK_SHIFT : (extent.end + CHUNK_SIZE - 1) >> CHUNK_SHIFT]

    def is_sent(self, extent: Extent) -> bool:
        """Whether the mirror was sent all that was written to this range."""
        return not (self._chunks(extent) == _DIRTY).any()

    def mark_dirty(self, extent: Extent) -> None:
        """The mirror must be sent this, whatever the map says now. Over a power loss only after `persist`."""
        part = self._chunks(extent)
        self.dirty_count += int(np.count_nonzero(part != _DIRTY))
        part[:] = _DIRTY

    # --- the file

    def persist(self) -> None:
        """Every mark that was made before is durable on return. May run in a thread; waits for the disk.

        Raises DeviceError, and does so for ever after.
        """
        if self._failed:
            raise DeviceError(self._failed, errno.EIO)
        try:
            os.fdatasync(self._fd)  # of mapped pages too, and unlike msync here it lets other threads run
        except OSError as error:
            self._failed = f"cannot make a dirty map durable: {error.strerror}"
            raise DeviceError(self._failed, error.errno or errno.EIO) from error

    def clear(self) -> None:
        """Nothing is dirty: another copy knows of all that was, durably. Durable on return. Raises DeviceError."""
        assert self._tag == _DIRTY
        self._array[:] = _CLEAN
        self.dirty_count = 0
        self.persist()

    def extents(self) -> Iterator[Extent]:
        """All that is dirty, ascending."""
        at = 0
        while (run := self.next_dirty(at, limit=_SCAN << CHUNK_SHIFT)) is not None:
            yield run
            at = run.end

    def close(self, *, clean: bool) -> None:
        """The volume takes no writes any more. clean: its device is flushed; make the map durable and say so."""
        if self._mapping.closed:
            return
        self.disconnect()
        if clean:
            self._mapping.flush()
            self._write_header(clean=True)
        self._unmap()
        os.close(self._fd)

    def _survived(self, path: Path) -> bool:
        header = self._mapping[: _HEADER.size]
        if _CRC.unpack(self._mapping[_HEADER.size : _HEADER.size + 4])[0] != crc32(header):
            return False
        magic, version, clean, chunk_size, count, boot = _HEADER.unpack(header)
        if magic != _MAGIC or version != _VERSION or chunk_size != CHUNK_SIZE or count < self._count:
            raise DataCorrupt(f"{path} is not a dirty map of this volume and version")
        return bool(clean) or boot.decode("ascii", "replace") == boot_id()

    def _write_header(self, *, clean: bool) -> None:
        header = _HEADER.pack(_MAGIC, _VERSION, int(clean), CHUNK_SIZE, self._count, boot_id().encode("ascii"))
        self._mapping[: _HEADER.size + 4] = header + _CRC.pack(crc32(header))
        try:
            self._mapping.flush(0, _PAGE)
            os.fsync(self._fd)
        except OSError as error:
            raise DeviceError(f"cannot write a dirty map: {error.strerror}", error.errno or 0) from error

    def _retag_all(self, *, everything: bool) -> None:
        for at in range(0, self._count, _SCAN):
            part = self._array[at : at + _SCAN]
            part[slice(None) if everything else part != _CLEAN] = _DIRTY

    def _count_dirty(self) -> int:
        return sum(int(np.count_nonzero(self._array[at : at + _SCAN] == _DIRTY)) for at in range(0, self._count, _SCAN))
