"""The hashed association map: an open table with linear probing, found by block number.

The table doubles when it is filled to 7/10. Each size has its own place in the sparse file and is never touched again
once a larger one counts, so a reader that still looks at the smaller table finds everything that was put before.

Invariants:
- Of one entry the key is stored first, then the birth, then the address: until the address is there the entry is not.
- Between the place a key hashes to and the place it is at there is no empty slot, and a slot is never emptied.
- The larger table is complete before `level` names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from .association import NOT_PRESERVED, PIECE_ENTRIES
from .entry_map import ENTRY_SIZE, TABLE_ENTRIES_MIN, EntryMap, Found, Table, joined, spread
from .mapped_file import PAGE_SIZE, MappedFile

_LEVEL: Final = 0  # word: the table has TABLE_ENTRIES_MIN << level slots
_LEAST_BITS: Final = TABLE_ENTRIES_MIN.bit_length() - 1
_FULL: Final = 0.7
_MULTIPLIER: Final = 0x9E3779B97F4A7C15  # 2^64 by the golden ratio: neighbours land far apart, in the high bits
_SCAN_SHARE: Final = 8  # from this part of the table on it is quicker to look at every slot than at each block's


class HashMap(EntryMap):
    """`blocks` of its tables holds block + 1, so that an untouched slot is an empty one."""

    magic = b"SPASSOCH"

    def __init__(self, file: MappedFile, path: Path) -> None:
        super().__init__(file, path)
        self._count = 0

    def lookup(self, first: int, count: int) -> Found:
        level = self._words[_LEVEL]
        table = self._table_of(level)
        if count >= len(table.blocks) // _SCAN_SHARE:
            # Unsigned, so that one comparison tells both ends of the range.
            slots = np.flatnonzero((table.blocks - (first + 1)).view(np.uint64) < count)
        else:
            slots = _probe(table, np.arange(first + 1, first + 1 + count), level)
        return spread(_entries(table, slots), first, count)

    @classmethod
    def _file_size(cls, block_count: int) -> int:
        return _offset(_level_for(block_count) + 1)

    def _begin(self) -> None:
        self._file.reserve(_offset(0), ENTRY_SIZE * TABLE_ENTRIES_MIN)

    def _put(self, entries: Table) -> None:
        level = self._words[_LEVEL]
        count = self._count + len(entries.blocks)
        wanted = max(level, _level_for(count))
        if wanted > level:
            self._file.reserve(_offset(wanted), ENTRY_SIZE * (TABLE_ENTRIES_MIN << wanted))
            for piece in self._entries_by_slot():
                _insert(self._table_of(wanted), piece, wanted)
            self._words[_LEVEL] = wanted
        _insert(self._table_of(wanted), entries, wanted)
        self._count = count

    def _touched(self, count: int) -> int:
        grows = _level_for(self._count + count) > self._words[_LEVEL]
        return count + (self._count if grows else 0)

    def _everything(self) -> Table:
        return joined(list(self._entries_by_slot()))

    def _entries_by_slot(self) -> Iterator[Table]:
        """All, in steps of bounded size: other threads do not wait long for the interpreter then."""
        table = self._table_of(self._words[_LEVEL])
        for start in range(0, len(table.blocks), PIECE_ENTRIES):
            yield _entries(table, np.flatnonzero(table.blocks[start : start + PIECE_ENTRIES]) + start)

    def _table_of(self, level: int) -> Table:
        return self._table(_offset(level), TABLE_ENTRIES_MIN << level)


def _level_for(count: int) -> int:
    level = 0
    while count > _FULL * (TABLE_ENTRIES_MIN << level):
        level += 1
    return level


def _offset(level: int) -> int:
    """Byte of the file at which the table of that level begins: behind all smaller ones."""
    return PAGE_SIZE + ENTRY_SIZE * TABLE_ENTRIES_MIN * ((1 << level) - 1)


def _entries(table: Table, slots: npt.NDArray[np.int64]) -> Table:
    """Those of the slots whose entry is complete, with block numbers."""
    entries = table.taken(slots)
    complete = entries.addresses != NOT_PRESERVED
    return Table(entries.blocks[complete] - 1, entries.addresses[complete], entries.born[complete])


def _homes(keys: npt.NDArray[np.int64], level: int) -> npt.NDArray[np.int64]:
    mixed = keys.view(np.uint64) * np.uint64(_MULTIPLIER)
    return (mixed >> np.uint64(64 - _LEAST_BITS - level)).astype(np.int64)


def _probe(table: Table, keys: npt.NDArray[np.int64], level: int) -> npt.NDArray[np.int64]:
    """The slots of those keys that are in the table."""
    slots = _homes(keys, level)
    found = []
    while len(keys):
        there = table.blocks[slots]
        found.append(slots[there == keys])
        on = (there != keys) & (there != 0)
        keys = keys[on]
        slots = (slots[on] + 1) & (len(table.blocks) - 1)
    return np.concatenate(found)


def _insert(table: Table, entries: Table, level: int) -> None:
    keys = entries.blocks + 1
    slots = _homes(keys, level)
    pending = np.arange(len(keys))
    left = np.ones(len(keys), dtype=np.bool_)
    while len(pending):
        at = slots[pending]
        empty = table.blocks[at] == 0
        claiming, at = pending[empty], at[empty]
        # Several may claim one slot: the last one stored has it, the others go on.
        table.blocks[at] = keys[claiming]
        won = table.blocks[at] == keys[claiming]
        winners, at = claiming[won], at[won]
        table.born[at] = entries.born[winners]
        table.addresses[at] = entries.addresses[winners]
        left[winners] = False
        pending = pending[left[pending]]
        slots[pending] = (slots[pending] + 1) & (len(table.blocks) - 1)
