"""The snapshot engine of one volume: preserve once, then overwrite in place.

Each block carries the generation it was last written in (its birth); a snapshot is a generation. Whoever overwrites a
block that the newest live snapshot still sees first preserves it, once, whatever the number of snapshots. One event
loop owns an engine and calls it in the order of the volume's write stream (`write_stream.py`); here is what happens to
snapshots.

Invariants:
- A snapshot is answered (ACTIVE) only when everything before its instant is on the mirror and durable, the birth map
  is durable, and so is its record (R3): what it shares with the mirror must not change by a power loss.
- The instant is one step of the loop (`cut`), the rest may take its time (`finish`): writes after the cut are already
  preserved for the new snapshot.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from stillpoint.devices import BlockDevice
from stillpoint.document import boot_id
from stillpoint.errors import AlreadyExists, DeviceError, InvalidRequest, Refused, SnapshotInvalid

from . import recovery
from .birth import BirthMap
from .catalog import Event
from .counted_map import CountedMap
from .limited_book import LimitedBook
from .retiring import Retirement
from .stage import STAGES_MAX, Marks
from .store_directory import StoreDirectory
from .values import (
    BLOCK_SIZE_DEFAULT,
    GENERATION_MAX,
    SNAPSHOTS_MAX,
    Snapshot,
    SnapshotState,
    check_name,
)
from .volume import BIRTH_FILE, CATALOG_FILE, HEADER_FILE, Volume, map_path


@dataclass(frozen=True, slots=True)
class PendingSnapshot:
    """A snapshot whose instant is taken and that is not durable yet: hand it to `finish`, or to `abandon`."""

    snapshot: Snapshot


class SnapshotEngine(LimitedBook):
    """One volume's mirror with its snapshots. Made by `create` or `open`, ended by `close`."""

    def __init__(self, volume: Volume, *, now_ns: Callable[[], int] = time.time_ns, **options: Any) -> None:
        """Not for callers: use `create` or `open`.

        now_ns: wall clock, for the times people see. options: of WriteStream.
        """
        super().__init__(volume, now_ns=now_ns, **options)
        self._closed = False
        volume.stores.users.append(self)

    @classmethod
    def create(
        cls,
        folder: Path,
        name: str,
        mirror: BlockDevice,
        stores: StoreDirectory,
        *,
        size: int | None = None,
        block_size: int = BLOCK_SIZE_DEFAULT,
        mirror_paths: Sequence[Path | str] = (),
        boot: Callable[[], str] = boot_id,
        **options: Any,
    ) -> SnapshotEngine:
        """Make the state of a new volume in `folder` and open it. Waits for the disk.

        size: bytes of the volume, a multiple of block_size; None: all of the mirror.
        mirror_paths: how a reader in another process opens the mirror.
        options: of the constructor. Raises InvalidRequest, AlreadyExists, DeviceError.
        """
        check_name(name, what="volume")
        recovery.create_state(folder, name, mirror, size=mirror.size if size is None else size, block_size=block_size)
        return cls.open(folder, mirror, stores, mirror_paths=mirror_paths, boot=boot, **options)

    @classmethod
    def open(
        cls,
        folder: Path,
        mirror: BlockDevice,
        stores: StoreDirectory,
        *,
        mirror_paths: Sequence[Path | str] = (),
        boot: Callable[[], str] = boot_id,
        **options: Any,
    ) -> SnapshotEngine:
        """Open what `create` made, recovering from whatever stopped the last run (`recovery.py`). Waits for the disk.

        Raises NotFound, DataCorrupt, InvalidRequest (mirror too small), DeviceError.
        """
        paths = [str(path) for path in mirror_paths]
        volume = recovery.open_volume(folder, mirror, stores, mirror_paths=paths, boot=boot())
        return cls(volume, **options)

    def cut(self, name: str, store: str | None = None) -> PendingSnapshot:
        """Take the instant: every change given before this call belongs to the snapshot, none after it does.

        Costs the same whatever the volume's size. Raises InvalidRequest, AlreadyExists, NotFound (store), Refused.
        """
        volume = self._volume
        self._check_usable()
        check_name(name, what="snapshot")
        if any(snapshot.name == name for snapshot in volume.snapshots.values()):
            raise AlreadyExists(f"{volume.name}@{name}: exists already")
        if len(volume.snapshots) >= SNAPSHOTS_MAX:
            raise Refused(f"{volume.name}@{name}: the volume has {SNAPSHOTS_MAX} snapshots, the most there can be")
        if self._limits.count_max and len(volume.snapshots) >= self._limits.count_max and not self._surplus(1):
            raise Refused(
                f"{volume.name}@{name}: the volume has {len(volume.snapshots)} snapshots and may have"
                f" {self._limits.count_max}; delete one first"
            )
        if len(self._closing) >= STAGES_MAX or volume.current >= GENERATION_MAX:
            raise Refused(f"{volume.name}@{name}: too many snapshots at once; try again")
        home = volume.stores.get(store)
        generation = volume.current
        path = map_path(volume.maps_folder, generation)
        try:
            form = volume.stores.map_form(home.uuid)
            records = CountedMap.create(form, path, generation=generation, block_count=volume.block_count)
        except OSError as error:
            raise DeviceError(f"{path}: no space for the snapshot's map: {error.strerror}", error.errno or 5) from error
        snapshot = Snapshot(
            volume=volume.name,
            name=name,
            uuid=uuid4(),
            generation=generation,
            state=SnapshotState.CREATING,
            created_ns=self._now_ns(),
            size=volume.size,
            store=home.name,
        )
        volume.snapshots[generation] = snapshot
        volume.maps[generation] = records
        volume.live = (*volume.live, generation)
        volume.store_newest[home.name] = generation
        volume.current += 1
        self._refresh()
        self._close_stage()
        volume.publish()
        return PendingSnapshot(snapshot)

    async def finish(self, pending: PendingSnapshot) -> Snapshot:
        """Make the snapshot durable and active. Raises DeviceError, SnapshotInvalid; it is gone then."""
        return await self._uninterrupted(self._finish(pending))

    async def _finish(self, pending: PendingSnapshot) -> Snapshot:
        generation = pending.snapshot.generation
        appended = False
        try:
            await self.flush()
            await self._run(self._volume.births.synchronize)
            async with self._lock:
                snapshot = self._volume.snapshots[generation]
                if snapshot.state is not SnapshotState.CREATING:
                    raise SnapshotInvalid(f"{snapshot.volume}@{snapshot.name}: {snapshot.invalid_reason}")
                appended = True
                await self._run(lambda: self._append_created(snapshot))
                snapshot = self._volume.set_state(generation, SnapshotState.ACTIVE)
                self._volume.publish()
                return snapshot
        except BaseException:
            await self._drop_pending(generation, free=not appended)
            raise

    async def abandon(self, pending: PendingSnapshot) -> None:
        """Give up a snapshot that was cut and not finished."""
        await self._uninterrupted(self._drop_pending(pending.snapshot.generation, free=True))

    async def _drop_pending(self, generation: int, *, free: bool) -> None:
        async with self._ending, self._lock:
            snapshot = self._volume.snapshots.get(generation)
            if snapshot is None:
                return
            if snapshot.state is SnapshotState.INVALID:
                del self._volume.snapshots[generation]
                self._volume.publish()
                return
            await Retirement(self._volume, generation, run=self._run, refresh=self._refresh).abandon(free=free)

    def _append_created(self, snapshot: Snapshot) -> None:
        home = self._volume.stores.get(snapshot.store)
        self._volume.catalog.append(
            Event.SNAPSHOT_CREATED,
            generation=snapshot.generation,
            name=snapshot.name,
            uuid=str(snapshot.uuid),
            store=str(home.uuid),
            durable=home.durable,
            created_ns=snapshot.created_ns,
            size=snapshot.size,
        )

    async def delete(self, name: str) -> None:
        """Delete the snapshot, durably, and free what only it needed. Raises NotFound, Refused, DeviceError."""
        await self._uninterrupted(self._delete(name))

    async def _delete(self, name: str) -> None:
        volume = self._volume
        async with self._ending, self._lock:
            snapshot = volume.by_name(name)
            if snapshot.state is SnapshotState.CREATING:
                raise Refused(f"{volume.name}@{name}: is still being created")
            if snapshot.protected:
                raise Refused(f"{volume.name}@{name}: is protected; unprotect it first")
            retirement = Retirement(
                volume, snapshot.generation, run=self._run, refresh=self._refresh, let_in=self._let_in
            )
            await retirement.delete()
            for victim in retirement.victims:
                await self._invalidate(victim, "no space for the association map")

    async def protect(self, name: str, protected: bool) -> Snapshot:
        """Keep the snapshot from being deleted by request (a full store still takes it), or no longer. Durable."""
        async with self._lock:
            generation = self._volume.by_name(name).generation
            await self._run(
                lambda: self._volume.catalog.append(
                    Event.SNAPSHOT_PROTECTED, generation=generation, protected=protected
                )
            )
            snapshot = replace(self._volume.snapshots[generation], protected=protected)
            self._volume.snapshots[generation] = snapshot
            return snapshot

    async def resize(self, size: int) -> None:
        """Grow the volume; the new bytes read as zeroes and count as written now. The mirror grows with it if it must.

        Durable on return. Raises InvalidRequest, Refused, DeviceError.
        """
        await self._uninterrupted(self._resize(size))

    async def _resize(self, size: int) -> None:
        volume = self._volume
        await self.commit()
        async with self._lock:
            if size % volume.block_size or size < volume.size:
                raise InvalidRequest(
                    f"volume {self.name}: cannot go from {volume.size} to {size} bytes; it grows by multiples of"
                    f" {volume.block_size}"
                )
            if size == volume.size:
                return
            old_count = volume.block_count

            def grow() -> BirthMap:
                if volume.mirror.size < size:
                    volume.mirror.resize(size)
                births = BirthMap.extend(
                    volume.folder / BIRTH_FILE,
                    old_count=old_count,
                    new_count=size // volume.block_size,
                    generation=volume.current,
                )
                volume.catalog.append(Event.RESIZED, size=size)
                return births

            try:
                births = await self._run(grow)
            except OSError as error:
                raise DeviceError(
                    f"volume {self.name}: no room for a larger birth map: {error.strerror}", error.errno or 5
                ) from error
            # A cut may have come meanwhile: what it made is in `current`, and births beyond the old size follow it.
            births.array[old_count:] = volume.current
            marks = Marks(size // volume.block_size)
            marks.copy_from(self._marks)
            self._marks = marks
            volume.births = births
            volume.size = size
            volume.header.set_size(size)
            self._refresh()

    async def close(self, *, clean: bool = True) -> None:
        """Stop using the volume; the mirror and the stores stay open. A second call does nothing.

        clean: flush everything and say so in the catalog, so that the next open has nothing to doubt. Raises
        DeviceError when that fails; the volume is closed all the same.
        """
        if self._closed:
            return
        self._closed = True
        volume = self._volume
        try:
            if clean:
                await self.flush()
                async with self._ending, self._lock:
                    await self._run(volume.births.synchronize)
                    await self._run(lambda: volume.catalog.append(Event.CLOSED))
            else:
                await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            volume.stores.users.remove(self)
            volume.header.mark_closed()
            volume.close()

    async def destroy(self) -> None:
        """Delete every snapshot and the volume's state. The mirror's bytes stay. Raises Refused, DeviceError."""
        for snapshot in self.snapshots():
            await self.delete(snapshot.name)
        volume = self._volume
        for store in volume.stores.opened():
            await self._run(lambda store=store: store.forget(volume.incarnation))  # type: ignore[misc]
        await self.close()
        for path in (volume.folder / CATALOG_FILE, volume.folder / BIRTH_FILE, volume.folder / HEADER_FILE):
            path.unlink(missing_ok=True)
        volume.maps_folder.rmdir()
        volume.folder.rmdir()


async def create_snapshots(engines: Sequence[SnapshotEngine], name: str, store: str | None = None) -> list[Snapshot]:
    """One instant for several volumes: all of them get the snapshot, or none. Raises what `cut` and `finish` raise."""
    pending: list[tuple[SnapshotEngine, PendingSnapshot]] = []
    try:
        # Nothing else runs between these cuts: no await.
        for engine in engines:
            pending.append((engine, engine.cut(name, store)))  # noqa: PERF401 - those already cut must be known
    except BaseException:
        for engine, one in pending:
            await engine.abandon(one)
        raise
    results = await asyncio.gather(*(engine.finish(one) for engine, one in pending), return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    if failures:
        for (engine, _), result in zip(pending, results, strict=True):
            if isinstance(result, Snapshot):
                await engine.delete(result.name)
        raise failures[0]
    for engine in engines:
        await engine.expire_surplus()
    return [result for result in results if isinstance(result, Snapshot)]
