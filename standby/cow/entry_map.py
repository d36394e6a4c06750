"""What the forms of association maps share that keep one entry a record, and not one a block of the volume.

Such a map is one sparse file, mapped once for its whole life: a header page with a few words that change, and tables of
entries, each three columns side by side. It grows by reserving more of the file, so nothing a reader maps ever moves.
Byte tables and golden files: README.md, "Maps, for one run only".
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from stillpoint.checksum import crc32
from stillpoint.errors import DataCorrupt

from .association import NOT_PRESERVED, PIECE_ENTRIES, Addresses
from .birth import Blocks, Generations
from .mapped_file import PAGE_SIZE, MappedFile

VERSION: Final = 1  # 1: the first; maps are rebuilt at every start, so no other is ever read
ENTRY_SIZE: Final = 20
TABLE_ENTRIES_MIN: Final = 1024  # capacities are multiples of this, so every column begins on a page
_HEADER: Final = struct.Struct("<8sIIQI")  # magic, version, generation, blocks, crc
_CRC: Final = struct.Struct("<I")
_CRC_OFFSET: Final = 24
_WORDS_AT: Final = 64

Found = tuple[Addresses, Generations] | None


class Table(NamedTuple):
    """Columns of one length, views of the mapping. What `blocks` holds is up to the form of map."""

    blocks: Blocks
    addresses: Addresses
    born: Generations

    def taken(self, which: npt.NDArray[np.int64] | slice) -> Table:
        """A copy of some entries. Addresses are read first: they are what publishes an entry of a hash."""
        addresses = self.addresses[which].copy()
        return Table(self.blocks[which].copy(), addresses, self.born[which].copy())

    def first(self, count: int) -> Table:
        """A view."""
        return Table(self.blocks[:count], self.addresses[:count], self.born[:count])

    def store(self, start: int, entries: Table) -> None:
        end = start + len(entries.blocks)
        self.blocks[start:end] = entries.blocks
        self.addresses[start:end] = entries.addresses
        self.born[start:end] = entries.born


class EntryMap:
    """The file, its header, and what does not depend on how entries are found.

    words: the u64 from byte 64 of the file on that tell readers which entries there are.
    """

    magic: ClassVar[bytes]
    generation: int

    def __init__(self, file: MappedFile, path: Path) -> None:
        if len(file.view) < PAGE_SIZE:
            file.close()
            raise DataCorrupt(f"{path}: is cut short")
        magic, version, generation, blocks, crc = _HEADER.unpack_from(file.view)
        if (magic, version) != (self.magic, VERSION) or crc != _header_crc(file.view):
            file.close()
            raise DataCorrupt(f"{path}: is no association map of version {VERSION}")
        self.path = path
        self.generation = generation
        self.block_count: int = blocks
        self._file = file
        self._lock = threading.Lock()  # between the threads of the engine that put; readers never take it
        self._tables: dict[int, Table] = {}
        self._words = file.view[_WORDS_AT:PAGE_SIZE].cast("Q")

    @classmethod
    def create(cls, path: Path, *, generation: int, block_count: int) -> Self:
        """An empty map. Takes the same time whatever the volume's size. Raises OSError."""
        file = MappedFile.create(path, cls._file_size(block_count))
        try:
            file.reserve(0, PAGE_SIZE)
            _HEADER.pack_into(file.view, 0, cls.magic, VERSION, generation, block_count, 0)
            _CRC.pack_into(file.view, _CRC_OFFSET, _header_crc(file.view))
            made = cls(file, path)
            made._begin()
        except OSError:
            file.close()
            path.unlink()
            raise
        return made

    @classmethod
    def open(cls, path: Path) -> Self:
        """For a reader. Raises OSError, DataCorrupt."""
        return cls(MappedFile.open(path, writable=False), path)

    def put_many(self, blocks: Blocks, addresses: Addresses, born: Generations) -> None:
        if len(blocks):
            with self._lock:
                self._put(Table(blocks, addresses, born))

    def is_quick(self, count: int) -> bool:
        # Who rearranges holds the lock, and another put would wait for that.
        return not self._lock.locked() and self._touched(count) <= PIECE_ENTRIES

    def lookup(self, first: int, count: int) -> Found:
        raise NotImplementedError

    def pieces(self) -> Iterator[tuple[Blocks, Addresses, Generations]]:
        everything = self._everything()
        order = np.argsort(everything.blocks, kind="stable")
        for start in range(0, len(order), PIECE_ENTRIES):
            yield everything.taken(order[start : start + PIECE_ENTRIES])

    def close(self) -> None:
        self._tables.clear()
        self._words = memoryview(b"").cast("Q")
        self._file.close()

    @classmethod
    def _file_size(cls, block_count: int) -> int:
        """Bytes of the largest this map can become."""
        raise NotImplementedError

    def _begin(self) -> None:
        """Make room for the first entries of a new map."""

    def _touched(self, count: int) -> int:
        """How many entries are stored to put that many more."""
        return count

    def _put(self, entries: Table) -> None:
        raise NotImplementedError

    def _everything(self) -> Table:
        """A copy of all entries, in any order."""
        raise NotImplementedError

    def _table(self, offset: int, capacity: int) -> Table:
        """The columns of a table at `offset` bytes of the file."""
        table = self._tables.get(offset)
        if table is None:
            view = self._file.view
            if not 0 < capacity <= (len(view) - offset) // ENTRY_SIZE:
                raise DataCorrupt(f"{self.path}: is cut short, or damaged")
            table = self._tables[offset] = Table(
                np.frombuffer(view, dtype="<i8", count=capacity, offset=offset),
                np.frombuffer(view, dtype="<u8", count=capacity, offset=offset + 8 * capacity),
                np.frombuffer(view, dtype="<u4", count=capacity, offset=offset + 16 * capacity),
            )
        return table

    def _reserve(self, offset: int, capacity: int, start: int, end: int) -> None:
        """Make sure that entries `start` to `end` of a table have space. Raises OSError."""
        for column, width in ((0, 8), (8 * capacity, 8), (16 * capacity, 4)):
            self._file.reserve(offset + column + start * width, (end - start) * width)


def spread(entries: Table, first: int, count: int) -> Found:
    """Entries of blocks in the range as `lookup` answers them."""
    if not len(entries.blocks):
        return None
    addresses: Addresses = np.full(count, NOT_PRESERVED, dtype="<u8")
    born: Generations = np.zeros(count, dtype="<u4")
    where = entries.blocks - first
    addresses[where] = entries.addresses
    born[where] = entries.born
    return addresses, born


def joined(tables: list[Table]) -> Table:
    """At least one."""
    return Table(
        np.concatenate([table.blocks for table in tables]),
        np.concatenate([table.addresses for table in tables]),
        np.concatenate([table.born for table in tables]),
    )


def rounded_to_table(entries: int) -> int:
    return -(-entries // TABLE_ENTRIES_MIN) * TABLE_ENTRIES_MIN


def _header_crc(view: memoryview) -> int:
    return crc32(view[:_CRC_OFFSET])
