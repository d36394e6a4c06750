"""The write half of the engine: changes go to the mirror, preserving first what a live snapshot still sees.

Invariants:
- For every block: pre-image and record durable, map entry, birth, overwrite in place, in this order (`preserver.py`).
- A change whose blocks need no preserving goes straight to the mirror. One that must preserve durably first is staged
  in bounded memory, with every later change that overlaps it, until `commit`; nothing overtakes a staged change.
- The mirror never loses a change because of a snapshot: when preserving fails, snapshots go, oldest first.
- Whoever changes `live`, or preserves a stage, holds the lock; only a cut, which takes no time, does not.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor
from typing import Any, Final, TypeVar

import numpy as np

from stillpoint.errors import DeviceError, StoreFull
from stillpoint.extents import check_range

from . import preserver
from .limits import Limits
from .preservation import PreImages, PreservationStore
from .preserver import Failure, Trouble
from .retiring import Retirement
from .stage import MARK_MAX, Change, Marks, Stage, overlay
from .values import NO_GENERATION, Snapshot, SnapshotState
from .volume import Volume

logger = logging.getLogger(__name__)

STAGE_SIZE_MAX: Final = 16 << 20
_COMMIT_SHARE: Final = 16  # of the bound: a MiB of changes of 4 KiB is 16 MiB of blocks to preserve for one flush
_NOTHING_PASSES: Final = 1 << 40  # as newest snapshot: newer than any birth, so every write takes the careful way
_AT_ONCE_MAX: Final = 4 << 20  # bytes preserved in one turn of the loop; more is staged and done in a thread

T = TypeVar("T")


class WriteStream:
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
        self._volume = volume
        self._executor = executor
        self._stage_size_max = stage_size_max
        self._on_staged = on_staged
        self._on_ended = on_ended
        self._default_limits = Limits(expires, count_max, preserved_size_max)
        self._limits = self._default_limits.with_own(volume.own_limits)
        self._failed: DeviceError | None = None
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
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
        if len(blocks) * volume.block_size > _AT_ONCE_MAX:
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
            for stage in tuple(self._closing):
                await self._commit_stage(stage)

    def _close_stage(self) -> None:
        """Changes from now on go to a new stage."""
        if not self._open.changes:
            self._open.epoch = self._current
            return
        self._closing.append(self._open)
        self._closing_size += self._open.size
        self._open = Stage(epoch=self._current, mark=self._open.mark % MARK_MAX + 1)

    async def _commit_stage(self, stage: Stage) -> None:
        volume = self._volume
        while True:
            targets = volume.targets(before=stage.epoch)
            try:
                failure = await self._run(functools.partial(preserver.carry_out, volume, stage, targets))
            except DeviceError as error:
                self._failed = error
                self._refresh()
                raise
            if failure is None:
                break
            await self._make_room(failure)
        self._closing.popleft()
        self._closing_size -= stage.size
        for change in stage.changes:
            first = change.offset >> self._shift
            self._marks.clear(first, (change.offset + change.length - 1) >> self._shift, stage.mark)
        while self._is_over_cap and self._unprotected():
            await self._make_room(Failure(Trouble.CAP_REACHED, "the snapshots of the volume hold more than they may"))

    @property
    def _is_over_cap(self) -> bool:
        return 0 < self._limits.preserved_size_max < self._volume.preserved_size

    async def _make_room(self, failure: Failure) -> None:
        """End the snapshots that stand in the way. The mirror goes on whatever it takes.

        This is the ladder of a full store from the second step on; on the first, the store grows by itself.
        """
        if self._limits.expires and failure.trouble in (Trouble.STORE_FULL, Trouble.CAP_REACHED):
            for generation in self._using(failure.store):
                snapshot = self._volume.snapshots[generation]
                if snapshot.state is SnapshotState.ACTIVE and not snapshot.protected:
                    if await self._expire(generation):
                        return
                    break
        for generation in self._victims(failure):
            await self._invalidate(generation, failure.reason)

    def _victims(self, failure: Failure) -> Sequence[int]:
        live = self._volume.live
        store = failure.store
        if failure.trouble is Trouble.CAP_REACHED:
            return self._unprotected()[:1]  # there is room; only a number says that there is not
        if failure.trouble is Trouble.MAP_FULL:
            return live[:1]
        if store is None or failure.trouble is Trouble.MIRROR_UNREADABLE:
            return live
        using = self._using(store)
        if failure.trouble is Trouble.STORE_FAILED:
            return using
        return using[:1] or live[:1]

    def _using(self, store: PreservationStore | None) -> Sequence[int]:
        """Live snapshots that may have blocks in the store, oldest first; None: in any."""
        volume = self._volume
        return [generation for generation in volume.live if store is None or volume.may_use(generation, store)]

    def _unprotected(self) -> Sequence[int]:
        volume = self._volume
        return [generation for generation in volume.live if not volume.snapshots[generation].protected]

    async def _expire(self, generation: int) -> bool:
        """Delete a snapshot to make room. False: the catalog cannot be written."""
        volume = self._volume
        snapshot = volume.snapshots[generation]
        retirement = Retirement(volume, generation, run=self._run)
        try:
            await retirement.delete()
        except DeviceError:
            return False
        finally:
            self._refresh()
        logger.warning("snapshot expired to make room", extra={"volume": volume.name, "snapshot": snapshot.name})
        self._tell_ended(snapshot)
        for victim in retirement.victims:
            await self._invalidate(victim, "no space for the association map")
        return True

    async def _invalidate(self, generation: int, reason: str) -> None:
        if generation not in self._volume.live:
            return
        snapshot = self._volume.snapshots[generation]
        fields = {"volume": self._volume.name, "snapshot": snapshot.name}
        logger.warning("snapshot is lost: %s", reason, extra=fields)
        retirement = Retirement(self._volume, generation, run=self._run)
        recorded = await retirement.invalidate(reason)
        self._refresh()
        self._tell_ended(snapshot)
        for victim in retirement.victims:
            await self._invalidate(victim, "no space for the association map")
        if not recorded:
            await self._disown_snapshots()

    async def _disown_snapshots(self) -> None:
        """The catalog cannot say that snapshots ended, so let the birth map say it.

        With every block born now and no records for that, the next start finds no snapshot proven. That must be
        durable before anything is overwritten, else the mirror must stop.
        """
        while self._volume.live:
            snapshot = self._volume.snapshots[self._volume.live[0]]
            retirement = Retirement(self._volume, snapshot.generation, run=self._run)
            await retirement.invalidate("the snapshot catalog cannot be written")
            self._tell_ended(snapshot)
        self._refresh()
        self._volume.births.array[:] = self._volume.current
        try:
            await self._run(self._volume.births.synchronize)
        except DeviceError as error:
            self._failed = error
            self._refresh()
            raise

    def _tell_ended(self, snapshot: Snapshot) -> None:
        if self._on_ended is not None:
            self._on_ended(snapshot)

    def _refresh(self) -> None:
        """Take over what the hot path keeps at hand. Needed after every change of `live`, `current` or the size."""
        volume = self._volume
        self._births = volume.births.scalars
        self._mark_bytes = self._marks.scalars
        self._current = volume.current
        self._newest = _NOTHING_PASSES if self._failed else volume.live[-1] if volume.live else NO_GENERATION
        # A block born up to here is sure to be staged. After a deletion that is still to come here it may be too many.
        self._staged_to = volume.targets(before=volume.current).durable_to

    def _check_usable(self) -> None:
        if self._failed is not None:
            raise DeviceError(f"volume {self._volume.name}: its mirror failed: {self._failed}", self._failed.errno)

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    async def _uninterrupted(self, work: Coroutine[Any, Any, T]) -> T:
        """Do the work to its end even if the caller is cancelled: a thread may be in the middle of it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, as its caller may be gone; a failed mirror is remembered in `_failed`
