"""The plain values of the snapshot engine: what a snapshot and a bookmark are, and which names they may have."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from stillpoint.errors import InvalidRequest
from stillpoint.extents import Extent

NO_GENERATION: Final = -1  # below every generation; a block never written has generation 0
FIRST_GENERATION: Final = 1
GENERATION_MAX: Final = (1 << 32) - 2
SNAPSHOTS_MAX: Final = 4096  # live or invalid, per volume; the shared header has a fixed table

BLOCK_SIZE_MIN: Final = 512
BLOCK_SIZE_MAX: Final = 1 << 20
BLOCK_SIZE_DEFAULT: Final = 64 << 10

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class SnapshotState(enum.IntEnum):
    """What the catalog, the shared header and `describe()` say of a snapshot. The numbers are in two formats."""

    CREATING = 1  # cut, and preserved for, but not durable yet: not served
    ACTIVE = 2
    INVALID = 3  # lost blocks: kept by name so that an operator sees why, never served
    LEAVING = 4  # being deleted or made invalid: its map still serves older snapshots for a moment


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A point in the write stream of one volume."""

    volume: str
    name: str
    uuid: UUID
    generation: int
    state: SnapshotState
    created_ns: int  # wall clock, for people only: order is `generation`
    size: int  # bytes of the volume at that instant
    store: str
    invalid_reason: str = ""
    protected: bool = False


@dataclass(frozen=True, slots=True)
class Bookmark:
    """The instant of a snapshot without its data: a base for an incremental, good for ever and nearly free."""

    volume: str
    name: str
    generation: int
    incarnation: UUID  # of the volume's birth map: a base of another incarnation says nothing about this volume
    snapshot: UUID
    created_ns: int


@dataclass(frozen=True, slots=True)
class ChangedExtents:
    """What may differ between a base and a snapshot.

    known: False when the base belongs to another life of the volume; `extents` is then the whole snapshot, so that a
    caller who does not look reads too much rather than too little.
    """

    known: bool
    extents: Sequence[Extent]


@dataclass(frozen=True, slots=True)
class SnapshotStatistics:
    """blocks_preserved: blocks whose copy hangs on this snapshot; older ones may read the same copies.
    reclaimable_size: bytes of the store that deleting this snapshot gives back, exactly.
    shared_size: bytes of the store that it shares with older ones. Blocks of zeroes take no room and are in neither."""

    name: str
    blocks_preserved: int
    reclaimable_size: int
    shared_size: int


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """size: bytes for blocks. size_max: bytes the whole device may become; 0: it stays as it is."""

    name: str
    kind: str
    size: int
    used_size: int
    failed: str  # why the store is out of service; empty when it is fine
    paths: tuple[str, ...]  # of its files and disks; none for memory
    map_form: str  # of the association maps of the snapshots made in it
    uuid: str
    number: int
    size_max: int
    used_percent: int  # of what it may become
    warning_percent: int  # the highest threshold reached: 70, 85, 95; 0: none


def check_name(name: str, *, what: str) -> None:
    """Raise InvalidRequest unless `name` can be a file name, an export name and a word on a command line."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name[:80]!r} cannot name a {what}: 1 to 64 of A-Z a-z 0-9 . _ - are allowed, the first a letter or digit"
        )


def check_block_size(block_size: int) -> None:
    if not BLOCK_SIZE_MIN <= block_size <= BLOCK_SIZE_MAX or block_size & (block_size - 1):
        raise InvalidRequest(f"a block of {block_size} bytes: it must be a power of two from 512 bytes to 1 MiB")
