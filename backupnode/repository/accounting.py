"""What a backup occupies: of what it names, which part no other backup names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stillpoint.errors import DataCorrupt, NotFound, Refused

from .backup_id import BackupId
from .interface import Usage
from .marks import Marks, named_ids

if TYPE_CHECKING:
    from .repository import PackRepository


def usage(repository: PackRepository, backup: BackupId) -> Usage:
    """Another backup whose index cannot be read counts for nothing.

    Sizes are right to the KiB for each chunk. Memory: 2 bits for each chunk of the repository.
    Raises NotFound, DataCorrupt, DeviceError.
    """
    snapshot = repository.packs.thread.submit(repository.packs.index.snapshot).result()
    mine, others = Marks(snapshot), Marks(snapshot)
    for ids in named_ids(repository.open(backup), set()):
        mine.add(ids)
    visited: set[bytes] = set()
    for other in list(repository.ids()):
        if other == backup:
            continue
        try:
            for ids in named_ids(repository.open(other), visited):
                others.add(ids)
        except (NotFound, DataCorrupt, Refused):
            continue
    return Usage(referenced_bytes=mine.size(), unique_bytes=mine.size(without=others))
