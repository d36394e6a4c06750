"""The unordered association map: entries as they came, found by linear search. The least memory, the slowest lookup.

Invariants:
- Entries up to `count` are complete and never change; `count` is stored last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from .entry_map import ENTRY_SIZE, EntryMap, Found, Table, rounded_to_table, spread
from .mapped_file import PAGE_SIZE, MappedFile

_COUNT: Final = 0  # word: entries that count
_RESERVE_ENTRIES: Final = 8192


class UnorderedMap(EntryMap):
    magic = b"SPASSOCU"

    def __init__(self, file: MappedFile, path: Path) -> None:
        super().__init__(file, path)
        self._capacity = rounded_to_table(self.block_count)
        self._reserved = 0

    def lookup(self, first: int, count: int) -> Found:
        table = self._table(PAGE_SIZE, self._capacity)
        # Unsigned, so that one comparison tells both ends of the range.
        there = (table.blocks[: self._words[_COUNT]] - first).view(np.uint64) < count
        return spread(table.taken(np.flatnonzero(there)), first, count)

    @classmethod
    def _file_size(cls, block_count: int) -> int:
        return PAGE_SIZE + ENTRY_SIZE * rounded_to_table(block_count)

    def _put(self, entries: Table) -> None:
        start = self._words[_COUNT]
        end = start + len(entries.blocks)
        if end > self._reserved:
            wanted = min(-(-end // _RESERVE_ENTRIES) * _RESERVE_ENTRIES, self._capacity)
            self._reserve(PAGE_SIZE, self._capacity, self._reserved, wanted)
            self._reserved = wanted
        self._table(PAGE_SIZE, self._capacity).store(start, entries)
        self._words[_COUNT] = end

    def _everything(self) -> Table:
        return self._table(PAGE_SIZE, self._capacity).taken(slice(0, self._words[_COUNT]))
