"""The shared header: one small mapped file by which readers in other processes follow the engine without messages.

It holds the list of snapshots with their states, guarded by a sequence number that is odd while the list changes.

Invariants:
- Only the engine writes. It makes the sequence odd, changes, makes it even: a reader that saw the same even number
  before and after its work saw one state of the list, and no slot it read was given away in between, because slots
  are freed only after the change that makes them unneeded is complete.
- A new snapshot is in the list before any block is preserved for it.
- It describes one run of the engine. A new run marks the old file closed and makes another, so a reader that outlives
  an engine notices instead of trusting maps nobody maintains.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from stillpoint.errors import DataCorrupt, DeviceError

from .mapped_file import MappedFile
from .values import SNAPSHOTS_MAX, SnapshotState

MAGIC: Final = b"SPSHARED"
VERSION: Final = 1  # 1: the first; readers refuse any other, both sides come from one release
HEADER: Final = struct.Struct("<8sIIQIIQ16sI")  # magic, version, closed, sequence, block_size, 0, size, uuid, count
ENTRY: Final = struct.Struct("<II")  # generation, state
TABLE_OFFSET: Final = 64
FILE_SIZE: Final = 36864

_CLOSED_WORD: Final = 3  # index in u32 words
_SEQUENCE_WORD: Final = 2  # index in u64 words
_SIZE_WORD: Final = 4  # index in u64 words
_COUNT_WORD: Final = 14  # index in u32 words
assert TABLE_OFFSET + SNAPSHOTS_MAX * ENTRY.size <= FILE_SIZE


@dataclass(frozen=True, slots=True)
class HeaderState:
    """One consistent reading. `states` goes from the oldest generation to the newest."""

    sequence: int
    states: dict[int, SnapshotState]


class SharedHeader:
    def __init__(self, file: MappedFile) -> None:
        self._file = file
        self._words = file.view.cast("I")
        self._longs = file.view.cast("Q")

    @classmethod
    def create(cls, path: Path, *, uuid: UUID, block_size: int, size: int) -> SharedHeader:
        """A header with no snapshots; that of an earlier run is marked closed and replaced. Raises DeviceError."""
        _close_earlier(path)
        try:
            file = MappedFile.create(path, FILE_SIZE)
            file.reserve(0, FILE_SIZE)
        except OSError as error:
            raise DeviceError(f"{path}: cannot be made: {error.strerror}", error.errno or errno.EIO) from error
        HEADER.pack_into(file.view, 0, MAGIC, VERSION, 0, 0, block_size, 0, size, uuid.bytes, 0)
        return cls(file)

    @classmethod
    def open(cls, path: Path) -> SharedHeader:
        """For a reader. Raises OSError, DataCorrupt."""
        file = MappedFile.open(path, writable=False)
        if file.size != FILE_SIZE or HEADER.unpack_from(file.view)[:2] != (MAGIC, VERSION):
            file.close()
            raise DataCorrupt(f"{path}: is no shared header of version {VERSION}")
        return cls(file)

    def publish(self, states: Sequence[tuple[int, SnapshotState]]) -> None:
        """Replace the list. Readers that are at work start again. For the engine only."""
        assert len(states) <= SNAPSHOTS_MAX
        self._longs[_SEQUENCE_WORD] += 1
        for index, (generation, state) in enumerate(states):
            ENTRY.pack_into(self._file.view, TABLE_OFFSET + index * ENTRY.size, generation, state)
        self._words[_COUNT_WORD] = len(states)
        self._longs[_SEQUENCE_WORD] += 1

    def set_size(self, size: int) -> None:
        self._longs[_SIZE_WORD] = size

    @property
    def sequence(self) -> int:
        """Odd while the list is changing."""
        return self._longs[_SEQUENCE_WORD]

    @property
    def closed(self) -> bool:
        """No engine maintains this header any more."""
        return self._words[_CLOSED_WORD] != 0

    def read(self) -> HeaderState | None:
        """The list as it is now, or None when it is being changed just now: ask again. Raises DataCorrupt."""
        before = self.sequence
        count = min(self._words[_COUNT_WORD], SNAPSHOTS_MAX)
        table = bytes(self._file.view[TABLE_OFFSET : TABLE_OFFSET + count * ENTRY.size])
        if before & 1 or self.sequence != before:
            return None
        try:
            states = {generation: SnapshotState(state) for generation, state in ENTRY.iter_unpack(table)}
        except ValueError as error:
            raise DataCorrupt(f"a shared header is damaged: {error}") from None
        return HeaderState(before, states)

    def mark_closed(self) -> None:
        self._words[_CLOSED_WORD] = 1

    def close(self) -> None:
        self._words = memoryview(b"").cast("I")
        self._longs = memoryview(b"").cast("Q")
        self._file.close()


def _close_earlier(path: Path) -> None:
    try:
        earlier = MappedFile.open(path, writable=True)
    except (OSError, ValueError):
        return
    if earlier.size == FILE_SIZE:
        earlier.view.cast("I")[_CLOSED_WORD] = 1
    earlier.close()
