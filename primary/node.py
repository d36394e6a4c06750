"""The primary as a whole: its volumes, the NBD server that exports them, and the gRPC service that manages them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stillpoint.config import Address, check_name, format_size
from stillpoint.devices import open_device
from stillpoint.errors import (
    AlreadyExists,
    InvalidRequest,
    NotFound,
    PeerUnavailable,
    Refused,
    StillpointError,
)
from stillpoint.nbd.access import Access
from stillpoint.nbd.budget import Budget
from stillpoint.nbd.listen import activated_sockets, listen_tcp
from stillpoint.nbd.server import NbdServer
from stillpoint.security.authorization import Exports
from stillpoint.tls import Credentials

from .config import PrimaryConfig
from .mirrored_device import AckMode, MirroredDevice
from .quiesce import Quiescer
from .record import VolumeRecord
from .resync_limits import ResyncLimits
from .standby_client import StandbyClient
from .volume import Volume

logger = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 64 * 1024
_BLOCK_SIZE_MIN, _BLOCK_SIZE_MAX = 512, 1 << 20
_SIZE_MAX = 1 << 50
_THREADS = 8


class PrimaryNode:
    """Opened by `start`; every method runs on the loop."""

    def __init__(self, config: PrimaryConfig, credentials: Credentials | None = None) -> None:
        self.config = config
        self.volumes: dict[str, Volume] = {}
        self.standby = StandbyClient(
            config.standby.grpc, config.standby.carrier, node=config.node, credentials=credentials
        )
        limits = config.limits
        self._resync_limits = ResyncLimits(rate=limits.resync_rate, parallel_max=limits.parallel_resyncs)
        self._exports: dict[str, MirroredDevice] = {}
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="disk")
        self.nbd = NbdServer(
            self._exports,
            self._executor,
            budget=Budget(config.limits.request_memory_bytes),
            connection_max=config.limits.nbd_connections,
            access=Access.to(Exports.VOLUMES, credentials, config.tls),
        )
        self.nbd_address = config.listen.nbd
        self.quiescer = Quiescer(config.quiesce)
        self._changing = asyncio.Lock()  # one creation or deletion at a time

    @property
    def _folder(self) -> Path:
        return self.config.state_dir / "volumes"

    async def start(self) -> None:
        """Open every volume and serve them. A volume that cannot be opened is an error: it must not vanish silently."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for folder in sorted(self._folder.iterdir()):
            if not (folder / "volume.json").exists():
                logger.warning("removing what is left of a volume that was never finished", extra={"folder": folder})
                shutil.rmtree(folder)
                continue
            self._serve(self._open(VolumeRecord.load(folder), fresh=False))
        listeners = activated_sockets() or [listen_tcp(self.config.listen.nbd.host, self.config.listen.nbd.port)]
        host, port = listeners[0].getsockname()[:2]
        self.nbd_address = Address(host, port)
        self.nbd.listen(listeners)

    def _open(self, record: VolumeRecord, *, fresh: bool) -> Volume:
        return Volume(record, self.config, self.standby, self._executor, self._resync_limits, fresh=fresh)

    def _serve(self, volume: Volume) -> None:
        name = volume.record.name
        self.volumes[name] = volume
        self._exports[name] = volume.export
        volume.start()
        logger.info("volume open", extra={"volume": name, "size": volume.record.size})

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
        await self.standby.close()
        self._executor.shutdown()

    def volume(self, name: str) -> Volume:
        found = self.volumes.get(name)
        if found is None:
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
            if name in self.volumes:
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
                volume = self._open(record, fresh=True)
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
            self._serve(volume)
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
            volume.record.file.unlink()  # from here on the volume does not exist
            shutil.rmtree(volume.record.folder)
            logger.info("volume deleted", extra={"volume": name})
