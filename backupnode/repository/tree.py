"""The index of a volume: a tree of pages, each 1024 ids, of chunks at the bottom and of pages above. Pure.

A page is stored as a blob under its own id, so an incremental stores only the pages it touched, and two backups share
all the others. A page of nothing but zeroes has ZERO_ID and is stored nowhere, at every level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from stillpoint.errors import DataCorrupt

from .blobs import ID_SIZE, ZERO_ID, ChunkId

IDS_PER_PAGE: Final = 1024

# Reads a page; stores one and says its id.
Load = Callable[[ChunkId], bytes]
Store = Callable[[bytes], ChunkId]


def page_count(id_count: int) -> int:
    return -(-id_count // IDS_PER_PAGE)


def load_ids(root: ChunkId, *, count: int, load: Load) -> bytearray:
    """The ids of the `count` lowest pages, in memory: 128 KiB for a volume of 1 TiB in chunks of 256 KiB.

    Raises DataCorrupt when a page has another length than its place asks for.
    """
    counts = [count]
    while counts[-1] > 1:
        counts.append(page_count(counts[-1]))
    ids = bytearray(root)
    for lower in reversed(counts[:-1]):
        below = bytearray(lower * ID_SIZE)
        for number, start in _places(ids):
            page = load(ChunkId(bytes(ids[start : start + ID_SIZE])))
            offset = number * IDS_PER_PAGE * ID_SIZE
            check_page(page, count=min(IDS_PER_PAGE, lower - number * IDS_PER_PAGE))
            below[offset : offset + len(page)] = page
        ids = below
    return ids


def store_ids(ids: bytes | bytearray, store: Store) -> ChunkId:
    """Store the pages above the lowest ones. Returns the root."""
    while len(ids) > ID_SIZE:
        above = bytearray()
        for start in range(0, len(ids), IDS_PER_PAGE * ID_SIZE):
            page = bytes(ids[start : start + IDS_PER_PAGE * ID_SIZE])
            above += store(page) if any(page) else ZERO_ID
        ids = above
    return ChunkId(bytes(ids))


def check_page(page: bytes, *, count: int) -> None:
    if len(page) != count * ID_SIZE:
        raise DataCorrupt(f"a page of the index has {len(page)} bytes instead of {count * ID_SIZE}")


def _places(ids: bytearray) -> Iterator[tuple[int, int]]:
    """(number, position) of the ids that are not ZERO_ID."""
    for number in range(len(ids) // ID_SIZE):
        start = number * ID_SIZE
        if any(ids[start : start + ID_SIZE]):
            yield number, start
