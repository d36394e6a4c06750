"""The standby as a whole: its mirrors and their snapshots, the data link's listener, the export process."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from stillpoint.config import check_name, format_size, is_uuid
from stillpoint.devices import BlockDevice, open_device
from stillpoint.errors import AlreadyExists, InvalidRequest, NotFound, Refused, StillpointError
from stillpoint.link.tcp import DataLinkListener
from stillpoint.link.tokens import Tokens
from stillpoint.nbd.listen import listen_tcp
from stillpoint.replica.replicas import Replica, Replicas
from stillpoint.tls import Credentials

from .config import StandbyConfig
from .cow import Snapshot, SnapshotEngine, StoreDirectory, create_snapshots
from .cow.association_forms import FORM_DEFAULT
from .endings import Endings
from .export_supervisor import ExportSupervisor
from .live_device import LiveDevice
from .mirror import Mirror
from .record import MirrorRecord

logger = logging.getLogger(__name__)

_THREADS = 8
# A client that closed its connection a moment ago may still count as a reader.
_ENDING_READER_S = 1.0
_READER_POLL_S = 0.1
_READERS_NAMED = 4


class ServedVolumes(Protocol):
    """What the node's other role keeps of the volumes that it serves, or served before their copies became mirrors."""

    def dirty_bytes(self, volume: str) -> int:
        """What the copy may have that the node which is primary now lacks."""
        ...

    def forget_dirty(self, volume: str) -> None:
        """The primary knows of it, durably."""
        ...

    def forget_volume(self, volume: str) -> None:
        """The mirror is deleted."""
        ...


class _NothingServed:
    def dirty_bytes(self, volume: str) -> int:
        return 0

    def forget_dirty(self, volume: str) -> None: ...

    def forget_volume(self, volume: str) -> None: ...


class StandbyNode:
    """Opened by `start`; every method runs on the loop."""

    def __init__(
        self,
        config: StandbyConfig,
        replicas: Replicas,
        credentials: Credentials | None = None,
        *,
        exports_at_once: bool = True,
    ) -> None:
        """exports_at_once: start the export process with the node, not with its first mirror."""
        self.config = config
        self.replicas = replicas
        self.served: ServedVolumes = _NothingServed()
        self._exports_at_once = exports_at_once
        self.mirrors: dict[str, Mirror] = {}
        self.tokens = Tokens()
        self.executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="disk")
        self.stores = StoreDirectory(config.state_dir / "stores", default_size=config.snapshots.default_store_size)
        self.export = ExportSupervisor(config, self._describe)
        self._credentials = credentials
        self._listener: DataLinkListener | None = None
        self._starting: asyncio.Task[None] | None = None
        self._endings = Endings(self._follow_endings)

    @property
    def _folder(self) -> Path:
        return self.config.state_dir / "mirrors"

    @property
    def data_link_port(self) -> int:
        assert self._listener is not None
        return self._listener.port

    async def start(self) -> None:
        """Open every mirror, then take data links and export. Raises what a mirror that cannot be opened raises."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for folder in sorted(self._folder.iterdir()):
            if not (folder / "mirror.json").exists():
                logger.warning("removing what is left of a mirror that was never finished", extra={"folder": folder})
                shutil.rmtree(folder)
                continue
            record = MirrorRecord.load(folder)
            self.mirrors[record.volume] = self._open(record, self.replicas.get(record.volume))
            logger.info("mirror open", extra={"volume": record.volume, "size": record.size})
        address = self.config.listen.data_link
        self._listener = DataLinkListener(listen_tcp(address.host, address.port), self.tokens, self._credentials)
        if self.mirrors or self._exports_at_once:
            await self.export.start()

    def _open(self, record: MirrorRecord, replica: Replica) -> Mirror:
        return Mirror(
            record,
            replica,
            self._open_engine,
            self.executor,
            publish=self._publish,
            forget_dirty=lambda volume: self.served.forget_dirty(volume),
        )

    def _open_engine(self, record: MirrorRecord, device: BlockDevice) -> SnapshotEngine:
        folder = record.folder / "snapshots"
        options: dict[str, Any] = {
            "mirror_paths": record.device_paths,
            "executor": self.executor,
            "stage_size_max": self.config.snapshots.stage_bytes,
            "expires": self.config.snapshots.expire,
            "count_max": self.config.snapshots.count_max,
            "preserved_size_max": self.config.snapshots.preserved_size_max,
            "on_ended": self._endings.add,
        }
        if folder.exists():
            return SnapshotEngine.open(folder, device, self.stores, **options)
        return SnapshotEngine.create(
            folder, record.volume, device, self.stores, size=record.size, block_size=record.block_size, **options
        )

    async def stop(self) -> None:
        if self._listener is not None:
            self._listener.close()
        if self._starting is not None:
            await asyncio.wait([self._starting])
        await self.export.stop()
        for mirror in self.mirrors.values():
            try:
                await mirror.close()
            except StillpointError as error:
                logger.error("mirror not closed cleanly: %s", error, extra={"volume": mirror.record.volume})
        await self._endings.settle()
        self.stores.close()
        self.executor.shutdown()

    def mirror(self, volume: str) -> Mirror:
        found = self.mirrors.get(volume)
        if found is None:
            raise NotFound(f"there is no volume {volume!r} on the standby")
        return found

    def _describe(self) -> dict[str, dict[str, Any]]:
        return {name: mirror.describe() for name, mirror in self.mirrors.items()}

    async def _publish(self, volume: str) -> None:
        mirror = self.mirrors.get(volume)
        await self.export.publish(volume, mirror.describe() if mirror is not None else None)

    async def _follow_endings(self, volume: str, ended: Sequence[Snapshot]) -> None:
        """An invalid snapshot keeps its overlay: what was written there is the user's until it is deleted."""
        mirror = self.mirrors.get(volume)
        if mirror is None:
            return
        left = {snapshot.uuid for snapshot in mirror.engine.snapshots()}
        for snapshot in ended:
            if snapshot.uuid not in left:
                await asyncio.get_running_loop().run_in_executor(self.executor, mirror.overlays.delete, snapshot)
        await self._publish(volume)

    # --- mirrors

    async def create_mirror(
        self, volume: str, *, volume_uuid: str, size: int, block_size: int, device_paths: list[str]
    ) -> Mirror:
        """Durable on return. A mirror that never took a session gives way to a new volume of its name."""
        check_name(volume, "volume")
        if size <= 0 or block_size <= 0 or size % block_size:
            raise InvalidRequest(f"volume {volume!r}: size {size} and block size {block_size} do not fit")
        existing = self.mirrors.get(volume)
        if existing is not None:
            if existing.record.volume_uuid == volume_uuid:
                return existing
            if existing.replica.state.current is not None:
                raise AlreadyExists(
                    f"the standby holds a mirror of another volume named {volume!r}; delete that volume first"
                )
            await self._remove(existing)
        if not is_uuid(volume_uuid):
            raise InvalidRequest(f"volume {volume!r}: {volume_uuid[:80]!r} is no uuid")
        if self.replicas.find(volume) is not None:
            raise AlreadyExists(f"this node serves a volume named {volume!r} itself")
        folder = self._folder / volume
        folder.mkdir()
        try:
            paths = self._prepare_device(volume, folder, size=size, device_paths=device_paths)
            # A device that was named may hold anything.
            replica = self.replicas.create_standby(volume, volume_uuid, size=size, blank=not device_paths)
            mirror = self._make(folder, replica, block_size=block_size, device_paths=paths)
        except BaseException:
            self.replicas.delete(volume)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        await self._start_exporting(volume)
        logger.info("mirror created", extra={"volume": volume, "size": size})
        return mirror

    async def take_over(self, replica: Replica, *, block_size: int, device_paths: list[str]) -> Mirror:
        """Make a mirror of a copy that served clients until now, with its content. Durable on return."""
        volume = replica.volume
        existing = self.mirrors.get(volume)
        if existing is not None:
            return existing
        folder = self._folder / volume
        folder.mkdir(exist_ok=True)
        mirror = self._make(folder, replica, block_size=block_size, device_paths=device_paths)
        # Not waited for: it has nothing to export yet, and a volume may be waiting to be served by the other node.
        self._starting = asyncio.get_running_loop().create_task(self._start_exporting(volume))
        self._starting.add_done_callback(_started)
        return mirror

    def _make(self, folder: Path, replica: Replica, *, block_size: int, device_paths: list[str]) -> Mirror:
        record = MirrorRecord(
            folder=folder,
            volume=replica.volume,
            volume_uuid=str(replica.state.volume),
            size=replica.state.size,
            block_size=block_size,
            device_paths=device_paths,
            created_ns=time.time_ns(),
        )
        mirror = self._open(record, replica)
        record.save()
        self.mirrors[replica.volume] = mirror
        return mirror

    async def _start_exporting(self, volume: str) -> None:
        if not self.export.is_started:
            await self.export.start()
        await self._publish(volume)

    def _prepare_device(self, volume: str, folder: Path, *, size: int, device_paths: list[str]) -> list[str]:
        if not device_paths:
            open_device([folder / "disk.img"], size=size, create=True).close()
            return [str(folder / "disk.img")]
        paths = [os.path.abspath(path) for path in device_paths]
        missing = next((path for path in paths if not os.path.exists(path)), None)
        if missing is not None:
            raise InvalidRequest(f"volume {volume!r}: the mirror device {missing} does not exist on the standby")
        real = {os.path.realpath(path) for path in paths}
        for other in self.mirrors.values():
            shared = real & {os.path.realpath(path) for path in other.record.device_paths}
            if shared:
                raise Refused(f"volume {volume!r}: {shared.pop()} belongs to the mirror of {other.record.volume!r}")
        device = open_device([Path(path) for path in paths])
        available = device.size
        device.close()
        if available < size:
            raise InvalidRequest(
                f"volume {volume!r}: the mirror devices hold {format_size(available)}, "
                f"too small for {format_size(size)}"
            )
        return paths

    async def resize_mirror(self, volume: str, *, volume_uuid: str, size: int) -> Mirror:
        """Grow a mirror, with its snapshots alive. Durable on return; a size it has already does no harm."""
        mirror = self.mirror(volume)
        if mirror.record.volume_uuid != volume_uuid:
            raise Refused(f"the standby's mirror of {volume!r} belongs to another volume of that name")
        await mirror.grow(size)
        await self._publish(volume)
        logger.info("mirror grown", extra={"volume": volume, "size": size})
        return mirror

    async def delete_mirror(self, volume: str, *, volume_uuid: str, force: bool) -> None:
        mirror = self.mirror(volume)
        if mirror.record.volume_uuid != volume_uuid:
            raise Refused(f"the standby's mirror of {volume!r} belongs to another volume of that name")
        if mirror.replica.is_primary:
            raise Refused(f"node {self.replicas.name} serves volume {volume!r} itself")
        await self._delete(mirror, force=force)

    def live_device(self, volume: str) -> LiveDevice | None:
        """The copy as the volume that clients write to; None: this node has no mirror of it."""
        mirror = self.mirrors.get(volume)
        return mirror.live_device() if mirror is not None else None

    def snapshot_count(self, volume: str) -> int:
        mirror = self.mirrors.get(volume)
        return len(mirror.engine.snapshots()) if mirror is not None else 0

    async def delete_served(self, volume: str) -> None:
        """The mirror of a volume that this node serves, after the last write to it. Does nothing when there is none."""
        mirror = self.mirrors.get(volume)
        if mirror is not None:
            await self._delete(mirror, force=True)

    async def _delete(self, mirror: Mirror, *, force: bool) -> None:
        volume = mirror.record.volume
        snapshots = mirror.engine.snapshots()
        if snapshots and not force:
            raise Refused(f"volume {volume!r} has {len(snapshots)} snapshots; delete them first or use force")
        await self._remove(mirror)
        logger.info("mirror deleted", extra={"volume": volume})

    async def _remove(self, mirror: Mirror) -> None:
        """With its snapshots, protected ones too."""
        volume = mirror.record.volume
        await mirror.end_session("the volume was deleted")
        for snapshot in mirror.engine.snapshots():
            if snapshot.protected:
                await mirror.engine.protect(snapshot.name, False)
        del self.mirrors[volume]
        await self._publish(volume)
        try:
            await mirror.engine.destroy()
        except StillpointError:
            self.mirrors[volume] = mirror  # still here: the request may be made again
            raise
        mirror.device.close()
        mirror.record.file.unlink()  # from here on the mirror does not exist
        shutil.rmtree(mirror.record.folder)
        self.served.forget_volume(volume)
        self.replicas.delete(volume)

    # --- snapshots

    async def create_snapshot(
        self, volumes: Sequence[str], *, name: str, store: str | None, writable: bool = False
    ) -> list[Snapshot]:
        """One instant across all the volumes; all of them or none."""
        if not volumes:
            raise InvalidRequest("a snapshot needs at least one volume")
        if len(set(volumes)) != len(volumes):
            raise InvalidRequest("a volume is named twice")
        mirrors = [self.mirror(volume) for volume in volumes]
        for mirror in mirrors:
            mirror.check_snapshot()
        name = name or self._free_name(mirrors)
        snapshots = await create_snapshots([mirror.engine for mirror in mirrors], name, store)
        if writable:
            await self._add_overlays(mirrors, snapshots)
        for volume in volumes:
            await self._publish(volume)
        return list(snapshots)

    async def _add_overlays(self, mirrors: Sequence[Mirror], snapshots: Sequence[Snapshot]) -> None:
        try:
            for mirror, snapshot in zip(mirrors, snapshots, strict=True):
                mirror.overlays.create(snapshot, block_size=mirror.engine.block_size)
        except StillpointError:
            for mirror, snapshot in zip(mirrors, snapshots, strict=True):
                await mirror.engine.delete(snapshot.name)
                mirror.overlays.delete(snapshot)
            raise

    async def make_writable(self, volume: str, name: str) -> Snapshot:
        """Let clients write to the snapshot's virtual device from now on. Refused while it is being read."""
        mirror = self.mirror(volume)
        snapshot = mirror.engine.get(name)
        if mirror.overlays.path(snapshot) is None:
            await self._withdraw(f"{volume}@{name}", wait=False, remedy="let them end")
            try:
                mirror.overlays.create(snapshot, block_size=mirror.engine.block_size)
            finally:
                await self._publish(volume)
        return snapshot

    @staticmethod
    def _free_name(mirrors: Sequence[Mirror]) -> str:
        """The time, and a number where more than one snapshot is taken in a second."""
        taken = {snapshot.name for mirror in mirrors for snapshot in mirror.engine.snapshots()}
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        return next(name for name in (stamp, *(f"{stamp}-{count}" for count in range(2, 5000))) if name not in taken)

    async def delete_snapshot(self, volume: str, name: str, *, bookmark: str, wait: bool) -> None:
        """bookmark: not empty: remember the instant under this name, durably, before the snapshot goes.

        Refused while somebody reads it, for longer than a reader that is just ending needs; wait: until nobody does.
        """
        engine = self.mirror(volume).engine
        identity = f"{volume}@{name}"
        if engine.get(name).protected:
            raise Refused(f"snapshot {identity} is protected; `snapshot unprotect` it first")
        if bookmark and any(mark.name == bookmark for mark in engine.bookmarks()):
            raise AlreadyExists(f"volume {volume!r} has a bookmark {bookmark!r} already")
        snapshot = engine.get(name)
        await self._withdraw(identity, wait=wait, remedy="let them end, or delete it with --wait")
        try:
            if bookmark:
                await engine.bookmark(bookmark, name)
            await engine.delete(name)
            self.mirror(volume).overlays.delete(snapshot)
        finally:
            await self._publish(volume)

    async def _withdraw(self, identity: str, *, wait: bool, remedy: str) -> None:
        """Have the snapshot served no longer. Raises Refused while somebody reads it; wait: until nobody does."""
        patience_ends = asyncio.get_running_loop().time() + _ENDING_READER_S
        while readers := await self.export.withdraw(identity):
            if not wait and asyncio.get_running_loop().time() > patience_ends:
                raise Refused(
                    f"snapshot {identity} is being read by {' and '.join(readers[:_READERS_NAMED])}"
                    + (f" and {len(readers) - _READERS_NAMED} more" if len(readers) > _READERS_NAMED else "")
                    + f"; {remedy}"
                )
            await asyncio.sleep(_READER_POLL_S)

    async def delete_bookmark(self, volume: str, name: str) -> None:
        await self.mirror(volume).engine.delete_bookmark(name)
        await self._publish(volume)

    async def resize_store(self, name: str, size: int) -> None:
        await asyncio.get_running_loop().run_in_executor(self.executor, self.stores.resize, name, size)

    def create_store(self, name: str, *, kind: str, size: int, paths: list[str], map_form: str, size_max: int) -> None:
        """map_form: how its snapshots remember their blocks; empty: the default. size_max: to which it grows by itself.

        Durable on return.
        """
        real = {os.path.realpath(path) for path in paths}
        for mirror in self.mirrors.values():
            shared = real & {os.path.realpath(path) for path in mirror.record.device_paths}
            if shared:
                raise Refused(f"store {name!r}: {shared.pop()} belongs to the mirror of {mirror.record.volume!r}")
        for store in self.stores.list():
            shared = real & {os.path.realpath(path) for path in store.paths}
            if shared:
                raise Refused(f"store {name!r}: {shared.pop()} belongs to store {store.name!r}")
        places = [Path(path) for path in paths]
        self.stores.create(
            name, kind=kind, size=size, paths=places, map_form=map_form or FORM_DEFAULT, size_max=size_max
        )


def _started(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("snapshots are not exported: %s", error)
