"""The end of a snapshot, by deletion or because it lost blocks: its records move to the next older live snapshot.

A record born at or before the next older live snapshot is visible to that one too, so only its entry moves; all others
are needed by nobody, and their slots are freed. No data is copied.

The order, and what a crash or a reader in between sees:

    1. the state becomes LEAVING: readers of this snapshot stop, readers of older ones go on asking its map
    2. the end is durable in the catalog: from here on a restart derives the same result from the store's log
    3. the snapshot leaves `live`; its entries move, piece by piece; an entry is in the new map before the old map goes
    4. the shared list is published without its map; only now may a slot be given to somebody else (R4)
    5. the slots are freed
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, TypeAlias

import numpy as np

from stillpoint.errors import DeviceError

from .association import ALL_ZEROES, STORE_SHIFT, Addresses, AssociationMap
from .catalog import Event
from .values import NO_GENERATION, SnapshotState
from .volume import Volume, map_path

Run: TypeAlias = Callable[[Callable[[], Any]], Awaitable[Any]]
LetIn: TypeAlias = Callable[[], AbstractAsyncContextManager[None]]


class Retirement:
    """Ends one snapshot. The caller holds the volume's locks, so no other snapshot ends meanwhile.

    run: calls a function that waits for disks in a worker thread.
    refresh: called whenever `live` has changed.
    let_in: a context for the long steps, in which stages may be preserved: they have nothing to do with the snapshot
    any more once it has left `live`. No stage is being preserved when it begins.
    """

    def __init__(
        self, volume: Volume, generation: int, *, run: Run, refresh: Callable[[], None], let_in: LetIn = nullcontext
    ) -> None:
        self._volume = volume
        self._generation = generation
        self._run = run
        self._refresh = refresh
        self._let_in = let_in
        self._freed: list[Addresses] = []
        self.victims: tuple[int, ...] = ()  # older snapshots that could not take over their entries: they must go too

    async def delete(self) -> None:
        """Raises DeviceError when the catalog cannot be written; the snapshot is then as before."""
        volume, generation = self._volume, self._generation
        before = volume.snapshots[generation]
        self._leave("")
        try:
            await self._run(lambda: volume.catalog.append(Event.SNAPSHOT_DELETED, generation=generation))
        except DeviceError:
            volume.snapshots[generation] = before
            volume.publish()
            raise
        await self._dissolve()
        del volume.snapshots[generation]
        volume.publish()
        await self._free()

    async def invalidate(self, reason: str) -> bool:
        """Keep the name, with the reason. False: the catalog cannot be written, so this is not durable.

        No slot is freed then.
        """
        volume, generation = self._volume, self._generation
        recorded = volume.snapshots[generation].state is not SnapshotState.CREATING
        self._leave(reason)
        durable = True
        if recorded:
            try:
                await self._run(
                    lambda: volume.catalog.append(Event.SNAPSHOT_INVALID, generation=generation, reason=reason)
                )
            except DeviceError:
                durable = False
        await self._dissolve()
        volume.set_state(generation, SnapshotState.INVALID, reason=reason)
        volume.publish()
        if durable:
            await self._free()
        return durable

    async def abandon(self, *, free: bool) -> None:
        """A snapshot that was cut and never became durable: nobody was told of it.

        free: False when the catalog may hold it after all; its slots then stay taken until the next start.
        """
        self._leave("")
        await self._dissolve()
        del self._volume.snapshots[self._generation]
        self._volume.publish()
        if free:
            await self._free()

    def _leave(self, reason: str) -> None:
        self._volume.set_state(self._generation, SnapshotState.LEAVING, reason=reason)
        self._volume.publish()

    async def _dissolve(self) -> None:
        volume = self._volume
        volume.live = tuple(generation for generation in volume.live if generation != self._generation)
        self._refresh()
        heir = volume.older_than(self._generation)
        records = volume.maps.get(self._generation)
        if records is None:
            return
        async with self._let_in():
            had_room = await self._run(lambda: self._move(records, heir))
        if not had_room:
            self.victims = tuple(generation for generation in volume.live if generation <= heir)

    def _move(self, records: AssociationMap, heir: int) -> bool:
        """Whether the heir's map had room for all that it sees."""
        volume = self._volume
        had_room = True
        for blocks, addresses, born in records.pieces():
            moves = born.astype(np.int64) <= heir
            if heir != NO_GENERATION and moves.any():
                try:
                    volume.maps[heir].put_many(blocks[moves], addresses[moves], born[moves])
                except OSError:
                    had_room = False
                    moves[:] = True  # not to be freed before those are gone: left taken until the next start
            self._freed.append(addresses[~moves])
        return had_room

    async def _free(self) -> None:
        """The list without the snapshot is published, its end is durable: drop the map and free the slots."""
        volume = self._volume
        records = volume.maps.pop(self._generation, None)
        if records is None:
            return
        path = map_path(volume.maps_folder, self._generation)

        def release() -> None:
            records.close()
            path.unlink(missing_ok=True)
            freed = np.concatenate(self._freed) if self._freed else np.empty(0, dtype="<u8")
            volume.count_preserved(freed, -1)
            by_store = _by_store(freed)
            for store in volume.stores.opened():
                if store.number in by_store and not store.failed:
                    store.release(by_store[store.number], volume.block_size)

        async with self._let_in():
            await self._run(release)


def _by_store(addresses: Addresses) -> dict[int, Addresses]:
    stored = addresses[addresses > ALL_ZEROES]
    numbers = (stored >> np.uint64(STORE_SHIFT)).astype(np.int64)
    by_store: dict[int, Addresses] = defaultdict(lambda: np.empty(0, dtype="<u8"))
    for number in np.unique(numbers).tolist():
        by_store[number] = stored[numbers == number]
    return by_store
