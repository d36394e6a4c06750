"""The association map with a special value: one sparse entry of 12 bytes for every block of the volume, found by index.

Invariants:
- Of one entry `born` is stored first, then the address: an address that is not NOT_PRESERVED is complete.
- A piece of the file is touched, by either side, only when its `present` byte is 1; the engine reserves its space
  before it sets that byte. So a full disk is an OSError here, and a sparse map costs a reader nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from stillpoint.checksum import crc32
from stillpoint.errors import DataCorrupt

from .association import PIECE_ENTRIES, Addresses
from .birth import Blocks, Generations
from .mapped_file import PAGE_SIZE, MappedFile, rounded_to_pages

MAGIC: Final = b"SPASSOCA"
VERSION: Final = 1  # 1: the first; maps are rebuilt at every start, so no other is ever read
_HEADER: Final = struct.Struct("<8sIIQIIQQ")  # magic, version, generation, blocks, piece, crc, addresses at, born at
_CRC: Final = struct.Struct("<I")
_CRC_OFFSET: Final = 28


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
        self._addresses: Addresses = np.frombuffer(file.view, dtype="<u8", count=blocks, offset=addresses_at)
        self._born: Generations = np.frombuffer(file.view, dtype="<u4", count=blocks, offset=born_at)

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

    def put_many(self, blocks: Blocks, addresses: Addresses, born: Generations) -> None:
        if not len(blocks):
            return
        for piece in np.unique(blocks // PIECE_ENTRIES).tolist():
            if not self._present[piece]:
                self._add_piece(piece)
        self._born[blocks] = born
        self._addresses[blocks] = addresses

    def is_quick(self, count: int) -> bool:
        return count <= PIECE_ENTRIES

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
        self._addresses = np.empty(0, dtype="<u8")
        self._born = np.empty(0, dtype="<u4")
        self._file.close()

    def _add_piece(self, piece: int) -> None:
        self._file.reserve(self._addresses_at + piece * PIECE_ENTRIES * 8, PIECE_ENTRIES * 8)
        self._file.reserve(self._born_at + piece * PIECE_ENTRIES * 4, PIECE_ENTRIES * 4)
        self._present[piece] = 1


def _header_crc(view: memoryview) -> int:
    return crc32(view[_CRC_OFFSET + 4 : _HEADER.size], crc32(view[:_CRC_OFFSET]))
