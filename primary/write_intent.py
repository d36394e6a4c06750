"""Holds back writes to cold extents until a durable record names these, and lets unused extents leave in lots.

Order of events, each only after the one before it
- A write into a cold extent is held back, and so is every later one that touches an extent of it.
- One append and fdatasync names all extents that wait; then the writes start, in the order in which they came.
- When too many extents are hot, a lot of the longest unused leaves: the local disk is flushed, then the dirty maps; the
  next record no longer names them. Nothing waits for that, unless no place is left.

A flush, not only a wait: the standby's flush takes marks off the map although this disk has not flushed. That is right
while the extent is hot, and so an extent may only turn cold after this disk has.

When the log, the disk or a map cannot be made durable, the writes that depend on it get the error, and so does every
later one into a cold extent. Nothing is tried again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple

from stillpoint.devices import BlockDevice
from stillpoint.document import fsync_folder
from stillpoint.extents import Extent
from stillpoint.nbd.errors import nbd_errno
from stillpoint.nbd.export import run_in_thread

from .dirty_map import DirtyMap
from .hot_extents import CAPACITY_DEFAULT, EXTENT_SHIFT, EXTENT_SIZE, HotExtents
from .intent_log import IntentLog

logger = logging.getLogger(__name__)


def open_write_intent(
    folder: Path,
    device: BlockDevice,
    open_maps: Callable[[Sequence[Extent] | None], Sequence[DirtyMap]],
    executor: Executor,
    *,
    capacity: int,
) -> WriteIntent | None:
    """The log in `folder` and the maps of one volume, opened in the right order. Waits for the disk.

    open_maps: is given what a power loss has made dirty; None: everything. capacity: 0: keep no log, return None.
    Raises DeviceError, DataCorrupt.
    """
    path = folder / "intent.log"
    if not capacity:
        path.unlink(missing_ok=True)
        fsync_folder(folder)  # before any write: an old log would say too little
        open_maps(None)
        return None
    log = IntentLog(path)
    return WriteIntent(log, device, open_maps(log.suspects(device.size)), executor, capacity=capacity)


class _Held(NamedTuple):
    """A write that waits: its extents, what starts it, and what refuses it with an errno."""

    first: int
    last: int
    start: Callable[[], None]
    refuse: Callable[[int], None]


class WriteIntent:
    """One volume's. Everything runs on the loop."""

    def __init__(
        self,
        log: IntentLog,
        device: BlockDevice,
        maps: Sequence[DirtyMap],
        executor: Executor,
        *,
        capacity: int = CAPACITY_DEFAULT,
    ) -> None:
        """maps: of all standbys, opened with `log.suspects`, so that what the log names is in them. Waits for the disk.

        Raises DeviceError.
        """
        if log.hot is None:
            # Nothing tells what this disk may have in its cache only; and the maps must not depend on a record either.
            device.flush()
            for dirty in maps:
                dirty.persist()
            log.append(())
        self.extents = HotExtents(device.size, capacity=capacity, hot=log.hot or ())
        self.maps = tuple(maps)
        self.released: Callable[[], None] = _nothing  # writes were started; end the batch
        self.failed: Callable[[str], None] = _nothing_failed
        self.miss_count = 0  # writes that had to wait
        self._log = log
        self._device = device
        self._executor = executor
        self._held: deque[_Held] = deque()
        self._appending = False
        self._evicting = False
        self._failure: Exception | None = None
        self._settled = asyncio.Event()

    @property
    def hot_bytes(self) -> int:
        return len(self.extents) << EXTENT_SHIFT

    @property
    def resync_max_bytes(self) -> int:
        """The most that a power loss adds to what has to be sent again."""
        return min(self.extents.limit, len(self.extents.states)) * EXTENT_SIZE

    @property
    def part_size(self) -> int:
        """Larger changes have to come in parts of this many bytes."""
        return max(self.extents.lot, 9) << EXTENT_SHIFT

    def may_start(self, offset: int, length: int) -> bool:
        """Whether a write may start now; the answer for all extents that the hot path does not know as used."""
        return self.extents.may_start(offset >> EXTENT_SHIFT, (offset + length - 1) >> EXTENT_SHIFT)

    def hold(self, offset: int, length: int, start: Callable[[], None], refuse: Callable[[int], None]) -> None:
        """Call `start` when the write may start, or `refuse` with an errno; never inside this call."""
        self.miss_count += 1
        first, last = offset >> EXTENT_SHIFT, (offset + length - 1) >> EXTENT_SHIFT
        self.extents.hold(first, last)
        self._held.append(_Held(first, last, start, refuse))

    @property
    def held_count(self) -> int:
        return len(self._held)

    def batch_ended(self) -> None:
        """No write is half way; begin what is needed for those that are held back."""
        if self._failure is not None:
            self._refuse_all(self._failure)
            return
        if not self._appending and self._held:
            record = self.extents.begin_admission()
            if record is not None:
                self._appending = True
                run_in_thread(self._executor, lambda: self._log.append(record), self._appended)
        if not self._evicting and (self._held or len(self.extents) > self.extents.capacity):
            keep = range(self._held[0].first, self._held[0].last + 1) if self._held else range(0)
            if self.extents.begin_lot(keep):
                self._evicting = True
                run_in_thread(self._executor, self._make_durable, self._evicted)

    def _make_durable(self) -> None:
        """In a thread. The disk first: a mark that goes meanwhile stands for what the disk has by then."""
        self._device.flush()
        for dirty in self.maps:
            dirty.persist()

    def _appended(self, error: Exception | None) -> None:
        self._appending = False
        if error is None:
            self.extents.admitted()
        self._go_on(error)

    def _evicted(self, error: Exception | None) -> None:
        self._evicting = False
        if error is None:
            self.extents.lot_flushed()
        self._go_on(error)

    def _go_on(self, error: Exception | None) -> None:
        if error is not None and self._failure is None:
            self._failure = error
            logger.error("write intent cannot be noted: %s", error)
            self.failed(str(error))
        if self._failure is None:
            while self._held and self.extents.want(self._held[0].first, self._held[0].last):
                held = self._held.popleft()
                held.start()
                self.extents.let_go(held.first, held.last)
        self.released()
        self._settled.set()

    def _refuse_all(self, error: Exception) -> None:
        while self._held:
            held = self._held.popleft()
            self.extents.let_go(held.first, held.last)
            held.refuse(nbd_errno(error))

    async def close(self) -> None:
        """Nothing is written any more. Waits for what its threads do."""
        while self._appending or self._evicting:
            self._settled.clear()
            await self._settled.wait()
        self._log.close()


def _nothing() -> None:
    """Until a volume uses it."""


def _nothing_failed(reason: str) -> None:
    """Until a volume uses it."""
