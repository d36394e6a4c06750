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

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

import numpy as np

from stillpoint.errors import DeviceError

from .association import ALL_ZEROES, STORE_SHIFT, Addresses
from .catalog import Event
from .values import NO_GENERATION, SnapshotState
from .volume import Volume, map_path

Run: TypeAlias = Callable[[Callable[[], None]], Awaitable[None]]

_PIECES_A_TURN: Final = 16  # of entries moved before the loop gets its turn: a few milliseconds


class Retirement:
    """Ends one snapshot. The caller holds the volume's commit lock, so no stage is being preserved meanwhile.

    run: calls a function that waits for disks in a worker thread.
    """

    def __init__(self, volume: Volume, generation: int, *, run: Run) -> None:
        self._volume = volume
        self._generation = generation
        self._run = run
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
        heir = volume.older_than(self._generation)
        records = volume.maps.get(self._generation)
        if records is None:
            return
        for index, (blocks, addresses, born) in enumerate(records.pieces()):
            moves = born.astype(np.int64) <= heir
            if heir != NO_GENERATION and moves.any():
                try:
                    volume.maps[heir].put_many(blocks[moves], addresses[moves], born[moves])
                except OSError:
                    self.victims = tuple(generation for generation in volume.live if generation <= heir)
                    moves[:] = True  # not to be freed before those are gone: left taken until the next start
            self._freed.append(addresses[~moves])
            if index % _PIECES_A_TURN == _PIECES_A_TURN - 1:
                await asyncio.sleep(0)

    async def _free(self) -> None:
        """The list without the snapshot is published, its end is durable: drop the map and free the slots."""
        volume = self._volume
        records = volume.maps.pop(self._generation, None)
        if records is None:
            return
        records.close()
        path = map_path(volume.maps_folder, self._generation)
        freed = np.concatenate(self._freed) if self._freed else np.empty(0, dtype="<u8")
        volume.count_preserved(freed, -1)
        by_store = _by_store(freed)

        def release() -> None:
            path.unlink(missing_ok=True)
            for store in volume.stores.opened():
                if store.number in by_store and not store.failed:
                    store.release(by_store[store.number], volume.block_size)

        await self._run(release)


def _by_store(addresses: Addresses) -> dict[int, Addresses]:
    stored = addresses[addresses > ALL_ZEROES]
    numbers = (stored >> np.uint64(STORE_SHIFT)).astype(np.int64)
    by_store: dict[int, Addresses] = defaultdict(lambda: np.empty(0, dtype="<u8"))
    for number in np.unique(numbers).tolist():
        by_store[number] = stored[numbers == number]
    return by_store
