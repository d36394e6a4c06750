"""Which extents of a volume may be written to without a note of it first: a pure decision, no I/O.

The two copies may differ, without the dirty map saying so after a power loss, only in extents that the log on disk
names (`intent_log.py`). So an extent is *hot*, and its writes cost nothing, from when a record that names it is durable
until this disk and the map are.

Invariants
- Every hot extent is named by the newest durable record. The record may name more: extents that left since.
- An extent leaves only after a flush of the local disk and of the maps that began when no write of it was under way,
  and if nothing was written to it meanwhile.
- Nothing is written to an extent that a write which is held back touches, so no write overtakes another.
- At most `limit` extents are hot: `capacity`, and an eighth more while those that leave are flushed.
"""

from __future__ import annotations

from collections.abc import Iterable

EXTENT_SHIFT = 22
EXTENT_SIZE = 1 << EXTENT_SHIFT

CAPACITY_MIN, CAPACITY_MAX, CAPACITY_DEFAULT = 16, 896, 256

# States. The hot path asks for USED only; everything else takes the longer way.
_NOT_NOW = 0  # cold, or written to by a write that is held back
_IDLE = 1  # hot, not written to since the last sweep
USED = 2  # hot


class HotExtents:
    """`states` holds one byte for each extent of the volume; it stays the same object until `grow`."""

    def __init__(self, size: int, *, capacity: int = CAPACITY_DEFAULT, hot: Iterable[int] = ()) -> None:
        """size: of the volume, bytes. hot: what the newest durable record names; may be more than `limit`."""
        assert CAPACITY_MIN <= capacity <= CAPACITY_MAX
        self.capacity = capacity
        self.lot = capacity // 8
        self.limit = capacity + self.lot
        self.states = bytearray(-(-size >> EXTENT_SHIFT))
        self._hot = dict.fromkeys(extent for extent in hot if extent < len(self.states))  # in the order of the sweep
        for extent in self._hot:
            self.states[extent] = USED
        self._wanted: dict[int, None] = {}  # cold, and a write waits for it; oldest first
        self._admitting: list[int] = []
        self._leaving: set[int] = set()
        self._blocked: dict[int, int] = {}  # extent → writes held back that touch it

    def grow(self, size: int) -> None:
        self.states = self.states + bytes(-(-size >> EXTENT_SHIFT) - len(self.states))

    def __len__(self) -> int:
        return len(self._hot)

    # --- writes

    def may_start(self, first: int, last: int) -> bool:
        """Whether a write of these extents may start now. If not, hold it back (`hold`)."""
        for extent in range(first, last + 1):
            if extent not in self._hot or extent in self._blocked:
                return False
            if extent in self._leaving and self._wanted:
                return False  # others wait for its place
        for extent in range(first, last + 1):
            self._leaving.discard(extent)
            self.states[extent] = USED
        return True

    def hold(self, first: int, last: int) -> None:
        """A write of these extents waits."""
        for extent in range(first, last + 1):
            self._blocked[extent] = self._blocked.get(extent, 0) + 1
            self.states[extent] = _NOT_NOW
            if extent not in self._hot:
                self._wanted[extent] = None

    def want(self, first: int, last: int) -> bool:
        """Whether these extents, of the oldest write that is held back, are hot; what is cold of them is wanted."""
        ready = True
        for extent in range(first, last + 1):
            if extent not in self._hot:
                self._wanted[extent] = None
                ready = False
            else:
                self._leaving.discard(extent)
        return ready

    def let_go(self, first: int, last: int) -> None:
        """A write that was held back has started, or was refused."""
        for extent in range(first, last + 1):
            self._blocked[extent] -= 1
            if not self._blocked[extent]:
                del self._blocked[extent]
                self.states[extent] = USED if extent in self._hot else _NOT_NOW

    # --- coming in

    def begin_admission(self) -> list[int] | None:
        """What the next record has to name for those who wait; None: nobody waits, or there is no room."""
        room = self.limit - len(self._hot)
        fresh = [extent for _, extent in zip(range(room), self._wanted, strict=False)]
        if not fresh:
            return None
        self._admitting = fresh
        return sorted([*self._hot, *fresh])

    def admitted(self) -> None:
        """That record is durable."""
        for extent in self._admitting:
            del self._wanted[extent]
            self._hot[extent] = None
            self.states[extent] = _NOT_NOW if extent in self._blocked else USED
        self._admitting = []

    # --- leaving

    def begin_lot(self, keep: range) -> bool:
        """Choose extents that leave, if there are too many: the longest unused, but none of `keep`.

        True: flush the local disk and the maps, then call `lot_flushed`.
        """
        crowded = len(self._hot) >= self.limit if self._wanted else len(self._hot) > self.capacity
        if not crowded:
            return False
        for _ in range(2 * len(self._hot)):
            if len(self._leaving) >= max(self.lot, len(self._hot) - self.capacity):
                break
            extent = next(iter(self._hot))
            del self._hot[extent]
            self._hot[extent] = None
            if extent in keep:
                continue
            if self.states[extent] == USED:
                self.states[extent] = _IDLE
            else:
                self._leaving.add(extent)
        return bool(self._leaving)

    def lot_flushed(self) -> None:
        """Those of the lot that were not written to meanwhile are cold."""
        for extent in self._leaving:
            del self._hot[extent]
            self.states[extent] = _NOT_NOW
        self._leaving.clear()
