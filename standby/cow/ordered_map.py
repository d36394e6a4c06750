"""The ordered association map: entries sorted by block, found by binary search.

To insert without moving everything there are several sorted tables, each eight times the capacity of the one before.
New entries are merged with the smaller tables into the first one that has room for all of them.

Invariants:
- Every level has two halves of the file and at most one of them counts. A merge writes the one that does not.
- Which halves count, and how many entries of each, is one list; there are two lists, and `version` says which one
  holds: the other is written, then `version` is advanced. An engine that dies anywhere leaves a whole map.
- A reader that sees the same version before and after its search searched nothing that was being written: a half that
  counted is written again only after a later version.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from .association import PIECE_ENTRIES
from .entry_map import ENTRY_SIZE, TABLE_ENTRIES_MIN, EntryMap, Found, Table, joined, rounded_to_table, spread
from .mapped_file import PAGE_SIZE, MappedFile

_VERSION: Final = 0  # word
_LISTS: Final = (8, 24)  # words at which the two lists begin: entry count * 2 + half, one a level
_GROWTH: Final = 8
_LEVELS_MAX: Final = 16
assert TABLE_ENTRIES_MIN * _GROWTH ** (_LEVELS_MAX - 1) > 1 << 48


class OrderedMap(EntryMap):
    magic = b"SPASSOCO"

    def __init__(self, file: MappedFile, path: Path) -> None:
        super().__init__(file, path)
        self._capacities = _capacities(self.block_count)
        self._reserved: dict[int, int] = {}  # entries by offset of a half

    def lookup(self, first: int, count: int) -> Found:
        def in_range(blocks: np.ndarray[tuple[int], np.dtype[np.int64]]) -> slice:
            start, end = np.searchsorted(blocks, (first, first + count))
            return slice(start, end)

        return spread(self._select(in_range), first, count)

    @classmethod
    def _file_size(cls, block_count: int) -> int:
        return PAGE_SIZE + 2 * ENTRY_SIZE * sum(_capacities(block_count))

    def _put(self, entries: Table) -> None:
        version = self._words[_VERSION]
        counts = self._list(version)
        level, total = self._level_for(counts, len(entries.blocks))
        capacity = self._capacities[level]
        assert total <= capacity, f"{self.path}: more entries than blocks"
        half = 1 - (counts[level] & 1)
        offset = self._offset(level, half)
        if total > self._reserved.get(offset, 0):
            wanted = min(max(total, TABLE_ENTRIES_MIN), capacity)
            self._reserve(offset, capacity, 0, wanted)
            self._reserved[offset] = wanted
        parts = [self._half(each, word) for each, word in enumerate(counts[: level + 1]) if word >> 1]
        merged = joined([*parts, entries])
        order = np.argsort(merged.blocks, kind="stable")
        # In steps of bounded size: other threads do not wait long for the interpreter then.
        for start in range(0, total, PIECE_ENTRIES):
            self._table(offset, capacity).store(start, merged.taken(order[start : start + PIECE_ENTRIES]))
        counts[: level + 1] = [word & 1 for word in counts[:level]] + [total * 2 + half]
        start = _LISTS[(version + 1) & 1]
        for index, word in enumerate(counts):
            self._words[start + index] = word
        self._words[_VERSION] = version + 1

    def _level_for(self, counts: list[int], count: int) -> tuple[int, int]:
        """(the first level with room for that many more and all of the smaller ones, how many that is)."""
        total = count
        for level, capacity in enumerate(self._capacities):
            total += counts[level] >> 1
            if total <= capacity:
                break
        return level, total

    def _touched(self, count: int) -> int:
        return self._level_for(self._list(self._words[_VERSION]), count)[1]

    def _everything(self) -> Table:
        return self._select(lambda blocks: slice(0, len(blocks)))

    def _select(self, choose: Callable[[np.ndarray[tuple[int], np.dtype[np.int64]]], slice]) -> Table:
        """A copy of a stretch of every table. Repeated when a merge came between: then the engine has advanced."""
        while True:
            version = self._words[_VERSION]
            tables = [self._half(level, word) for level, word in enumerate(self._list(version)) if word >> 1]
            parts = [table.taken(choose(table.blocks)) for table in tables]
            if self._words[_VERSION] == version:
                return joined(parts) if parts else _NOTHING

    def _list(self, version: int) -> list[int]:
        start = _LISTS[version & 1]
        return self._words[start : start + len(self._capacities)].tolist()

    def _half(self, level: int, word: int) -> Table:
        """The entries that count of the half that counts."""
        return self._table(self._offset(level, word & 1), self._capacities[level]).first(word >> 1)

    def _offset(self, level: int, half: int) -> int:
        return PAGE_SIZE + ENTRY_SIZE * (2 * sum(self._capacities[:level]) + half * self._capacities[level])


_NOTHING: Final = Table(np.empty(0, dtype="<i8"), np.empty(0, dtype="<u8"), np.empty(0, dtype="<u4"))


def _capacities(block_count: int) -> list[int]:
    """Entries of each level; the last one has room for every block of the volume."""
    most = rounded_to_table(block_count)
    capacities = [TABLE_ENTRIES_MIN]
    while capacities[-1] < most:
        capacities.append(min(capacities[-1] * _GROWTH, most))
    return capacities
