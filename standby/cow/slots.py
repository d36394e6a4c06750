"""Which parts of a preservation store are free. A pure value: it does no I/O and forgets all when dropped.

The data area is divided into segments of 1 MiB. A free segment belongs to nobody; one in use is divided into slots of
one size, so volumes of different block sizes share a store without fragmenting it, and a segment whose last slot is
freed may be taken for any size again.

Invariants:
- A slot handed out is not handed out again before it was freed.
- `used` counts the slots in use of each segment; a segment is free exactly when its `kind` is FREE.
- Freeing is the caller's promise that the step that made the slot unneeded is durable (R4).
- A withheld segment holds slots of a volume that has not been opened, so nobody knows which of them are needed: none
  of its slots is handed out, freed or not, until the allocator is rebuilt.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np
import numpy.typing as npt

from stillpoint.errors import StoreFull

from .association import UNIT_SIZE, Addresses

SEGMENT_SIZE: Final = 1 << 20
_UNITS_PER_SEGMENT: Final = SEGMENT_SIZE // UNIT_SIZE
_FREE: Final = 255


class SlotAllocator:
    """Addresses are in units of 512 bytes from the start of the device; `data_offset` bytes of it are not ours."""

    def __init__(self, *, data_offset: int, data_size: int) -> None:
        self.segment_count = data_size // SEGMENT_SIZE
        self._first_unit = data_offset // UNIT_SIZE
        self._kind: npt.NDArray[np.uint8] = np.full(self.segment_count, _FREE, dtype=np.uint8)
        self._used: npt.NDArray[np.uint16] = np.zeros(self.segment_count, dtype=np.uint16)
        self._withheld: npt.NDArray[np.bool_] = np.zeros(self.segment_count, dtype=np.bool_)
        self._pool: deque[int] = deque(range(self.segment_count))
        self._free: dict[int, list[Addresses]] = {}  # slot size: batches of free slots
        self.used_size = 0

    @property
    def size(self) -> int:
        return self.segment_count * SEGMENT_SIZE

    def extend(self, data_size: int) -> None:
        """The data area has grown to that many bytes; what was given out stays where it is."""
        more = data_size // SEGMENT_SIZE - self.segment_count
        assert more >= 0
        self._kind = np.append(self._kind, np.full(more, _FREE, dtype=np.uint8))
        self._used = np.append(self._used, np.zeros(more, dtype=np.uint16))
        self._withheld = np.append(self._withheld, np.zeros(more, dtype=np.bool_))
        self._pool.extend(range(self.segment_count, self.segment_count + more))
        self.segment_count += more

    def allocate(self, count: int, slot_size: int) -> Addresses:
        """`count` slots, neighbours where possible, so that they can be written in one go.

        Raises StoreFull when there are not that many; nothing is taken then.
        """
        taken: list[Addresses] = []
        missing = count
        free = self._free.setdefault(slot_size, [])
        while missing:
            if not free and not self._divide_segment(slot_size, free):
                free.extend(taken)
                raise StoreFull(f"no room for {count} blocks of {slot_size} bytes")
            batch = free.pop()
            taken.append(batch[:missing])
            if len(batch) > missing:
                free.append(batch[missing:])
            missing -= len(taken[-1])
        slots: Addresses = np.concatenate(taken) if len(taken) != 1 else taken[0]
        self._count(slots, 1)
        self.used_size += count * slot_size
        return slots

    def free(self, slots: Addresses, slot_size: int) -> list[int]:
        """Take slots back. Returns the byte offsets of segments that hold nothing now: their space may be given up."""
        if not len(slots):
            return []
        touched = self._count(slots, -1)
        self.used_size -= len(slots) * slot_size
        empty = touched[(self._used[touched] == 0) & ~self._withheld[touched]]
        segments = self._segments_of(slots)
        still_used = slots[~self._withheld[segments] & (self._used[segments] != 0)]
        if len(still_used):
            self._free.setdefault(slot_size, []).append(np.sort(still_used))
        if len(empty):
            self._kind[empty] = _FREE
            self._pool.extend(empty.tolist())
            self._forget_free_slots_in(empty, slot_size)
        return [(self._first_unit + segment * _UNITS_PER_SEGMENT) * UNIT_SIZE for segment in empty.tolist()]

    def rebuild(self, used: dict[int, Addresses], withheld: Addresses) -> None:
        """Start again from what a log says: slots in use by size, and slots whose segments are withheld."""
        self._kind[:] = _FREE
        self._used[:] = 0
        self._withheld[:] = False
        self._free = {}
        self.used_size = 0
        for slot_size, slots in used.items():
            self._take(slot_size, slots)
        segments = np.unique(self._segments_of(withheld))
        self._withheld[segments] = True
        for slot_size in self._free:
            self._forget_free_slots_in(segments, slot_size)
        self._pool = deque(np.flatnonzero((self._kind == _FREE) & ~self._withheld).tolist())

    def adopt_withheld(self, slots: Addresses, slot_size: int) -> None:
        """Count slots as used that lie in withheld segments; the segments stay withheld."""
        assert bool(np.all(self._withheld[self._count(slots, 1)]))
        self.used_size += len(slots) * slot_size

    def _forget_free_slots_in(self, segments: npt.NDArray[np.int64], slot_size: int) -> None:
        forgotten = np.zeros(self.segment_count, dtype=np.bool_)
        forgotten[segments] = True
        self._free[slot_size] = [
            rest for batch in self._free.get(slot_size, []) if len(rest := batch[~forgotten[self._segments_of(batch)]])
        ]

    def _take(self, slot_size: int, slots: Addresses) -> None:
        taken = self._count(slots, 1)
        self.used_size += len(slots) * slot_size
        assert bool(np.all(self._kind[taken] == _FREE)), "one segment holds slots of two sizes"
        self._kind[taken] = slot_size.bit_length()
        every = (taken[:, None] * _UNITS_PER_SEGMENT + self._slot_units(slot_size)[None, :]).ravel()
        free = np.setdiff1d(every.astype(np.uint64) + np.uint64(self._first_unit), slots, assume_unique=True)
        if len(free):
            self._free[slot_size] = [free]

    def _divide_segment(self, slot_size: int, free: list[Addresses]) -> bool:
        if not self._pool:
            return False
        segment = self._pool.popleft()
        self._kind[segment] = slot_size.bit_length()
        start = self._first_unit + segment * _UNITS_PER_SEGMENT
        free.append(self._slot_units(slot_size) + np.uint64(start))
        return True

    @staticmethod
    def _slot_units(slot_size: int) -> Addresses:
        return np.arange(0, _UNITS_PER_SEGMENT, slot_size // UNIT_SIZE, dtype=np.uint64)

    def _count(self, slots: Addresses, sign: int) -> npt.NDArray[np.int64]:
        """One more (1) or one less (-1) in use for each slot. Returns their segments, ascending."""
        segments, counts = np.unique(self._segments_of(slots), return_counts=True)
        self._used[segments] += (sign * counts).astype(np.uint16)  # wraps to the right sum
        return segments

    def _segments_of(self, slots: Addresses) -> npt.NDArray[np.int64]:
        return ((slots - np.uint64(self._first_unit)) // np.uint64(_UNITS_PER_SEGMENT)).astype(np.int64)
