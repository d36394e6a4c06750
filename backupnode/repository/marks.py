"""Which of the stored blobs backups name: a bit for each blob of the index, whatever the number of backups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .blobs import ID_SIZE, ZERO_ID
from .index import Array, Bools, Segment, offsets_of, packs_of, places, sizes_of
from .reader import PackReader
from .tree import page_count

# Pages whose ids are looked up together; a few at once take as long as one.
_PAGES_AT_ONCE = 64


class Marks:
    """On a snapshot of the index. Blobs that were stored after it are not known here."""

    def __init__(self, snapshot: Sequence[Segment]) -> None:
        self._segments = snapshot
        self._bits = [np.zeros(-(-len(segment.keys) // 8), np.uint8) for segment in snapshot]

    def add(self, ids: bytes) -> None:
        """Mark what has one of these ids."""
        for _, number, positions in places(self._segments, ids):
            np.bitwise_or.at(self._bits[number], positions >> 3, np.left_shift(1, positions & 7).astype(np.uint8))

    def _locations(self) -> Iterator[Array]:
        """Of what is marked, a segment at a time."""
        for number, segment in enumerate(self._segments):
            yield segment.locations[self._marked(number)]

    def _marked(self, number: int) -> Bools:
        count = len(self._segments[number].keys)
        marked: Bools = np.unpackbits(self._bits[number], count=count, bitorder="little").view(np.bool_)
        return marked

    def bytes_by_pack(self) -> dict[int, int]:
        """Bytes of what is marked, a KiB too many for each blob at most. Packs without any are not named."""
        total: dict[int, int] = {}
        for locations in filter(len, self._locations()):
            sizes = np.bincount(packs_of(locations), weights=sizes_of(locations))
            for number in np.flatnonzero(sizes).tolist():
                total[number] = total.get(number, 0) + int(sizes[number])
        return total

    def offsets_in(self, packs: Iterable[int]) -> dict[int, set[int]]:
        """Where the marked blobs of some packs begin."""
        result: dict[int, set[int]] = {number: set() for number in packs}
        wanted = np.fromiter(result, np.int64)
        for every in self._locations():
            locations = every[np.isin(packs_of(every), wanted)]
            for number, offset in zip(packs_of(locations).tolist(), offsets_of(locations).tolist(), strict=True):
                result[number].add(offset)
        return result

    def size(self, *, without: Marks | None = None) -> int:
        """Bytes of what is marked, a KiB too many for each blob at most. without: and not marked there."""
        total = 0
        for number, segment in enumerate(self._segments):
            marked = self._marked(number)
            if without is not None:
                marked = marked & ~without._marked(number)
            total += int(sizes_of(segment.locations[marked]).sum())
        return total


def named_ids(reader: PackReader, visited: set[bytes]) -> Iterator[bytes]:
    """The ids of everything that a backup names, many at a time, in any order; zeroes and repetitions are among them.

    visited: ids of index pages whose chunks have been named before; they are left out, and those of this one put in.
    Raises DataCorrupt for a page that cannot be read.
    """
    page_ids = bytes(reader.page_ids)
    yield page_ids
    yield b"".join(reader.upper_ids)
    batch: list[bytes] = []
    for page_index in range(page_count(reader.chunk_count)):
        identity = page_ids[page_index * ID_SIZE : (page_index + 1) * ID_SIZE]
        if identity == ZERO_ID or identity in visited:
            continue
        visited.add(identity)
        batch.append(reader.page(page_index))
        if len(batch) == _PAGES_AT_ONCE:
            yield b"".join(batch)
            batch = []
    yield b"".join(batch)
