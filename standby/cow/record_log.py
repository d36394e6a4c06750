"""The log of a preservation store: superblocks and batches of records as bytes. No I/O here.

A record says what a slot of the store holds: `count` blocks of a volume from `block` on, born in generation `born`,
visible to the snapshots `born`..`to`, overwritten by a write of generation `new_birth`. It is complete in itself
(R5): together with the list of live snapshots it is enough to build every association map again. Deleting a snapshot
writes nothing here: a record belongs to the newest live snapshot in `born`..`to`, and is dead when there is none,
for ever, because generations never come back.

Byte tables and golden files: README.md, "The store".
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, TypeAlias
from uuid import UUID

import numpy as np
import numpy.typing as npt

from stillpoint.checksum import crc32

SUPERBLOCK_MAGIC: Final = b"SPSTORE1"
BATCH_MAGIC: Final = 0x424C5053  # "SPLB" in the file
VERSION: Final = 1  # 1: the first; we read and write 1
SUPERBLOCK_SIZE: Final = 4096
SUPERBLOCK_COUNT: Final = 2
LOG_OFFSET: Final = SUPERBLOCK_SIZE * SUPERBLOCK_COUNT

# magic, version, crc, uuid, sequence, device size, data offset, log half size, active half, 0, first batch, number
_SUPERBLOCK: Final = struct.Struct("<8sII16sQQQQIIQI")
_SUPERBLOCK_CRC_OFFSET: Final = 12
# magic, version, type, length, crc, sequence, durable sequence, superblock sequence, volume, block size, count
_BATCH: Final = struct.Struct("<IHHIIQQQ16sII")
_BATCH_CRC_OFFSET: Final = 12
BATCH_HEADER_SIZE: Final = _BATCH.size
BATCH_RECORDS_MAX: Final = 1 << 18
_CRC: Final = struct.Struct("<I")

RECORD: Final = np.dtype(
    [
        ("block", "<u8"),
        ("address", "<u8"),  # in units of 512 bytes on this device; ALL_ZEROES for blocks stored nowhere
        ("count", "<u4"),
        ("born", "<u4"),
        ("to", "<u4"),
        ("new_birth", "<u4"),
        ("crc", "<u4"),  # of the stored bytes; 0 for zeroes
        ("reserved", "<u4"),
    ]
)
Records: TypeAlias = npt.NDArray[np.void]


class BatchType(enum.IntEnum):
    PRESERVE = 1
    FORGET = 2  # every earlier record of that volume is dead: the volume was deleted
    MARK = 3  # no records; says by its header that all before it is durable, so that slots may be reused


_BATCH_TYPES: Final = frozenset(int(kind) for kind in BatchType)


@dataclass(frozen=True, slots=True)
class Superblock:
    """The root of a store: where its log begins."""

    uuid: UUID
    sequence: int
    device_size: int
    data_offset: int
    log_size: int  # bytes of each half
    active_half: int
    first_batch: int  # sequence of the first batch in the active half
    number: int  # of the store within its node: the high bits of the addresses in maps

    @property
    def log_offset(self) -> int:
        return LOG_OFFSET + self.active_half * self.log_size

    def switched(self, *, first_batch: int) -> Superblock:
        return replace(self, sequence=self.sequence + 1, active_half=1 - self.active_half, first_batch=first_batch)


@dataclass(frozen=True, slots=True)
class Batch:
    """Records that were made durable together. `durable` is the newest batch known durable when it was written."""

    type: BatchType
    sequence: int
    durable: int
    volume: UUID
    block_size: int
    records: Records


def encode_superblock(block: Superblock) -> bytes:
    fields = (block.uuid.bytes, block.sequence, block.device_size, block.data_offset, block.log_size)
    more = (block.active_half, 0, block.first_batch, block.number)
    buffer = bytearray(SUPERBLOCK_SIZE)
    _SUPERBLOCK.pack_into(buffer, 0, SUPERBLOCK_MAGIC, VERSION, 0, *fields, *more)
    _CRC.pack_into(buffer, _SUPERBLOCK_CRC_OFFSET, crc32(buffer))
    return bytes(buffer)


def decode_superblock(data: bytes) -> Superblock | None:
    """None when these bytes are no superblock of a version we read, or are damaged."""
    magic, version, crc, uuid, sequence, size, data_offset, log_size, half, _, first, number = _SUPERBLOCK.unpack_from(
        data
    )
    if magic != SUPERBLOCK_MAGIC or version != VERSION or crc != _crc_without(data, _SUPERBLOCK_CRC_OFFSET):
        return None
    return Superblock(UUID(bytes=uuid), sequence, size, data_offset, log_size, half, first, number)


def encode_batch(batch: Batch, *, superblock_sequence: int) -> bytes:
    body = batch.records.tobytes()
    header = _BATCH.pack(
        BATCH_MAGIC,
        VERSION,
        batch.type,
        _BATCH.size + len(body),
        0,
        batch.sequence,
        batch.durable,
        superblock_sequence,
        batch.volume.bytes,
        batch.block_size,
        len(batch.records),
    )
    crc = crc32(body, crc32(header))
    return header[:_BATCH_CRC_OFFSET] + _CRC.pack(crc) + header[_BATCH_CRC_OFFSET + 4 :] + body


def decode_batch(data: bytes, *, sequence: int, superblock_sequence: int) -> Batch | None:
    """The batch these bytes begin with, or None: damaged, torn, or left over from an earlier use of the log."""
    if len(data) < _BATCH.size:
        return None
    magic, version, kind, length, crc, number, durable, root, volume, block_size, count = _BATCH.unpack_from(data)
    if (magic, version, number, root) != (BATCH_MAGIC, VERSION, sequence, superblock_sequence):
        return None
    if count > BATCH_RECORDS_MAX or length != _BATCH.size + count * RECORD.itemsize or length > len(data):
        return None
    if crc != _crc_without(data[:length], _BATCH_CRC_OFFSET) or kind not in _BATCH_TYPES:
        return None
    records: Records = np.frombuffer(data, dtype=RECORD, count=count, offset=_BATCH.size)
    return Batch(BatchType(kind), number, durable, UUID(bytes=volume), block_size, records)


def batch_length(header: bytes) -> int:
    """How long the batch with this header says it is; may be any nonsense, so it is capped."""
    length: int = _BATCH.unpack_from(header)[3]
    return min(length, BATCH_HEADER_SIZE + BATCH_RECORDS_MAX * RECORD.itemsize)


def read_batches(read: Callable[[int, int], bytes], root: Superblock) -> Iterator[tuple[int, Batch]]:
    """(offset of its end in the active half, batch) until the log ends; a torn tail ends it (R6).

    read(offset, length) reads bytes of the active half.
    """
    position = 0
    sequence = root.first_batch
    while position + BATCH_HEADER_SIZE <= root.log_size:
        header = read(position, BATCH_HEADER_SIZE)
        length = batch_length(header)
        if length < BATCH_HEADER_SIZE or position + length > root.log_size:
            return
        data = header + read(position + BATCH_HEADER_SIZE, length - BATCH_HEADER_SIZE)
        batch = decode_batch(data, sequence=sequence, superblock_sequence=root.sequence)
        if batch is None:
            return
        position += length
        sequence += 1
        yield position, batch


def owners(born: npt.NDArray[np.uint32], to: npt.NDArray[np.uint32], live: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """For each record the newest live snapshot that sees it, or -1 when none does. `live` ascends."""
    if not live:
        return np.full(len(to), -1, dtype=np.int64)
    generations = np.array(live, dtype=np.int64)
    index = np.searchsorted(generations, to.astype(np.int64), side="right") - 1
    newest = generations[np.maximum(index, 0)]
    return np.where((index >= 0) & (newest >= born.astype(np.int64)), newest, -1)


def expand(records: Records) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(index of the record, position in its run) for every block of the records."""
    counts = records["count"].astype(np.int64)
    index = np.repeat(np.arange(len(records), dtype=np.int64), counts)
    starts = np.cumsum(counts) - counts
    return index, np.arange(int(counts.sum()), dtype=np.int64) - starts[index]


def _crc_without(data: bytes, offset: int) -> int:
    """CRC32 with the four bytes at `offset` taken as zeroes."""
    return crc32(data[offset + 4 :], crc32(bytes(4), crc32(data[:offset])))
