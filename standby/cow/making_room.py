"""Ending snapshots when there is no room to preserve more, or no way to: the mirror goes on whatever it takes.

Invariants:
- Whoever changes `live`, or preserves a stage, holds `_lock`; only a cut, which takes no time, does not. Whoever ends a
  snapshot, or reads more than one map, holds `_ending` too, taken before `_lock`, and may let go of `_lock` for the
  long steps: so commits go on while a snapshot of a million blocks is deleted.
- The mirror never loses a change because of a snapshot: when preserving fails, snapshots go, oldest first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

from stillpoint.errors import DeviceError

from .limits import Limits
from .preservation import PreservationStore
from .preserver import Failure, Trouble
from .retiring import Retirement
from .values import Snapshot, SnapshotState
from .volume import Volume

logger = logging.getLogger(__name__)

T = TypeVar("T")


class RoomMaker:
    """The ladder of a full store from its second step on; on the first the store grows by itself."""

    def __init__(
        self,
        volume: Volume,
        *,
        executor: Executor | None,
        on_ended: Callable[[Snapshot], None] | None,
        limits: Limits,
    ) -> None:
        """As of WriteStream. limits: of a volume that has none of its own."""
        self._volume = volume
        self._executor = executor
        self._on_ended = on_ended
        self._default_limits = limits
        self._limits = limits.with_own(volume.own_limits)
        self._failed: DeviceError | None = None
        self._lock = asyncio.Lock()
        self._ending = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """For a commit, which holds `_lock`: nobody else ends snapshots within. Before that others may commit."""
        self._lock.release()
        try:
            await self._ending.acquire()
        finally:
            await self._lock.acquire()
        try:
            self._check_usable()
            yield
        finally:
            self._ending.release()

    @contextlib.asynccontextmanager
    async def _let_in(self) -> AsyncIterator[None]:
        """For who ends a snapshot and holds both locks: commits may go on within."""
        self._lock.release()
        try:
            yield
        finally:
            await self._lock.acquire()

    @property
    def _is_over_cap(self) -> bool:
        return 0 < self._limits.preserved_size_max < self._volume.preserved_size

    async def _make_room(self, failure: Failure) -> None:
        """End the snapshots that stand in the way."""
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
        """Those that may pay for a limit: not one that is still being made, as somebody waits for it."""
        volume = self._volume
        return [
            generation
            for generation in volume.live
            if not volume.snapshots[generation].protected
            and volume.snapshots[generation].state is not SnapshotState.CREATING
        ]

    async def _expire(self, generation: int) -> bool:
        """Delete a snapshot to make room. False: the catalog cannot be written."""
        volume = self._volume
        snapshot = volume.snapshots[generation]
        retirement = Retirement(volume, generation, run=self._run, refresh=self._refresh)
        try:
            await retirement.delete()
        except DeviceError:
            return False
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
        retirement = Retirement(self._volume, generation, run=self._run, refresh=self._refresh)
        recorded = await retirement.invalidate(reason)
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
            retirement = Retirement(self._volume, snapshot.generation, run=self._run, refresh=self._refresh)
            await retirement.invalidate("the snapshot catalog cannot be written")
            self._tell_ended(snapshot)
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
        raise NotImplementedError

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
