"""The write half of the engine: changes go to the mirror, preserving first what a live snapshot still sees.

Invariants:
- For every block: pre-image and record durable, map entry, birth, overwrite in place, in this order (`preserver.py`).
- A change whose blocks need no preserving goes straight to the mirror. One that must preserve durably first is staged
  in bounded memory, with every later change that overlaps it, until `commit`; nothing overtakes a staged change.
- Whoever preserves a stage holds `_lock`. When that fails snapshots go, and it is tried again (`making_room.py`).
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

import numpy as np

from stillpoint.errors import DeviceError, StoreFull
from stillpoint.extents import check_range

from . import preserver
from .limits import Limits
from .making_room import RoomMaker
from .preservation import PreImages
from .preserver import Failure, Trouble
from .stage import MARK_MAX, Change, Marks, Stage, overlay
from .values import NO_GENERATION, Snapshot
from .volume import Volume

STAGE_SIZE_MAX: Final = 16 << 20
_COMMIT_SHARE: Final = 16  # of the bound: a MiB of changes of 4 KiB is 16 MiB of blocks to preserve for one flush
_NOTHING_PASSES: Final = 1 << 40  # as newest snapshot: newer than any birth, so every write takes the careful way
_AT_ONCE_MAX: Final = 4 << 20  # bytes preserved in one turn of the loop; more is staged and done in a thread


class WriteStream(RoomMaker):
    """Methods that are not `async` never wait for a disk but for the write into the page cache.

    After the mirror refused a staged change every call raises DeviceError: what was acknowledged is lost, so the node
    must say so and the primary must send it again.
    """

    def __init__(
        self,
        volume: Volume,
        *,
        executor: Executor | None = None,
        stage_size_max: int = STAGE_SIZE_MAX,
        on_staged: Callable[[], None] | None = None,
        on_ended: Callable[[Snapshot], None] | None = None,
        expires: bool = False,
        count_max: int = 0,
        preserved_size_max: int = 0,
    ) -> None:
        """executor: where steps run that wait for disks; None: the loop's own.
        stage_size_max: bytes of memory for staged changes; see `wants_commit`.
        on_staged: called when the first change is staged; whoever sets it calls `commit` within a short time.
        on_ended: called when the engine itself has ended a snapshot, as it was made: it expired and is gone, or it is
        invalid.
        expires, count_max, preserved_size_max: the limits of a volume that has none of its own.
        """
        limits = Limits(expires, count_max, preserved_size_max)
        super().__init__(volume, executor=executor, on_ended=on_ended, limits=limits)
        self._stage_size_max = stage_size_max
        self._on_staged = on_staged
        self._closing: deque[Stage] = deque()  # from before a cut, or being committed; oldest first
        self._closing_size = 0
        self._open = Stage(epoch=volume.current, mark=1)
        self._marks = Marks(volume.block_count)
        self._shift = volume.shift
        self._mirror = volume.mirror
        self._refresh()

    def write(self, offset: int, payload: memoryview) -> None:
        """Write at `offset`. The payload is borrowed for the call. Raises OutOfRange, DeviceError."""
        first = offset >> self._shift
        if (offset + len(payload) - 1) >> self._shift == first and offset >= 0:
            try:
                born = self._births[first]
                marked = self._mark_bytes[first]
            except IndexError:
                check_range(offset=offset, length=len(payload), size=self._volume.size)
                raise
            if born > self._newest and not marked:
                if born != self._current:
                    self._births[first] = self._current
                self._mirror.write(offset, (payload,))
                return
            if (marked or born <= self._staged_to) and self._failed is None:
                self._stage(Change(offset, len(payload), bytes(payload), False, False), first, first)
                return
        self._change(Change(offset, len(payload), payload, is_trim=False, may_trim=False))

    def trim(self, offset: int, length: int) -> None:
        """Give the range back; it reads as zeroes. Counts as a write. Raises OutOfRange, DeviceError."""
        self._change(Change(offset, length, None, is_trim=True, may_trim=True))

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        """Make the range read as zeroes. Counts as a write. Raises OutOfRange, DeviceError."""
        self._change(Change(offset, length, None, is_trim=False, may_trim=may_trim))

    def _change(self, change: Change) -> None:
        self._check_usable()
        check_range(offset=change.offset, length=change.length, size=self._volume.size)
        if not change.length:
            return
        first = change.offset >> self._shift
        last = (change.offset + change.length - 1) >> self._shift
        if not self._marks.any(first, last) and self._preserve_at_once(first, last):
            self._volume.births.array[first : last + 1] = self._current
            change.apply(self._mirror)
            return
        if change.data is not None:
            change = change._replace(data=bytes(change.data))
        self._stage(change, first, last)

    def _preserve_at_once(self, first: int, last: int) -> bool:
        """Whether the blocks may be overwritten now. Preserves them where that takes no disk, so only into memory."""
        volume = self._volume
        born = volume.births.array[first : last + 1]
        if self._newest == NO_GENERATION or int(born.min()) > self._newest:
            return True
        targets = volume.targets(before=self._current)
        if targets.to == NO_GENERATION:
            return True
        if int(born.min()) <= targets.durable_to or targets.store is None or self._is_over_cap:
            return False
        blocks = np.flatnonzero(born <= targets.to) + first
        if len(blocks) * volume.block_size > _AT_ONCE_MAX or not volume.maps[targets.to].is_quick(len(blocks)):
            return False
        data = memoryview(bytearray(len(blocks) * volume.block_size))
        for start, end in preserver.runs(blocks):
            view = data[start * volume.block_size : end * volume.block_size]
            if not self._mirror.try_read_into(int(blocks[start]) * volume.block_size, view):
                return False
        born_then = born[blocks - first]
        images = PreImages(volume.incarnation, volume.block_size, blocks, born_then, targets.to, self._current, data)
        try:
            addresses = targets.store.preserve(images)
        except (StoreFull, DeviceError):
            return False  # staged: the commit meets the same trouble and makes room
        volume.count_preserved(addresses, 1)
        try:
            volume.maps[targets.to].put_many(blocks, addresses, born_then)
        except OSError:
            return False
        return True

    def _stage(self, change: Change, first: int, last: int) -> None:
        """Let the change, whose data is a copy of ours, wait for a commit."""
        if not self.staged_bytes and self._on_staged is not None:
            self._on_staged()
        self._open.add(change)
        self._marks.set(first, last, self._open.mark)

    @property
    def staged_bytes(self) -> int:
        """Memory held by changes that wait for a commit; 0 when nothing waits."""
        return self._closing_size + self._open.size

    @property
    def wants_commit(self) -> bool:
        """The bound of staged memory is reached: take nothing more before `await commit()`."""
        return self.staged_bytes >= self._stage_size_max

    @property
    def is_worth_commit(self) -> bool:
        """Enough waits that a commit begun now, while more is taken, is as cheap for a change as a later one."""
        return self._open.size >= self._stage_size_max // _COMMIT_SHARE

    async def commit(self) -> None:
        """Preserve and apply everything staged before this call. The mirror is not flushed. Raises DeviceError."""
        if not self.staged_bytes:
            return
        await self._uninterrupted(self._commit())

    async def flush(self) -> None:
        """Everything given before this call is on the mirror and durable. Calls that wait share one flush.

        Raises DeviceError.
        """
        await self.commit()
        self._check_usable()
        await self._run(self._mirror.flush)

    def read(self, offset: int, length: int) -> bytes:
        """The newest content, staged changes included. May wait for the disk. Raises OutOfRange, DeviceError."""
        check_range(offset=offset, length=length, size=self._volume.size)
        buffer = bytearray(length)
        self._mirror.read_into(offset, memoryview(buffer))
        overlay((*self._closing, self._open), offset, buffer)
        return bytes(buffer)

    def staged(self) -> tuple[Stage, ...]:
        """What is not on the mirror yet, oldest first. May be called in any thread.

        A reader takes it first, reads the mirror, and then lays it over: what is applied meanwhile is shown twice, not
        missed. For the same reason the open stage is looked up before those that were open earlier.
        """
        newest = self._open
        return (*self._closing, newest)

    async def _commit(self) -> None:
        async with self._lock:
            self._check_usable()
            self._close_stage()
            while self._closing:
                await self._commit_stage(self._closing[0])

    def _close_stage(self) -> None:
        """Changes from now on go to a new stage."""
        if not self._open.changes:
            self._open.epoch = self._current
            return
        self._closing.append(self._open)
        self._closing_size += self._open.size
        self._open = Stage(epoch=self._current, mark=self._open.mark % MARK_MAX + 1)

    async def _commit_stage(self, stage: Stage) -> None:
        if await self._carry_out(stage) is not None:
            async with self._alone():
                if not self._closing or self._closing[0] is not stage:
                    return  # another commit has done it
                while (failure := await self._carry_out(stage)) is not None:
                    await self._make_room(failure)
        self._closing.popleft()
        self._closing_size -= stage.size
        for change in stage.changes:
            first = change.offset >> self._shift
            self._marks.clear(first, (change.offset + change.length - 1) >> self._shift, stage.mark)
        if self._is_over_cap:
            too_much = Failure(Trouble.CAP_REACHED, "the snapshots of the volume hold more than they may")
            async with self._alone():
                while self._is_over_cap and self._unprotected():
                    await self._make_room(too_much)

    async def _carry_out(self, stage: Stage) -> Failure | None:
        targets = self._volume.targets(before=stage.epoch)
        try:
            return await self._run(functools.partial(preserver.carry_out, self._volume, stage, targets))
        except DeviceError as error:
            self._failed = error
            self._refresh()
            raise

    def _refresh(self) -> None:
        """Take over what the hot path keeps at hand. Needed after every change of `live`, `current` or the size."""
        volume = self._volume
        self._births = volume.births.scalars
        self._mark_bytes = self._marks.scalars
        self._current = volume.current
        self._newest = _NOTHING_PASSES if self._failed else volume.live[-1] if volume.live else NO_GENERATION
        # A block born up to here is sure to be staged. After a deletion that is still to come here it may be too many.
        self._staged_to = volume.targets(before=volume.current).durable_to
