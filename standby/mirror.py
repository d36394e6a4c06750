"""One volume's mirror: its device, its snapshot engine, and the session that may write to it.

Invariants
- At most one session writes, and none while this node serves the volume itself. The fence (epoch, session) is raised,
  durably, after the session before was ended and before the next one's token exists.
- Before the first frame of a resync is applied it is durable that the copy is not whole, and before that a snapshot of
  what it was (the fallback), so that a source that dies midway leaves a state that can be promoted. The copy is whole
  again only after the flush that ends the resync; then the fallback goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from stillpoint.channel import Receiver
from stillpoint.devices import BlockDevice, open_device
from stillpoint.errors import DataCorrupt, FencedError, InvalidRequest, ProtocolError, Refused, StillpointError
from stillpoint.extents import split
from stillpoint.link.base import Link
from stillpoint.replica import By, Fence, Flags, Generation, ReplicaState, decide
from stillpoint.replica.replicas import Replica
from stillpoint.replica.transitions import (
    fence_raised,
    next_session,
    peer_met,
    resync_begun,
    resync_finished,
    session_adopted,
    written,
)

from .cow import Snapshot, SnapshotEngine, open_virtual_device
from .live_device import LiveDevice
from .overlays import Overlays
from .receiver import MirrorReceiver
from .record import MirrorRecord

logger = logging.getLogger(__name__)

_SET_BACK_PIECE = 1 << 20


class MirrorState(enum.Enum):
    DISCONNECTED = "disconnected"
    SYNCING = "syncing"
    IN_SYNC = "in sync"
    FAILED = "failed"
    SERVED = "served"  # this node is the volume's primary


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a primary says of its copy when it asks for a session, and what this node adds."""

    source: ReplicaState
    dirty_bytes_there: int  # in its map for this node
    dirty_bytes_here: int  # from a time when this node was the primary
    size: int  # of the volume, bytes
    mode: str  # how its writes are answered; empty: as before


class Mirror:
    """Everything runs on the loop."""

    def __init__(
        self,
        record: MirrorRecord,
        replica: Replica,
        open_engine: Callable[[MirrorRecord, BlockDevice], SnapshotEngine],
        executor: Executor,
        *,
        publish: Callable[[str], Awaitable[None]],
        forget_dirty: Callable[[str], None],
    ) -> None:
        """executor: for reads that wait for the disk. publish: the snapshots of this volume have changed.
        forget_dirty: what this copy had that its primary lacked is known there now.

        Raises what opening its device and engine raises.
        """
        self.record = record
        self.replica = replica
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
        self._publish = publish
        self._forget_dirty = forget_dirty
        self._held = ""  # not empty: why no session may begin
        self._source: UUID | None = None  # node of the session that was begun last
        if replica.is_primary:
            self.state, self.detail = MirrorState.SERVED, ""

    @property
    def is_whole(self) -> bool:
        """The content is one that the volume had."""
        state = self.replica.state
        return state.current is not None and state.has(Flags.CONSISTENT)

    # --- sessions

    async def begin_session(self, proposal: Proposal) -> tuple[int, By | None]:
        """End the session before, raise the fence, and return the number of the new session and what will be sent."""
        record, replica, source = self.record, self.replica, proposal.source
        if source.volume != replica.state.volume:
            raise Refused(f"mirror {record.volume} belongs to another volume of that name (uuid {record.volume_uuid})")
        if proposal.size > self.engine.size:  # it may be longer, when the volume is being grown
            raise InvalidRequest(f"mirror {record.volume} has {self.engine.size} bytes, the volume {proposal.size}")
        fence = replica.state.fence
        if source.fence.epoch < fence.epoch:
            raise FencedError(
                f"mirror {record.volume} follows epoch {fence.epoch}; node {source.name} is a primary of epoch "
                f"{source.fence.epoch} and must stop serving"
            )
        if self.state is MirrorState.FAILED:
            raise Refused(f"mirror {record.volume} has failed: {self.detail}")
        if self._held:
            raise Refused(f"mirror {record.volume}: {self._held}")
        await self.end_session("a new session began")
        mine = peer_met(replica.state, source.node, source.name)
        theirs = peer_met(source, mine.node, mine.name)
        decision = decide(
            mine.side(source.node, dirty_bytes=proposal.dirty_bytes_here),
            theirs.side(mine.node, dirty_bytes=proposal.dirty_bytes_there),
        )
        session = next_session(mine, theirs.peer(mine.node).session)
        replica.become(fence_raised(mine, Fence(source.fence.epoch, session)))
        self._source = source.node
        if proposal.mode and proposal.mode != record.mode:
            record.mode = proposal.mode
            record.save()
        return session, decision.by

    async def end_session(self, reason: str) -> None:
        """Take no further frame of the session; on return none of its work is running."""
        if self.receiver is not None:
            await self.receiver.end(reason)

    def adopt(self, session: int, by: By | None, link: Link) -> Receiver:
        """The link has shown the session's token. Durable before the first acknowledgement."""
        replica, source = self.replica, self._source
        fence = replica.state.fence
        if replica.is_primary or session != fence.session or self.receiver is not None or source is None:
            raise ProtocolError(f"mirror {self.record.volume}: a newer session has begun")
        replica.become(session_adopted(replica.state, source, session, by))
        self.receiver = MirrorReceiver(self, link, epoch=fence.epoch, session=session)
        self.enter(MirrorState.SYNCING, "connected")
        self.receiver.start()
        return self.receiver

    # --- what the receiver reports

    def written(self) -> None:
        """The first frame that changes the mirror is about to be applied."""
        self.replica.become(written(self.replica.state))

    async def resync_began(self, base: Generation) -> None:
        """Nothing of the resync has been applied yet. Durable on return."""
        assert self._source is not None
        if self.is_whole:
            await self._keep_fallback()
        self.replica.become(resync_begun(self.replica.state, self._source, base))
        self._forget_dirty(self.record.volume)
        self.enter(MirrorState.SYNCING, "the primary is sending what changed")

    async def resync_ended(self, source: ReplicaState | None) -> None:
        """Everything before is flushed. source: what the copy now is; None: nothing had to be sent. Durable."""
        if source is not None:
            if source.current is None or source.node != self._source:
                raise ProtocolError(f"mirror {self.record.volume}: the end of another node's resync")
            self.replica.become(resync_finished(self.replica.state, source.node, source.current, source.history))
            await self._drop_fallback()
        self.enter(MirrorState.IN_SYNC, "")

    @property
    def fallback(self) -> Snapshot | None:
        """The content before the resync that has not ended, if it could be kept."""
        name = self.record.fallback
        return next((each for each in self.engine.snapshots() if each.name == name), None) if name else None

    async def _keep_fallback(self) -> None:
        """A resync goes on without one: it would be worse to stay behind."""
        name = time.strftime("before-resync-%Y%m%dT%H%M%SZ", time.gmtime())
        try:
            if self.fallback is not None:
                await self._drop_fallback()
            await self.engine.finish(self.engine.cut(name))
            self.record.fallback = name
            self.record.save()
            await self._publish(self.record.volume)
        except StillpointError as error:
            logger.warning("no snapshot before the resync: %s", error, extra={"volume": self.record.volume})

    async def _drop_fallback(self) -> None:
        snapshot = self.fallback
        self.record.fallback = ""
        self.record.save()
        if snapshot is not None:
            try:
                await self.engine.delete(snapshot.name)
                await self._publish(self.record.volume)
            except StillpointError as error:
                logger.warning("%s", error, extra={"volume": self.record.volume})

    def session_ended(self, reason: str) -> None:
        self.receiver = None
        if self.state not in (MirrorState.FAILED, MirrorState.SERVED):
            self.enter(MirrorState.DISCONNECTED, reason)

    def failed(self, reason: str) -> None:
        """The device failed; nothing more is written to it until an operator looks."""
        self.enter(MirrorState.FAILED, reason)

    def enter(self, state: MirrorState, detail: str) -> None:
        if (state, detail) == (self.state, self.detail):
            return
        level = logging.WARNING if state in (MirrorState.DISCONNECTED, MirrorState.FAILED) else logging.INFO
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

    # --- changing the role of the copy

    @contextlib.contextmanager
    def held(self, reason: str) -> Iterator[None]:
        """No session begins meanwhile."""
        self._held = reason
        try:
            yield
        finally:
            self._held = ""

    async def keep(self, name: str) -> str:
        """A snapshot of the content as it is, protected; its name. Durable on return."""
        await self.engine.finish(self.engine.cut(name))
        await self.engine.protect(name, True)
        await self._publish(self.record.volume)
        return name

    async def set_back(self, name: str) -> None:
        """Write the snapshot's content over what has changed since. No session may be running. Durable on return.

        What is overwritten stays readable as a snapshot of its own.
        """
        loop = asyncio.get_running_loop()
        base = self.engine.get(name).generation
        undo = await self.keep(time.strftime("before-set-back-%Y%m%dT%H%M%SZ", time.gmtime()))
        changed = (await self.engine.changed(undo, base=base, incarnation=self.engine.incarnation)).extents
        source = open_virtual_device(self.engine.describe(), name)
        try:
            for extent in changed:
                for piece in split(extent, limit=_SET_BACK_PIECE):
                    content = memoryview(bytearray(piece.length))
                    inside = content[: max(0, min(piece.length, source.size - piece.offset))]
                    await loop.run_in_executor(self.executor, source.read_into, piece.offset, inside)
                    self.engine.write(piece.offset, content)
                    if self.engine.wants_commit:
                        await self.engine.commit()
            await self.engine.flush()
        finally:
            source.close()

    def live_device(self) -> LiveDevice:
        """The mirror as the volume that clients write to. While it is open no session may begin."""
        return LiveDevice(self.engine, self.device, self.grow)

    def check_snapshot(self) -> None:
        """Raises Refused when the mirror is not a state that the volume had."""
        if self.state is MirrorState.FAILED:
            raise Refused(f"volume {self.record.volume!r}: its mirror has failed: {self.detail}")
        if not self.is_whole:
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
