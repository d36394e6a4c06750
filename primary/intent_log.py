"""The log of hot extents: after a power loss, the two copies may differ in these, whatever the dirty map says.

Invariants
- Once durable, a record names all extents that may be written to. It replaces the one before it as a whole.
- Two slots take turns: while one record is written, the one before it stays whole.
- After a write or flush of the log that failed, every further one fails: what the disk holds is not known any more.

Crash points of `append`: before its fdatasync returned, either record may be the newest; no write that only the new one
covers has started, and what only the old one names had been made durable, so both are right.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from pathlib import Path

from stillpoint.checksum import crc32
from stillpoint.document import fsync_folder
from stillpoint.errors import DataCorrupt, DeviceError
from stillpoint.extents import Extent

from .hot_extents import EXTENT_SHIFT, EXTENT_SIZE

_SLOT_SIZE = 4096
_SLOT_COUNT = 2
_MAGIC = b"SPINTENT"
_VERSION = 1
# magic, format version, number of extents, sequence, extent size; then a CRC-32 of these and the extents
_HEADER = struct.Struct("<8sIIQQ")
_CRC = struct.Struct("<I")
_EXTENTS_AT = 40
EXTENTS_MAX = (_SLOT_SIZE - _EXTENTS_AT) // 4


class IntentLog:
    """One volume's log. `hot` is what the newest record names; None: no record is whole."""

    def __init__(self, path: Path) -> None:
        """Opens it, or makes an empty one without any record. Raises DeviceError, DataCorrupt."""
        self._path = path
        self._failed = ""
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if os.fstat(self._fd).st_size < _SLOT_COUNT * _SLOT_SIZE:
                # Written, not only allocated: an append then needs no space and changes nothing in the file system.
                os.pwrite(self._fd, bytes(_SLOT_COUNT * _SLOT_SIZE), 0)
                os.fsync(self._fd)
                fsync_folder(path.parent)
            slots = [os.pread(self._fd, _SLOT_SIZE, number * _SLOT_SIZE) for number in range(_SLOT_COUNT)]
        except OSError as error:
            raise DeviceError(f"cannot open {path}: {error.strerror}", error.errno or errno.EIO) from error
        records = [record for slot in slots if (record := _decode(slot, path)) is not None]
        self._sequence = 0
        self.hot: tuple[int, ...] | None = None
        if records:
            self._sequence, self.hot = max(records)

    def suspects(self, size: int) -> list[Extent] | None:
        """Where, in a volume of `size` bytes, the copies may differ after a power loss; None: anywhere."""
        if self.hot is None:
            return None
        starts = [extent << EXTENT_SHIFT for extent in self.hot]
        return [Extent(start, min(EXTENT_SIZE, size - start)) for start in starts if start < size]

    def append(self, extents: Sequence[int]) -> None:
        """From now on the log names these, and no others. Durable on return. Waits for the disk.

        Raises DeviceError, and does so for ever after.
        """
        if self._failed:
            raise DeviceError(self._failed, errno.EIO)
        record = _encode(self._sequence + 1, extents)
        try:
            at = (self._sequence + 1) % _SLOT_COUNT * _SLOT_SIZE
            if os.pwrite(self._fd, record, at) != len(record):
                raise OSError(errno.EIO, "the system wrote only a part")
            os.fdatasync(self._fd)
        except OSError as error:
            self._failed = f"cannot write {self._path}: {error.strerror}; writes to other parts of the volume fail"
            raise DeviceError(self._failed, error.errno or errno.EIO) from error
        self._sequence += 1

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _encode(sequence: int, extents: Sequence[int]) -> bytes:
    assert len(extents) <= EXTENTS_MAX
    header = _HEADER.pack(_MAGIC, _VERSION, len(extents), sequence, EXTENT_SIZE)
    body = struct.pack(f"<{len(extents)}I", *extents)
    return (header + _CRC.pack(crc32(body, crc32(header)))).ljust(_EXTENTS_AT, b"\0") + body.ljust(
        _SLOT_SIZE - _EXTENTS_AT, b"\0"
    )


def _decode(slot: bytes, path: Path) -> tuple[int, tuple[int, ...]] | None:
    """Sequence and extents; None: this slot holds no whole record."""
    if len(slot) < _SLOT_SIZE or not slot.startswith(_MAGIC):
        return None
    _, version, count, sequence, extent_size = _HEADER.unpack_from(slot)
    if count > EXTENTS_MAX:
        return None
    body = slot[_EXTENTS_AT : _EXTENTS_AT + 4 * count]
    if crc32(body, crc32(slot[: _HEADER.size])) != _CRC.unpack_from(slot, _HEADER.size)[0]:
        return None
    if version != _VERSION or extent_size != EXTENT_SIZE:
        raise DataCorrupt(f"{path} is of another version")
    return sequence, struct.unpack(f"<{count}I", body)
