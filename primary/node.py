"""The primary as a whole: its volumes, the NBD server that exports them, and the gRPC service that manages them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from stillpoint.config import Address, check_name, format_size
from stillpoint.devices import BlockDevice, open_device
from stillpoint.errors import (
    AlreadyExists,
    InvalidRequest,
    NotFound,
    PeerUnavailable,
    Refused,
    StillpointError,
)
from stillpoint.extents import Extent
from stillpoint.nbd.access import Access
from stillpoint.nbd.budget import Budget
from stillpoint.nbd.listen import activated_sockets, listen_tcp
from stillpoint.nbd.server import NbdServer
from stillpoint.replica.replicas import Replicas
from stillpoint.security.authorization import Exports
from stillpoint.tls import Credentials

from .config import PrimaryConfig
from .former import FormerVolumes
from .mirrored_device import AckMode, MirroredDevice
from .quiesce import Quiescer
from .record import VolumeRecord
from .resync_limits import ResyncLimits
from .spin import Spin, no_processor_is_free
from .standby_client import StandbyClient
from .volume import Volume, open_map

logger = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 64 * 1024
_BLOCK_SIZE_MIN, _BLOCK_SIZE_MAX = 512, 1 << 20
_SIZE_MAX = 1 << 50
_THREADS = 8
# How long a start waits for the standby to say whether it was promoted meanwhile.
_ASK_S = 2.0
_DROP_S = 5.0
_CUT_S = 1.0


class Copies(Protocol):
    """The copies that this node's other role holds, with their snapshots."""

    def live_device(self, volume: str) -> LiveDevice | None:
        """The copy as a device to serve; None: it has never been a mirror, so the plain device is served."""
        ...

    def snapshot_count(self, volume: str) -> int: ...

    async def delete_served(self, volume: str) -> None:
        """Its snapshots and state, after the last write. Nothing where there is none. Raises DeviceError."""
        ...


class LiveDevice(BlockDevice, Protocol):
    @property
    def congested(self) -> bool: ...


class PrimaryNode:
    """The role of serving volumes. Opened by `start`; every method runs on the loop."""

    def __init__(
        self,
        config: PrimaryConfig,
        replicas: Replicas,
        copies: Copies,
        credentials: Credentials | None = None,
        *,
        listens_at_once: bool = True,
    ) -> None:
        """listens_at_once: open the NBD port with the node, not with the first volume that it serves."""
        self.config = config
        self.replicas = replicas
        self.volumes: dict[str, Volume] = {}
        # Told when another node turns out to be a volume's primary: the volume's name, and how that is known.
        self.superseded: Callable[[str, str], None] = lambda volume, why: None
        self.standby = StandbyClient(
            config.standby.grpc, config.standby.carrier, node=config.node, credentials=credentials
        )
        self._copies = copies
        self._listens_at_once = listens_at_once
        limits = config.limits
        self._spin = Spin(limits.spin_us / 1e6, crowded_machine=no_processor_is_free)
        self._resync_limits = ResyncLimits(rate=limits.resync_rate, parallel_max=limits.parallel_resyncs)
        self._exports: dict[str, MirroredDevice] = {}
        self._former = FormerVolumes(self._folder)
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="disk")
        self.nbd = NbdServer(
            self._exports,
            self._executor,
            budget=Budget(config.limits.request_memory_bytes),
            connection_max=config.limits.nbd_connections,
            access=Access.to(Exports.VOLUMES, credentials, config.tls),
        )
        self.nbd_address = config.listen.nbd
        self._listening = False
        self.quiescer = Quiescer(config.quiesce)
        self._changing = asyncio.Lock()  # one creation or deletion at a time

    @property
    def _folder(self) -> Path:
        return self.config.state_dir / "volumes"

    async def start(self) -> None:
        """Open every volume that this node is the primary of, and serve it as soon as the standby has been asked
        whether it was promoted meanwhile; one that cannot be reached is not waited for.

        A volume that cannot be opened is an error: it must not vanish silently.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        opened: list[Volume] = []
        for folder in sorted(self._folder.iterdir()):
            if not (folder / "volume.json").exists():
                logger.warning("removing what is left of a volume that was never finished", extra={"folder": folder})
                shutil.rmtree(folder)
                continue
            record = VolumeRecord.load(folder)
            if self.replicas.get(record.name).is_primary:
                opened.append(self._open(record))
        for volume in opened:
            self.volumes[volume.record.name] = volume
            volume.start()
        if opened:
            asked = [asyncio.ensure_future(volume.pair.has_asked.wait()) for volume in opened]
            _, waiting = await asyncio.wait(asked, timeout=_ASK_S)
            for task in waiting:
                task.cancel()
        for volume in opened:
            if self.volumes.get(volume.record.name) is volume and not volume.pair.is_superseded:
                self._export(volume)
        if self._listens_at_once or opened:
            self._listen()

    def _listen(self) -> None:
        """Raises InUse."""
        if self._listening:
            return
        inherited = activated_sockets() if self._listens_at_once else []
        listeners = inherited or [listen_tcp(self.config.listen.nbd.host, self.config.listen.nbd.port)]
        host, port = listeners[0].getsockname()[:2]
        self.nbd_address = Address(host, port)
        self.nbd.listen(listeners)
        self._listening = True

    def _open(self, record: VolumeRecord) -> Volume:
        name = record.name
        self._former.close(name)
        live = self._copies.live_device(name)
        device = live or open_device([Path(path) for path in record.device_paths], size=record.size)
        return Volume(
            record,
            self.replicas.get(name),
            device,
            self.config,
            self.standby,
            self._executor,
            self._resync_limits,
            self._spin,
            superseded=lambda why: self.superseded(name, why),
            congested=(lambda: live.congested) if live is not None else None,
        )

    def _export(self, volume: Volume) -> None:
        name = volume.record.name
        self._exports[name] = volume.export
        logger.info("volume open", extra={"volume": name, "size": volume.record.size})

    # --- roles

    def serve(self, record: VolumeRecord) -> Volume:
        """A volume that this node has become the primary of. The port is open on return. Raises InUse, DeviceError."""
        self._listen()
        volume = self._open(record)
        self.volumes[record.name] = volume
        volume.start()
        self._export(volume)
        return volume

    def prepare(self, record: VolumeRecord) -> None:
        """Make what serving the volume needs, durably, so that only the role is left to change."""
        self._listen()
        before = self.record(record.name)
        if before is None:
            record.folder.mkdir(parents=True, exist_ok=True)
            open_map(record).close(clean=True)
        elif before.size < record.size:  # it grew while another node served it
            self._former.close(record.name)
            dirty = open_map(before)
            dirty.grow(record.size)
            dirty.close(clean=True)
        record.save()

    async def release(self, name: str, *, clean: bool) -> VolumeRecord:
        """Serve the volume no longer; its clients are cut off.

        clean: with everything answered, flushed here and on the standby. Otherwise with what waits left unanswered,
        because another node is the primary.

        Raises Refused when the standby lacks something, and the volume is served as before; DeviceError when the last
        flush fails, and it is closed.
        """
        volume = self.volume(name)
        self._exports.pop(name, None)
        if clean:
            try:
                await self.nbd.drop(volume.export, timeout_s=_DROP_S)
                await volume.settle()
            except BaseException:
                self._exports[name] = volume.export
                raise
        else:
            await self.nbd.drop(volume.export, timeout_s=0.0)
            volume.export.gate.end()  # what waited is answered to connections that are gone
            while not await self.nbd.drop(volume.export, timeout_s=_CUT_S):
                logger.warning("a request is still busy with the disk", extra={"volume": name})
        volume.export.gate.end()
        del self.volumes[name]
        if clean:
            await volume.close()
        else:
            await volume.abandon()
        return volume.record

    def record(self, name: str) -> VolumeRecord | None:
        """Of a volume that is, or was, served here."""
        folder = self._folder / name
        return VolumeRecord.load(folder) if (folder / "volume.json").exists() else None

    def folder(self, name: str) -> Path:
        return self._folder / name

    def dirty_bytes(self, volume: str) -> int:
        served = self.volumes.get(volume)
        return served.dirty.dirty_bytes if served is not None else self._former.dirty_bytes(volume)

    def list_dirty(self, volume: str) -> Iterator[Extent]:
        """What the copy may have that the node which is primary now lacks."""
        return self._former.extents(volume)

    def forget_dirty(self, volume: str) -> None:
        self._former.clear(volume)

    def forget_volume(self, volume: str) -> None:
        self._former.close(volume)
        if volume not in self.volumes and (self._folder / volume).exists():
            (self._folder / volume / "volume.json").unlink(missing_ok=True)
            shutil.rmtree(self._folder / volume)

    async def stop(self) -> None:
        """Answer what is in flight, flush both nodes, and mark everything clean."""
        await self.quiescer.stop()
        for volume in self.volumes.values():
            volume.export.gate.end()
        await self.nbd.stop()
        for volume in self.volumes.values():
            try:
                await volume.close()
            except StillpointError as error:
                logger.error("volume not closed cleanly: %s", error, extra={"volume": volume.record.name})
        self._former.close_all()
        await self.standby.close()
        self._executor.shutdown()

    def volume(self, name: str) -> Volume:
        found = self.volumes.get(name)
        if found is None:
            if self.replicas.find(name) is not None:
                raise NotFound(f"node {self.replicas.name} holds a copy of volume {name!r} and does not serve it")
            raise NotFound(f"there is no volume {name!r}")
        return found

    # --- creating and deleting

    async def create_volume(
        self,
        name: str,
        *,
        size: int,
        block_size: int,
        device_paths: list[str],
        mirror_device_paths: list[str],
        mode: AckMode,
    ) -> Volume:
        """Durable on return, and exported. Nothing is left behind when it raises."""
        check_name(name, "volume")
        block_size = block_size or DEFAULT_BLOCK_SIZE
        async with self._changing:
            if self.replicas.find(name) is not None:
                raise AlreadyExists(f"volume {name!r} exists already")
            folder = self._folder / name
            with contextlib.ExitStack() as undo:
                folder.mkdir()
                undo.callback(shutil.rmtree, folder, ignore_errors=True)
                size = self._prepare_device(name, folder, size=size, block_size=block_size, device_paths=device_paths)
                record = VolumeRecord(
                    folder=folder,
                    name=name,
                    uuid=str(uuid.uuid4()),
                    size=size,
                    block_size=block_size,
                    mode=mode.value,
                    device_paths=[os.path.abspath(path) for path in device_paths] or [str(folder / "disk.img")],
                    created_ns=time.time_ns(),
                )
                self.replicas.create_primary(name, record.uuid, size=size)
                undo.callback(self.replicas.delete, name)
                volume = self._open(record)
                undo.callback(volume.device.close)
                undo.callback(volume.dirty.close, clean=False)
                await self.standby.create_mirror(record, mirror_device_paths)
                try:
                    record.save()
                except StillpointError:
                    with contextlib.suppress(StillpointError):
                        await self.standby.delete_mirror(record, force=True)
                    raise
                undo.pop_all()
            self._listen()
            self.volumes[name] = volume
            volume.start()
            self._export(volume)
            return volume

    def _prepare_device(self, name: str, folder: Path, *, size: int, block_size: int, device_paths: list[str]) -> int:
        """Check the sizes, and make the volume's file when no device is named. Returns the size in bytes."""
        if not _BLOCK_SIZE_MIN <= block_size <= _BLOCK_SIZE_MAX or block_size & (block_size - 1):
            raise InvalidRequest(
                f"volume {name!r}: a block size is a power of two from 512 B to 1 MiB, not {block_size}"
            )
        if device_paths:
            paths = [Path(path) for path in device_paths]
            missing = next((path for path in paths if not path.exists()), None)
            if missing is not None:
                raise InvalidRequest(f"volume {name!r}: the device {missing} does not exist")
            for other in self.volumes.values():
                shared = {os.path.realpath(path) for path in device_paths} & {
                    os.path.realpath(path) for path in other.record.device_paths
                }
                if shared:
                    raise Refused(f"volume {name!r}: {shared.pop()} belongs to volume {other.record.name!r}")
            device = open_device(paths)
            available = device.size
            device.close()
            size = size or available // block_size * block_size
            if size > available:
                raise InvalidRequest(
                    f"volume {name!r}: the devices hold {format_size(available)}, too small for {format_size(size)}"
                )
        if size <= 0:
            raise InvalidRequest(f"volume {name!r}: the size must be above 0")
        if size % block_size:
            raise InvalidRequest(
                f"volume {name!r}: the size {size} is not a multiple of the block size {block_size}; "
                f"{size // block_size * block_size + block_size} is the next one"
            )
        if size > _SIZE_MAX:
            raise InvalidRequest(f"volume {name!r}: the size is above the limit of {format_size(_SIZE_MAX)}")
        if not device_paths:
            open_device([folder / "disk.img"], size=size, create=True).close()
        return size

    async def resize_volume(self, name: str, *, size: int) -> Volume:
        """Grow a volume on both nodes while it is used. Durable on return; asking for the size it has does no harm.

        The mirror grows first: a mirror may be longer than its volume, never shorter. Whatever stops this half way,
        the volume keeps its old size, and asking again goes on from there.
        Raises InvalidRequest, PeerUnavailable and what growing a device raises.
        """
        async with self._changing:
            volume = self.volume(name)
            record = volume.record
            if size < record.size:
                raise InvalidRequest(
                    f"volume {name!r} has {format_size(record.size)}; it can grow, not shrink to {format_size(size)}"
                )
            if size % record.block_size or size > _SIZE_MAX:
                raise InvalidRequest(
                    f"volume {name!r}: the size must be a multiple of the block size {record.block_size}, "
                    f"up to {format_size(_SIZE_MAX)}"
                )
            await self.standby.resize_mirror(record, size)
            if size > record.size:
                await volume.grow(size)
                logger.info("volume grown", extra={"volume": name, "size": size})
            return volume

    async def resync_volume(self, name: str) -> Volume:
        """Copy everything to the mirror again; a standby that holds none, because it was replaced, gets one.

        What is to be copied is durable on return; it travels when the standby can be reached.
        Raises AlreadyExists, DeviceError.
        """
        async with self._changing:
            volume = self.volume(name)
            with contextlib.suppress(PeerUnavailable):
                await self.standby.create_mirror(volume.record, [])  # the one that is there stays
            await volume.resend()
            return volume

    async def delete_volume(self, name: str, *, force: bool) -> None:
        """The volume's file is removed; devices that were named keep their content. The mirror goes too.

        Refused while clients are connected. If the standby cannot be reached, only `force` deletes the volume, and
        its mirror stays there.
        """
        async with self._changing:
            volume = self.volume(name)
            if volume.export.connection_count and not force:
                count = volume.export.connection_count
                raise Refused(f"volume {name!r} has {count} connected clients; disconnect them or use force")
            if (held := self._copies.snapshot_count(name)) and not force:
                raise Refused(f"volume {name!r} has {held} snapshots here; delete them first or use force")
            try:
                await self.standby.delete_mirror(volume.record, force=force)
            except NotFound:
                pass
            except PeerUnavailable as error:
                if not force:
                    raise Refused(
                        f"volume {name!r}: its mirror cannot be deleted: {error}; use force to leave it"
                    ) from None
            del self._exports[name], self.volumes[name]
            volume.export.gate.end()
            await self.nbd.drop(volume.export)
            with contextlib.suppress(StillpointError):
                await volume.close()
            await self._copies.delete_served(name)
            volume.record.file.unlink(missing_ok=True)  # from here on the volume does not exist
            shutil.rmtree(volume.record.folder, ignore_errors=True)
            self.replicas.delete(name)
            logger.info("volume deleted", extra={"volume": name})
