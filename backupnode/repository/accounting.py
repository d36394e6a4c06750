"""What a backup occupies: of what it names, which part no other backup names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stillpoint.errors import DataCorrupt, NotFound, Refused

from .backup_id import BackupId
from .blobs import ID_SIZE, ZERO_ID
from .index import ChunkIndex, is_missing, sizes_of
from .interface import Usage
from .reader import PackReader
from .tree import page_count

if TYPE_CHECKING:
    from .repository import PackRepository


def named_locations(reader: PackReader, index: ChunkIndex, visited: set[bytes]) -> Iterator[npt.NDArray[np.uint64]]:
    """Where everything lies that a backup names, in any order; missing blobs and repetitions are among it.

    visited: ids of index pages whose chunks have been named before; they are left out, and those of this one put in.
    Raises DataCorrupt for a page that cannot be read.
    """
    page_ids = reader.page_ids
    yield index.find_all(bytes(page_ids))
    yield index.find_all(b"".join(reader.upper_ids))
    for page_index in range(page_count(reader.chunk_count)):
        identity = bytes(page_ids[page_index * ID_SIZE : (page_index + 1) * ID_SIZE])
        if identity != ZERO_ID and identity not in visited:
            visited.add(identity)
            yield index.find_all(reader.page(page_index))


def distinct(arrays: list[npt.NDArray[np.uint64]]) -> npt.NDArray[np.uint64]:
    """All of them in order, each once, without what is missing."""
    if not arrays:
        return np.empty(0, np.uint64)
    every = np.unique(np.concatenate(arrays))
    return every[~is_missing(every)]


def usage(repository: PackRepository, backup: BackupId) -> Usage:
    """Another backup whose index cannot be read counts for nothing.

    Sizes are right to the KiB for each chunk. Memory: 9 bytes for each chunk of the backup.
    Raises NotFound, DataCorrupt, DeviceError.
    """
    index = repository.packs.index
    mine = distinct(list(named_locations(repository.open(backup), index, set())))
    shared = np.zeros(len(mine), np.bool_)
    visited: set[bytes] = set()
    for other in list(repository.ids()):
        if other == backup:
            continue
        try:
            for located in named_locations(repository.open(other), index, visited):
                shared[_positions(mine, located)] = True
        except (NotFound, DataCorrupt, Refused):
            continue
    sizes = sizes_of(mine)
    return Usage(referenced_bytes=int(sizes.sum()), unique_bytes=int(sizes[~shared].sum()))


def _positions(among: npt.NDArray[np.uint64], wanted: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """Where those of `wanted` stand that are there. `among` is in order."""
    if not len(among):
        return np.empty(0, np.intp)
    at = np.minimum(np.searchsorted(among, wanted), len(among) - 1)
    found: npt.NDArray[np.intp] = at[among[at] == wanted]
    return found
