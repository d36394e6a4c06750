"""One volume that this node serves: its record, device, dirty map, export and pair, opened and closed together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from uuid import UUID

from stillpoint.canary import PROBE_SIZE, probe_offset
from stillpoint.devices import BlockDevice
from stillpoint.errors import DataCorrupt, DeviceError, Refused, StillpointError
from stillpoint.extents import Extent
from stillpoint.replica import mint
from stillpoint.replica.replicas import Replica
from stillpoint.replica.transitions import grown, minted, must_mint

from .config import PrimaryConfig
from .dirty_map import DirtyMap
from .gate import LossPolicy
from .intent_log import IntentLog
from .mirrored_device import AckMode, CongestionPolicy, MirroredDevice
from .pair import Pair, PairState
from .record import VolumeRecord
from .resync_limits import ResyncLimits
from .spin import Spin
from .standby_client import StandbyClient
from .write_intent import open_write_intent

logger = logging.getLogger(__name__)

# How often a probe that waits looks whether it waits for the gate.
_GATE_LOOK_S = 0.2
# How long a standby may take for the last flush before a volume is handed over to it.
_SETTLE_S = 20.0


class Volume:
    """Open it on the loop, then `start` it. `export` is what NBD serves."""

    def __init__(
        self,
        record: VolumeRecord,
        replica: Replica,
        device: BlockDevice,
        config: PrimaryConfig,
        standby: StandbyClient,
        executor: Executor,
        resync_limits: ResyncLimits,
        spin: Spin,
        *,
        superseded: Callable[[str], None],
        congested: Callable[[], bool] | None = None,
    ) -> None:
        """device: closed with the volume, and when this raises. superseded: see Pair. congested: see MirroredDevice.

        Raises what opening the map raises.
        """
        self.record = record
        self.replica = replica
        self.device = device
        try:
            if device.size != record.size:
                raise DataCorrupt(f"volume {record.name}: its device holds {device.size} bytes, not {record.size}")

            def open_maps(suspects: Sequence[Extent] | None) -> Sequence[DirtyMap]:
                self.dirty = _open_map(record, suspects)
                return [self.dirty]

            self.intent = open_write_intent(
                record.folder, device, open_maps, executor, capacity=config.limits.hot_extents
            )
        except BaseException:
            device.close()
            raise
        self.export = MirroredDevice(
            record.name,
            device,
            [self.dirty],
            executor,
            mode=AckMode(record.mode),
            on_standby_loss=LossPolicy(record.on_standby_loss),
            congestion=CongestionPolicy(record.congestion),
            intent=self.intent,
            spin=spin,
            async_queue_bytes=config.limits.async_queue_bytes,
            congested=congested,
        )
        self.pair = Pair(
            record,
            replica,
            device,
            self.dirty,
            self.export,
            executor,
            standby.open_link,
            peer_timeout_s=config.standby.peer_timeout_s,
            limits=resync_limits,
            superseded=superseded,
            sharing_changed=self._sharing_changed,
            going_alone=self._mint_without,
        )
        self.export.disk_failed = self._distrust
        self._executor = executor
        self._task: asyncio.Task[None] | None = None
        self._sharing_changed()

    # --- generations: what is acknowledged by this node alone is named by one that no other copy has

    def _sharing_changed(self) -> None:
        if must_mint(self.replica.state, self._in_sync()):
            self.export.unshared = self._mint
        else:
            self.export.unshared = None

    def _in_sync(self) -> set[UUID]:
        """Nodes that every acknowledgement waits for."""
        pair = self.pair
        if pair.sender is not None and pair.peer is not None and self.export.is_required(pair.sender):
            return {pair.peer.node}
        return set()

    def _mint(self) -> None:
        self._go_on_with(self._in_sync())

    def _mint_without(self, peer: UUID) -> None:
        self._go_on_with(self._in_sync() - {peer})

    def _go_on_with(self, in_sync: set[UUID]) -> None:
        state = self.replica.state
        if must_mint(state, in_sync):
            fresh = mint(state.fence.epoch)
            self.replica.become(minted(state, fresh, in_sync))
            logger.warning("the volume goes on without its standby", extra={"volume": self.record.name})
        self.export.unshared = None

    def start(self) -> None:
        self._task = asyncio.create_task(self.pair.run(), name=f"pair {self.record.name}")

    @property
    def failure(self) -> str:
        """Why the disk here is not to be trusted; empty: it is."""
        return self.export.failure or self.record.disk_failure

    def _distrust(self, reason: str) -> None:
        """What a failed flush lost is on the mirror still: never copy this disk over it, also after a restart."""
        if self.record.disk_failure:
            return
        self.record.disk_failure = reason
        try:
            self.record.save()
        except StillpointError as error:
            logger.error("cannot note that the disk failed: %s", error, extra={"volume": self.record.name})

    async def resend(self) -> None:
        """Copy everything to the mirror again; what is here counts. Durable on return: a restart goes on with it.

        Raises Refused while this process has seen the disk fail, DeviceError.
        """
        if self.export.failure:
            raise Refused(
                f"volume {self.record.name!r}: {self.export.failure}; look after the disk and restart the node first"
            )
        await self.pair.resend()

    @property
    def crash_resync_bytes_max(self) -> int:
        """What a power loss of this node makes dirty, at most, besides what is dirty already."""
        return min(self.record.size, self.intent.resync_max_bytes if self.intent is not None else self.record.size)

    def set(
        self,
        *,
        mode: AckMode | None = None,
        on_standby_loss: LossPolicy | None = None,
        congestion: CongestionPolicy | None = None,
        resync_rate: int | None = None,
    ) -> None:
        """What is not None, for every request from now on. Durable on return.

        Raises DeviceError; nothing changed then.
        """
        record = self.record
        before = (record.mode, record.on_standby_loss, record.congestion, record.resync_rate)
        record.mode = record.mode if mode is None else mode.value
        record.on_standby_loss = record.on_standby_loss if on_standby_loss is None else on_standby_loss.value
        record.congestion = record.congestion if congestion is None else congestion.value
        record.resync_rate = record.resync_rate if resync_rate is None else resync_rate
        try:
            record.save()
        except BaseException:
            record.mode, record.on_standby_loss, record.congestion, record.resync_rate = before
            raise
        self.export.congestion = CongestionPolicy(record.congestion)
        self.pair.throttle.rate = record.resync_rate
        self.export.set_mode(AckMode(record.mode))
        if on_standby_loss is not None:
            self.export.gate.set_policy(on_standby_loss)

    async def grow(self, size: int) -> None:
        """Show `size` bytes to clients that connect from now on; the mirror has grown already. Durable on return.

        The new bytes are zeroes here as they are there, so the pair stays in sync. The record comes last: until it is
        saved, a restart opens the volume with its old size, whatever device and dirty map have become.
        Raises what the device raises; the volume keeps its size then.
        """
        loop = asyncio.get_running_loop()
        if self.device.size < size:  # not after an attempt that failed later
            await loop.run_in_executor(self._executor, self.device.resize, size)
            await loop.run_in_executor(self._executor, self.device.flush)
        self.dirty.grow(size)
        self.record.size = size
        self.record.save()
        self.replica.become(grown(self.replica.state, size))
        self.export.grow(size)

    async def probe(self) -> None:
        """Read and flush as a client's requests do, to see whether they would be answered. Raises DeviceError.

        While clients get no answer because no standby is in sync and an operator wanted it so, this node is not at
        fault: then only its disk is flushed.
        """
        size = self.device.size
        buffer = memoryview(bytearray(min(PROBE_SIZE, size)))
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self.export.read_into, probe_offset(size), buffer)
        gate = self.export.gate
        flushing = asyncio.ensure_future(self.export.barrier())
        try:
            while not (gate.closed or gate.refusing):
                await asyncio.wait([flushing], timeout=_GATE_LOOK_S)
                if flushing.done():
                    flushing.result()
                    return
        finally:
            flushing.cancel()
        await loop.run_in_executor(self._executor, self.device.flush)

    async def settle(self) -> None:
        """After its clients are gone: see to it that the standby has everything, durably.

        Raises Refused, DeviceError.
        """
        self.export.set_mode(AckMode.SYNC)  # the queue of an asynchronous volume too
        try:
            async with asyncio.timeout(_SETTLE_S):
                await self.export.barrier()
        except TimeoutError:
            raise Refused(f"volume {self.record.name!r}: its standby does not confirm the last flush") from None
        finally:
            self.export.set_mode(AckMode(self.record.mode))
        if self.pair.state is not PairState.IN_SYNC:
            raise Refused(f"volume {self.record.name!r}: its standby went away: {self.pair.detail}")

    async def close(self) -> None:
        """After its clients are gone: flush both nodes, end the session, mark the map clean.

        Raises DeviceError when the last flush fails; the volume is closed all the same, and its map not marked clean.
        """
        self.export.gate.clients_gone()
        try:
            await self.export.barrier()
        finally:
            await self._end_session()
            self.dirty.close(clean=not self.export.failure)
            self.device.close()

    async def _end_session(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self.intent is not None:
            await self.intent.close()

    async def abandon(self) -> None:
        """After its clients are gone, and with what waited for the standby unanswered: another node is primary.

        What only this copy may have stays marked.
        """
        await self._end_session()
        flushed = True
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self.device.flush)
        except DeviceError as error:
            flushed = False
            logger.error("flush failed: %s", error, extra={"volume": self.record.name})
        self.dirty.close(clean=flushed and not self.export.failure)
        self.device.close()


def open_map(record: VolumeRecord) -> DirtyMap:
    """What the standby may lack, of a volume that is not served. Raises DeviceError, DataCorrupt."""
    log = IntentLog(record.folder / "intent.log")
    try:
        return _open_map(record, log.suspects(record.size))
    finally:
        log.close()


def _open_map(record: VolumeRecord, suspects: Sequence[Extent] | None) -> DirtyMap:
    path = record.folder / "dirty.map"
    return DirtyMap(path, record.size, create=not path.exists(), suspects=suspects)
