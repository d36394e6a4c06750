"""What can be asked about a volume and its snapshots, and the bookmarks that outlive them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from uuid import UUID

from stillpoint.errors import AlreadyExists, DeviceError, NotFound, SnapshotInvalid

from .catalog import Event
from .changed import changed_extents, unknown_extents
from .values import NO_GENERATION, Bookmark, ChangedExtents, Snapshot, SnapshotState, SnapshotStatistics, check_name
from .volume import Volume
from .write_stream import WriteStream


class SnapshotBook(WriteStream):
    """Answers come from memory, but for `changed`, which looks at every block: it works in a thread."""

    def __init__(self, volume: Volume, *, now_ns: Callable[[], int] = time.time_ns, **options: Any) -> None:
        super().__init__(volume, **options)
        self._now_ns = now_ns

    @property
    def name(self) -> str:
        return self._volume.name

    @property
    def incarnation(self) -> UUID:
        """Of the birth map: a bookmark of another one is no base for anything here."""
        return self._volume.incarnation

    @property
    def size(self) -> int:
        return self._volume.size

    @property
    def block_size(self) -> int:
        return self._volume.block_size

    def snapshots(self) -> list[Snapshot]:
        """All of them, oldest first, those being made and invalid ones too."""
        return [self._volume.snapshots[generation] for generation in sorted(self._volume.snapshots)]

    def get(self, name: str) -> Snapshot:
        """Raises NotFound."""
        return self._volume.by_name(name)

    def uses_store(self, store: UUID) -> bool:
        """Whether a live snapshot may have blocks in that store."""
        found = self._volume.stores.by_uuid(store)
        return found is not None and any(self._volume.may_use(generation, found) for generation in self._volume.live)

    async def bookmark(self, name: str, snapshot: str) -> Bookmark:
        """Remember the snapshot's instant under `name`, durably. Raises InvalidRequest, AlreadyExists, NotFound."""
        check_name(name, what="bookmark")
        volume = self._volume
        of = volume.by_name(snapshot)
        if name in volume.bookmarks:
            raise AlreadyExists(f"{volume.name}: there is a bookmark {name} already")
        mark = Bookmark(volume.name, name, of.generation, volume.incarnation, of.uuid, self._now_ns())
        volume.bookmarks[name] = mark
        try:
            await self._run(
                lambda: volume.catalog.append(
                    Event.BOOKMARK_ADDED,
                    name=name,
                    generation=mark.generation,
                    incarnation=str(mark.incarnation),
                    snapshot=str(mark.snapshot),
                    created_ns=mark.created_ns,
                )
            )
        except DeviceError:
            del volume.bookmarks[name]
            raise
        return mark

    async def delete_bookmark(self, name: str) -> None:
        """Raises NotFound, DeviceError."""
        if self._volume.bookmarks.pop(name, None) is None:
            raise NotFound(f"{self.name}: there is no bookmark {name}")
        await self._run(lambda: self._volume.catalog.append(Event.BOOKMARK_DELETED, name=name))

    def bookmarks(self) -> list[Bookmark]:
        return sorted(self._volume.bookmarks.values(), key=lambda mark: mark.generation)

    async def changed(self, snapshot: str, *, base: int, incarnation: UUID) -> ChangedExtents:
        """What was written between the instant `base` (a generation of that incarnation) and the snapshot.

        Whole blocks, in order; trims, zeroing and growth count. Raises NotFound, SnapshotInvalid.
        """
        volume = self._volume
        async with self._ending, self._lock:
            of = self._active(snapshot)
            if incarnation != volume.incarnation or base > of.generation:
                return unknown_extents(of.size)
            maps = [volume.maps[generation] for generation in volume.live if generation >= of.generation]
            return await self._run(
                lambda: changed_extents(
                    volume.births.array,
                    maps,
                    base=base,
                    block_size=volume.block_size,
                    block_count=of.size // volume.block_size,
                )
            )

    def statistics(self, snapshot: str) -> SnapshotStatistics:
        """At once, whatever it holds. While another snapshot is being deleted some of its blocks are not counted yet.

        Raises NotFound, SnapshotInvalid.
        """
        volume = self._volume
        of = self._active(snapshot)
        records = volume.maps[of.generation]
        stored = records.stored(born_after=NO_GENERATION).total()
        own = records.stored(born_after=volume.older_than(of.generation)).total()
        size = volume.block_size
        return SnapshotStatistics(of.name, records.count, own * size, (stored - own) * size)

    def reclaimable(self) -> dict[int, int]:
        """Bytes by number of store that deleting every snapshot that is not protected would give back, exactly."""
        volume = self._volume
        protected = [generation for generation in volume.live if volume.snapshots[generation].protected]
        freed: Counter[int] = Counter()
        for generation in volume.live:
            # The newest protected snapshot that sees a record of this map decides whether it has to stay.
            keeper = max((other for other in protected if other <= generation), default=NO_GENERATION)
            freed += volume.maps[generation].stored(born_after=keeper)
        return {store: count * volume.block_size for store, count in freed.items()}

    def _active(self, name: str) -> Snapshot:
        snapshot = self._volume.by_name(name)
        if snapshot.state is not SnapshotState.ACTIVE:
            reason = snapshot.invalid_reason or f"is {snapshot.state.name.lower()}"
            raise SnapshotInvalid(f"{self.name}@{name}: {reason}")
        return snapshot

    def describe(self) -> dict[str, Any]:
        """What `open_virtual_device` needs in another process; can be written as JSON."""
        return self._volume.describe()
