"""A writable device over one that is only read: what is written goes to a storage of its own, block by block.

A block is associated with the storage when something of it is written; from then on it is read there, all others are
read from the base (the patent's Fig. 2, steps 240 to 248).

Invariants
- The base is never written to.
- A block is marked in the storage's map only when its whole content is durable there: at a flush, first the data, then
  the map. So a crash loses what was not flushed, as any disk does, and never shows half a block of either origin.
- Once the base is lost nothing is read or written any more: what is here is of no use without it.
- Whatever the storage holds for a block that is not marked is rubbish of a write that was not flushed; the first write
  of a block replaces all of it.

Storage, little-endian:

    0      8 bytes    magic "SPOVERLA"
    8      u32        version, 1
    12     u32        bytes a block
    16     u64        bytes of the device
    24     36 bytes   what the base is: a uuid in ASCII
    60     u32        CRC-32 of bytes 0 to 59
    4096   u8 each    the map: 1 for a block that is here, else 0; zeroes up to a multiple of 4096
    then              the data, byte i of the device at byte i
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from ..errors import DataCorrupt, Refused
from ..extents import MappedExtent, check_range, coalesce
from .base import BlockDevice, Buffer

MAGIC: Final = b"SPOVERLA"
VERSION: Final = 1  # 1: the first; we read and write 1
_HEADER: Final = struct.Struct("<8sIIQ36s")
_CRC: Final = struct.Struct("<I")
_PAGE: Final = 4096


def storage_size(size: int, block_size: int) -> int:
    """Bytes of storage for a device of `size` bytes; as a sparse file it takes what is written and little more."""
    return _data_start(size, block_size) + size


class OverlayDevice:
    """`base` with changes in `storage`; it owns both. May be used by several threads."""

    def __init__(
        self,
        base: BlockDevice,
        storage: BlockDevice,
        *,
        base_uuid: str,
        block_size: int,
        check_base: Callable[[], None] = lambda: None,
    ) -> None:
        """A storage that holds zeroes becomes an empty overlay, durably. block_size: divides the base's size.

        check_base: raises a StillpointError once the base can no longer be read, and for ever after.
        Raises DataCorrupt when the storage is another base's, or of another version; DeviceError.
        """
        assert base.size % block_size == 0
        self._base = base
        self._check_base = check_base
        self._storage = storage
        self._block_size = block_size
        self._data_start = _data_start(base.size, block_size)
        self._lock = threading.Lock()  # held by changes, so that a block is filled once
        self._flush_lock = threading.Lock()
        self._fresh: list[tuple[int, int]] = []  # runs of blocks marked since the last flush
        header = _HEADER.pack(MAGIC, VERSION, block_size, base.size, base_uuid.encode("ascii"))
        header += _CRC.pack(zlib.crc32(header))
        found = bytearray(len(header))
        storage.read_into(0, memoryview(found))
        if not any(found):
            storage.write(0, [header])
            storage.flush()
        elif found != header:
            raise DataCorrupt(f"{storage.description}: is no overlay of {base.description}, or of another version")
        flags = bytearray(self._data_start - _PAGE)
        storage.read_into(_PAGE, memoryview(flags))
        self._durable: npt.NDArray[np.uint8] = np.frombuffer(flags, dtype=np.uint8)
        self._here = self._durable.copy()

    @property
    def size(self) -> int:
        return self._base.size

    @property
    def read_only(self) -> bool:
        return False

    @property
    def description(self) -> str:
        return f"{self._base.description}, writable"

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return all(
            device.try_read_into(position, buffer[start : start + length])
            for device, position, start, length in self._parts(offset, len(buffer))
        )

    def read_into(self, offset: int, buffer: memoryview) -> None:
        for device, position, start, length in self._parts(offset, len(buffer)):
            device.read_into(position, buffer[start : start + length])

    def written(self, first: int, count: int) -> npt.NDArray[np.uint8]:
        """Whether each of `count` blocks from `first` was written to: 1, else 0."""
        return self._here[first : first + count]

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._check_base()
        length = sum(len(memoryview(buffer).cast("B")) for buffer in buffers)
        check_range(offset=offset, length=length, size=self.size)
        if length:
            with self._lock:
                self._fill_ends(offset, length)
                self._storage.write(self._data_start + offset, buffers)
                self._mark(offset, length)

    def trim(self, offset: int, length: int) -> None:
        self.write_zeroes(offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        self._check_base()
        check_range(offset=offset, length=length, size=self.size)
        if length:
            with self._lock:
                self._fill_ends(offset, length)
                self._storage.write_zeroes(self._data_start + offset, length, may_trim=may_trim)
                self._mark(offset, length)

    def flush(self) -> None:
        self._check_base()
        with self._flush_lock:
            with self._lock:
                fresh, self._fresh = self._fresh, []
            try:
                self._storage.flush()
                if fresh:
                    self._write_map(fresh)
                    self._storage.flush()
            except BaseException:
                with self._lock:
                    self._fresh = fresh + self._fresh
                raise

    def extents(self, offset: int, length: int) -> Iterator[MappedExtent]:
        check_range(offset=offset, length=length, size=self.size)
        return coalesce(
            MappedExtent(extent.offset - position + offset + start, extent.length, extent.hole)
            for device, position, start, part in self._parts(offset, length)
            for extent in device.extents(position, part)
        )

    def resize(self, size: int) -> None:
        raise Refused(f"{self.description}: has the size of what it lies over")

    def close(self) -> None:
        self._base.close()
        self._storage.close()

    def _parts(self, offset: int, length: int) -> Iterator[tuple[BlockDevice, int, int, int]]:
        """The range as (device, offset there, offset from `offset`, length), in order."""
        self._check_base()
        check_range(offset=offset, length=length, size=self.size)
        if not length:
            return
        size, end = self._block_size, offset + length
        first = offset // size
        here = self._here[first : -(-end // size)].copy()
        borders = (np.flatnonzero(here[1:] != here[:-1]) + 1).tolist()
        for start_block, end_block in zip([0, *borders], [*borders, len(here)], strict=True):
            start = max(offset, (first + start_block) * size)
            part = min(end, (first + end_block) * size) - start
            if here[start_block]:
                yield self._storage, self._data_start + start, start - offset, part
            else:
                yield self._base, start, start - offset, part

    def _fill_ends(self, offset: int, length: int) -> None:
        """Bring over those blocks that the range covers in part only."""
        size, end = self._block_size, offset + length
        ends = set()
        if offset % size:
            ends.add(offset // size)
        if end % size:
            ends.add(end // size)
        for block in ends:
            if not self._here[block]:
                content = bytearray(size)
                self._base.read_into(block * size, memoryview(content))
                self._storage.write(self._data_start + block * size, [content])

    def _mark(self, offset: int, length: int) -> None:
        first, end = offset // self._block_size, -(-(offset + length) // self._block_size)
        if not self._here[first:end].all():
            self._here[first:end] = 1
            self._fresh.append((first, end))

    def _write_map(self, runs: Sequence[tuple[int, int]]) -> None:
        """Mark the blocks in the storage. Only these: others may have come whose data is not durable yet."""
        pages: set[int] = set()
        for first, end in runs:
            self._durable[first:end] = 1
            pages.update(range(first // _PAGE, (end - 1) // _PAGE + 1))
        for page in sorted(pages):
            self._storage.write(_PAGE + page * _PAGE, [self._durable[page * _PAGE : (page + 1) * _PAGE].tobytes()])


def _data_start(size: int, block_size: int) -> int:
    block_count = size // block_size
    return _PAGE + -(-block_count // _PAGE) * _PAGE
