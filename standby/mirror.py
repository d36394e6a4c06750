"""One volume's mirror: its device, its snapshot engine, and the session that may write to it.

Invariants
- At most one session writes. The fence (epoch, session) is raised, durably, after the session before was ended and
  before the next one's token exists.
- `consistent` is false, durably, before the first frame of a resync is applied, and true again only after the flush
  that ends the resync.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from stillpoint.channel import Receiver
from stillpoint.devices import BlockDevice, open_device
from stillpoint.errors import DataCorrupt, FencedError, InvalidRequest, ProtocolError, Refused
from stillpoint.link.base import Link

from .cow import SnapshotEngine
from .overlays import Overlays
from .receiver import MirrorReceiver
from .record import MirrorRecord

logger = logging.getLogger(__name__)


class MirrorState(enum.Enum):
    DISCONNECTED = "disconnected"
    SYNCING = "syncing"
    IN_SYNC = "in sync"
    FAILED = "failed"


class Mirror:
    """Everything runs on the loop."""

    def __init__(
        self,
        record: MirrorRecord,
        open_engine: Callable[[MirrorRecord, BlockDevice], SnapshotEngine],
        executor: Executor,
    ) -> None:
        """executor: for reads that wait for the disk. Raises what opening its device and engine raises."""
        self.record = record
        self.executor = executor
        self.device: BlockDevice = open_device([Path(path) for path in record.device_paths], size=record.size)
        try:
            if self.device.size != record.size:
                raise DataCorrupt(
                    f"mirror {record.volume}: its device holds {self.device.size} bytes, not {record.size}"
                )
            self.engine = open_engine(record, self.device)
        except BaseException:
            self.device.close()
            raise
        self.overlays = Overlays(record.folder / "overlays", self.engine.snapshots())
        self.state = MirrorState.DISCONNECTED
        self.since_ns = time.time_ns()
        self.detail = "the primary has not connected yet"
        self.receiver: MirrorReceiver | None = None
        self.received_bytes = 0

    # --- sessions

    async def begin_session(self, *, volume_uuid: str, size: int, epoch: int) -> int:
        """End the session before, raise the fence, and return the number of the new session."""
        record = self.record
        if volume_uuid != record.volume_uuid:
            raise Refused(f"mirror {record.volume} belongs to another volume of that name (uuid {record.volume_uuid})")
        if size > self.engine.size:  # it may be longer, when the volume is being grown
            raise InvalidRequest(f"mirror {record.volume} has {self.engine.size} bytes, the volume {size}")
        if epoch < record.epoch:
            raise FencedError(f"mirror {record.volume} is at epoch {record.epoch}; this primary is at {epoch}")
        if self.state is MirrorState.FAILED:
            raise Refused(f"mirror {record.volume} has failed: {self.detail}")
        await self.end_session("a new session began")
        record.epoch = epoch
        record.session += 1
        record.save()
        return record.session

    async def end_session(self, reason: str) -> None:
        """Take no further frame of the session; on return none of its work is running."""
        if self.receiver is not None:
            await self.receiver.end(reason)

    def adopt(self, session: int, link: Link) -> Receiver:
        """The link has shown the session's token. Durable before the first acknowledgement."""
        if session != self.record.session or self.receiver is not None:
            raise ProtocolError(f"mirror {self.record.volume}: a newer session has begun")
        self.record.adopted_session = session
        self.record.save()
        self.receiver = MirrorReceiver(self, link, epoch=self.record.epoch, session=session)
        self.enter(MirrorState.SYNCING, "connected")
        self.receiver.start()
        return self.receiver

    # --- what the receiver reports

    def written(self) -> None:
        """The first frame that changes the mirror is about to be applied."""
        self.record.blank = False
        self.record.save()

    def resync_began(self) -> None:
        self.record.consistent = False
        self.record.save()
        self.enter(MirrorState.SYNCING, "the primary is sending what changed")

    def resync_ended(self) -> None:
        """Everything before is flushed."""
        if not self.record.consistent:
            self.record.consistent = True
            self.record.save()
        self.enter(MirrorState.IN_SYNC, "")

    def session_ended(self, reason: str) -> None:
        self.receiver = None
        if self.state is not MirrorState.FAILED:
            self.enter(MirrorState.DISCONNECTED, reason)

    def failed(self, reason: str) -> None:
        """The device failed; nothing more is written to it until an operator looks."""
        self.enter(MirrorState.FAILED, reason)

    def enter(self, state: MirrorState, detail: str) -> None:
        if (state, detail) == (self.state, self.detail):
            return
        level = logging.INFO if state in (MirrorState.IN_SYNC, MirrorState.SYNCING) else logging.WARNING
        logger.log(
            level, "mirror %s%s", state.value, f": {detail}" if detail else "", extra={"volume": self.record.volume}
        )
        if state is not self.state:
            self.since_ns = time.time_ns()
        self.state, self.detail = state, detail

    async def grow(self, size: int) -> None:
        """Make room for a volume that is about to have `size` bytes. Durable on return.

        Device, record, engine, in this order: a record never names more than the device holds, nor an engine more than
        the record, so a restart finds what it can open, and asking again goes on from there. What the volume has not
        grown into yet is not written to.
        Raises InvalidRequest, Refused, DeviceError.
        """
        record, engine = self.record, self.engine
        if size < engine.size or size % engine.block_size:
            raise InvalidRequest(f"mirror {record.volume} has {engine.size} bytes; it cannot become {size}")
        if self.device.size < size:
            await asyncio.get_running_loop().run_in_executor(None, self.device.resize, size)
        if record.size < size:
            record.size = size
            record.save()
        await engine.resize(size)

    def check_snapshot(self) -> None:
        """Raises Refused when the mirror is not a state that the volume had."""
        if self.state is MirrorState.FAILED:
            raise Refused(f"volume {self.record.volume!r}: its mirror has failed: {self.detail}")
        if not self.record.consistent:
            raise Refused(
                f"volume {self.record.volume!r}: its mirror is not whole yet, {self.detail}; wait until it is in sync"
            )

    def describe(self) -> dict[str, Any]:
        """What the export process needs to serve the snapshots and to know earlier instants; can be written as JSON."""
        bookmarks = [
            {"name": mark.name, "generation": mark.generation, "incarnation": str(mark.incarnation)}
            for mark in self.engine.bookmarks()
        ]
        description = {**self.engine.describe(), "bookmarks": bookmarks}
        by_uuid = {str(snapshot.uuid): snapshot for snapshot in self.engine.snapshots()}
        for described in description["snapshots"]:
            path = self.overlays.path(by_uuid[described["uuid"]])
            described["overlay"] = str(path) if path is not None else None
        return description

    async def close(self) -> None:
        await self.end_session("the standby is stopping")
        await self.engine.close()
        self.device.close()
