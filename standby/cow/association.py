"""Association maps: which block of a snapshot was preserved where.

A record says "the content of this block born in generation `born` is at this address" and belongs to the map of the
newest snapshot that can see it; an older snapshot finds it by asking the maps of the snapshots from its own on,
oldest first. Maps are caches (R5): they are built again from the store's log whenever the engine starts, so they are
never flushed and never read after a crash.

Addresses (u64) are the same in every kind of map and in the store's log:

    0                      nothing is preserved here
    1                      the block was all zeroes and is stored nowhere
    store << 48 | units    byte `units * 512` of the store with that number

`AssociationMap` is the promise; `ArrayMap` is the form with a special value: one entry for each block of the volume,
found by its index.

Invariants of an ArrayMap:
- Readers in other processes look while the engine stores. Of one entry `born` is stored first, then the address: an
  address that is not 0 is complete.
- A piece of the file is touched, by either side, only when its `present` byte is 1; the engine reserves its space
  before it sets that byte. So a full disk is an OSError here, and a sparse map costs a reader nothing.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from stillpoint.errors import DataCorrupt

from .birth import Blocks, Generations
from .mapped_file import PAGE_SIZE, MappedFile, rounded_to_pages

Addresses: TypeAlias = npt.NDArray[np.uint64]

NOT_PRESERVED: Final = 0
ALL_ZEROES: Final = 1
STORE_SHIFT: Final = 48
UNIT_SIZE: Final = 512
UNITS_MASK: Final = (1 << STORE_SHIFT) - 1

MAGIC: Final = b"SPASSOCA"
VERSION: Final = 1  # 1: the first; maps are rebuilt at every start, so no other is ever read
_HEADER: Final = struct.Struct("<8sIIQIIQQ")  # magic, version, generation, blocks, piece, crc, addresses at, born at
_CRC: Final = struct.Struct("<I")
_CRC_OFFSET: Final = 28
PIECE_ENTRIES: Final = 8192  # 64 KiB of addresses and 32 KiB of births: what one reservation covers


class AssociationMap(Protocol):
    """The records of one live snapshot. `put` and `put_many` may raise OSError (no space); nothing was put then."""

    generation: int

    def put(self, block: int, address: int, born: int) -> None:
        """Add a record for a block that has none."""
        ...

    def put_many(self, blocks: Blocks, addresses: Addresses, born: Generations) -> None:
        """Add records for blocks that have none; `blocks` ascends."""
        ...

    def lookup(self, first: int, count: int) -> tuple[Addresses, Generations] | None:
        """Addresses and births of `count` blocks from `first`, NOT_PRESERVED where there is none; None: none at all."""
        ...

    def pieces(self) -> Iterator[tuple[Blocks, Addresses, Generations]]:
        """All records, ascending by block, in pieces of bounded size."""
        ...

    def close(self) -> None: ...


class ArrayMap:
    """One sparse entry of 12 bytes for every block of the volume."""

    def __init__(self, file: MappedFile, path: Path) -> None:
        magic, version, generation, blocks, piece, crc, addresses_at, born_at = _HEADER.unpack_from(file.view)
        if (magic, version, piece) != (MAGIC, VERSION, PIECE_ENTRIES) or crc != _header_crc(file.view):
            file.close()
            raise DataCorrupt(f"{path}: is no association map of version {VERSION}")
        self.path = path
        self.generation: int = generation
        self.block_count: int = blocks
        self._file = file
        self._addresses_at: int = addresses_at
        self._born_at: int = born_at
        self._present = file.view[PAGE_SIZE : PAGE_SIZE + -(-blocks // PIECE_ENTRIES)]
        self._address_scalars = file.view[addresses_at : addresses_at + 8 * blocks].cast("Q")
        self._born_scalars = file.view[born_at : born_at + 4 * blocks].cast("I")
        self._addresses: Addresses = np.frombuffer(self._address_scalars, dtype="<u8")
        self._born: Generations = np.frombuffer(self._born_scalars, dtype="<u4")

    @classmethod
    def create(cls, path: Path, *, generation: int, block_count: int) -> ArrayMap:
        """An empty map. Takes the same time whatever the volume's size. Raises OSError."""
        pieces = -(-block_count // PIECE_ENTRIES)
        addresses_at = PAGE_SIZE + rounded_to_pages(pieces)
        born_at = addresses_at + pieces * PIECE_ENTRIES * 8
        file = MappedFile.create(path, born_at + pieces * PIECE_ENTRIES * 4)
        try:
            file.reserve(0, addresses_at)
        except OSError:
            file.close()
            path.unlink()
            raise
        fields = (MAGIC, VERSION, generation, block_count, PIECE_ENTRIES, 0, addresses_at, born_at)
        _HEADER.pack_into(file.view, 0, *fields)
        _CRC.pack_into(file.view, _CRC_OFFSET, _header_crc(file.view))
        return cls(file, path)

    @classmethod
    def open(cls, path: Path) -> ArrayMap:
        """For a reader. Raises OSError, DataCorrupt."""
        return cls(MappedFile.open(path, writable=False), path)

    def put(self, block: int, address: int, born: int) -> None:
        piece = block // PIECE_ENTRIES
        if not self._present[piece]:
            self._add_piece(piece)
        self._born_scalars[block] = born
        self._address_scalars[block] = address

    def put_many(self, blocks: Blocks, addresses: Addresses, born: Generations) -> None:
        if not len(blocks):
            return
        for piece in range(int(blocks[0]) // PIECE_ENTRIES, int(blocks[-1]) // PIECE_ENTRIES + 1):
            if not self._present[piece] and _touches(blocks, piece):
                self._add_piece(piece)
        self._born[blocks] = born
        self._addresses[blocks] = addresses

    def lookup(self, first: int, count: int) -> tuple[Addresses, Generations] | None:
        first_piece = first // PIECE_ENTRIES
        last_piece = (first + count - 1) // PIECE_ENTRIES
        present = bytes(self._present[first_piece : last_piece + 1])
        if 1 not in present:
            return None
        if 0 not in present:
            return self._addresses[first : first + count].copy(), self._born[first : first + count].copy()
        addresses: Addresses = np.zeros(count, dtype="<u8")
        born: Generations = np.zeros(count, dtype="<u4")
        for index, there in enumerate(present, start=first_piece):
            start = max(first, index * PIECE_ENTRIES)
            end = min(first + count, (index + 1) * PIECE_ENTRIES)
            if there:
                addresses[start - first : end - first] = self._addresses[start:end]
                born[start - first : end - first] = self._born[start:end]
        return addresses, born

    def pieces(self) -> Iterator[tuple[Blocks, Addresses, Generations]]:
        for piece in np.flatnonzero(np.frombuffer(bytes(self._present), dtype=np.uint8)).tolist():
            start = piece * PIECE_ENTRIES
            end = min(start + PIECE_ENTRIES, self.block_count)
            indices = np.flatnonzero(self._addresses[start:end])
            if len(indices):
                blocks: Blocks = indices.astype(np.int64) + start
                yield blocks, self._addresses[blocks], self._born[blocks]

    def close(self) -> None:
        self._present = memoryview(b"")
        self._address_scalars = memoryview(b"").cast("Q")
        self._born_scalars = memoryview(b"").cast("I")
        self._addresses = np.empty(0, dtype="<u8")
        self._born = np.empty(0, dtype="<u4")
        self._file.close()

    def _add_piece(self, piece: int) -> None:
        self._file.reserve(self._addresses_at + piece * PIECE_ENTRIES * 8, PIECE_ENTRIES * 8)
        self._file.reserve(self._born_at + piece * PIECE_ENTRIES * 4, PIECE_ENTRIES * 4)
        self._present[piece] = 1


def store_of(address: int) -> int:
    return address >> STORE_SHIFT


def offset_of(address: int) -> int:
    """Bytes from the start of the store's device."""
    return (address & UNITS_MASK) * UNIT_SIZE


def _touches(blocks: Blocks, piece: int) -> bool:
    start, end = np.searchsorted(blocks, (piece * PIECE_ENTRIES, (piece + 1) * PIECE_ENTRIES))
    return bool(start < end)


def _header_crc(view: memoryview) -> int:
    return zlib.crc32(view[_CRC_OFFSET + 4 : _HEADER.size], zlib.crc32(view[:_CRC_OFFSET]))
