"""A volume and its mirror: connect, bring the mirror up to date, notice when it goes, begin again.

Order of a session, each step only after the one before it has succeeded
1. OpenLink: the standby ends the session before, makes the new fence durable and gives out a token. Both nodes' states
   decide what has to be done (stillpoint/replica/handshake.py); a node that serves the volume itself gives none.
2. The data link is opened; the standby makes durable that it adopted the session, and acknowledges.
3. What the other copy may have that this one lacks, from a time when it was the primary, is asked for; all that has
   to be copied is marked dirty, durably. If there is any, it waits for its turn among the resyncs of the node.
4. In one turn of the loop: both states are looked at again, since writes may have gone on, the session is made durable
   here, the volume is attached (every write from now on is sent too), and RESYNC_BEGIN is sent if anything is to be
   copied.
5. The dirty chunks are copied; then RESYNC_END: the standby flushes, makes durable that its mirror is whole, and says
   so. Only then is the pair in sync.

When a standby that was in sync goes away, nothing is acknowledged without it before it has been asked once more: a
standby that was promoted meanwhile says so, and this node then stops serving, with every request that waited left
unanswered. Only if it cannot be reached does the volume go on alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from typing import Protocol
from uuid import UUID

from stillpoint.devices import BlockDevice
from stillpoint.errors import DeviceError, FencedError, PeerUnavailable, ProtocolError, Refused, StillpointError
from stillpoint.extents import Extent
from stillpoint.link.base import Link
from stillpoint.replica import By, Decision, Outcome, Reason, ReplicaState, Source, decide, mint
from stillpoint.replica.messages import pack_generation, pack_state
from stillpoint.replica.replicas import Replica
from stillpoint.replica.transitions import (
    generation_offered,
    peer_met,
    resync_prepared,
    session_adopted,
)

from .dirty_map import DirtyMap
from .mirrored_device import AckMode, MirroredDevice
from .record import VolumeRecord
from .resync import Progress, resync
from .resync_limits import ResyncLimits
from .sender import Sender
from .throttle import Throttle
from .verify import Comparison, Verifier, keep_differences

logger = logging.getLogger(__name__)

_RETRY_FIRST_S = 0.2
_RETRY_MAX_S = 2.0
_BACKGROUND_FLUSH_S = 1.0
# How long requests wait, after a standby in sync was lost, for it to say whether it has been promoted.
_ASK_S = 1.5
_ASKING = "the standby went away and is being asked whether it was promoted"


class PairState(enum.Enum):
    DISCONNECTED = "disconnected"
    SYNCING = "syncing"
    IN_SYNC = "in sync"
    SPLIT_BRAIN = "split brain"


class SupersededError(Refused):
    """Another node is the volume's primary: this one must stop serving it."""


class OpenedLink(Protocol):
    """What OpenLink answered."""

    @property
    def state(self) -> ReplicaState:
        """Of the other copy."""
        ...

    @property
    def dirty_bytes(self) -> int:
        """What `list_dirty` names."""
        ...

    @property
    def session(self) -> int:
        """0: there is no session, the other node is primary too."""
        ...

    async def connect(self, sender: Sender) -> Link:
        """Open the carrier and show the token. Raises PeerUnavailable."""
        ...

    def list_dirty(self) -> AsyncIterator[Extent]:
        """What the other copy may have that this one lacks. Raises PeerUnavailable."""
        ...


class Pair:
    """Runs one volume's sessions for as long as the volume is open."""

    def __init__(
        self,
        record: VolumeRecord,
        replica: Replica,
        device: BlockDevice,
        dirty: DirtyMap,
        volume: MirroredDevice,
        executor: Executor,
        open_link: Callable[[str, ReplicaState, int, str], Awaitable[OpenedLink]],
        *,
        peer_timeout_s: float,
        limits: ResyncLimits,
        superseded: Callable[[str], None],
        sharing_changed: Callable[[], None],
        going_alone: Callable[[UUID], None],
    ) -> None:
        """limits: of the node; the volume's own is `throttle`.
        superseded: another node is primary, and why that is known; called once, after which no session begins.
        sharing_changed: this standby has begun or ceased to be one that every acknowledgement waits for.
        going_alone: requests are about to be acknowledged without this standby. Raises DeviceError: then they must not.
        """
        self.record = record
        self.name = record.name
        self.throttle = Throttle(record.resync_rate)
        self._limits = limits
        self.state = PairState.DISCONNECTED
        self.since_ns = time.time_ns()
        self.detail = "not connected yet"
        self.progress: Progress | None = None
        self.sender: Sender | None = None
        self.peer: ReplicaState | None = None  # as it was at the last handshake
        self.is_superseded = False
        self.has_asked = asyncio.Event()  # the standby has answered once, or cannot be reached
        self._replica = replica
        self._device = device
        self._dirty = dirty
        self._volume = volume
        self._executor = executor
        self._open_link = open_link
        self._peer_timeout_s = peer_timeout_s
        self._superseded = superseded
        self._sharing_changed = sharing_changed
        self._going_alone = going_alone
        self._stuck = ""  # why writers are refused until the standby is in sync again; empty: they are not
        self._must_ask = False  # a standby that was in sync went away, and answers wait until it was asked why
        self.verified_ns = 0
        self.mismatch_bytes = 0
        self._verifying = False

    async def run(self) -> None:
        """Until cancelled, or superseded."""
        retry_s = _RETRY_FIRST_S
        while True:
            started = time.monotonic()
            try:
                await self._session()
            except SupersededError as error:
                self._enter(PairState.DISCONNECTED, str(error))
                self.is_superseded = True
                self.has_asked.set()
                self._superseded(str(error))
                return
            except StillpointError as error:
                if self.state is not PairState.SPLIT_BRAIN:
                    self._enter(PairState.DISCONNECTED, str(error))
            self.has_asked.set()
            if self._must_ask:
                continue  # what waits must not wait longer than it takes to ask
            if time.monotonic() - started > _RETRY_MAX_S:
                retry_s = _RETRY_FIRST_S
            await asyncio.sleep(retry_s)
            retry_s = min(retry_s * 2, _RETRY_MAX_S)

    async def _session(self) -> None:
        """One session, until it ends; always ends by raising."""
        opened = await self._ask()
        if self.record.disk_failure:
            raise Refused(
                "the disk here failed a flush and may lack what the mirror has, so nothing is copied from it; promote "
                f"the standby, or let this disk count with `standbyctl mirror resync {self.record.name}`"
            )
        lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        sender = Sender(
            epoch=self._replica.state.fence.epoch,
            session=opened.session,
            lost=lambda error: self._ended(sender, lost, error),
        )
        sender.attach(await opened.connect(sender))
        try:
            await self._adopted(sender)
            theirs = opened.state
            only_there = [extent async for extent in opened.list_dirty()] if opened.dirty_bytes else []
            marked = self._decide(opened)
            await self._mark(marked, only_there)
            watching = asyncio.ensure_future(self._watch(sender))
            try:
                async with self._slot(marked):
                    if sender.ended:
                        raise PeerUnavailable("the standby closed the data link")
                    decision = self._decide(opened)
                    if _marks(decision) != _marks(marked):
                        raise ProtocolError("the copies changed while what differs was noted")
                    self._attach(sender, theirs.node, opened.session, decision)
                    await self._bring_up_to_date(sender, theirs.node, decision)
                raise await lost
            finally:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching
        finally:
            sender.end(PeerUnavailable("this node ended the session"))
            self.sender = None

    async def _ask(self) -> OpenedLink:
        """Open a session. Whatever the answer, what waited for the standby of the one before is answered now, unless
        the answer is that this node must serve no longer."""
        try:
            async with asyncio.timeout(_ASK_S if self._must_ask else None):
                opened = await self._open_link(
                    self.name, self._replica.state, self._dirty.dirty_bytes, self._volume.mode.value
                )
            self._decide(opened)
        except (SupersededError, FencedError) as error:
            raise SupersededError(str(error)) from None
        except TimeoutError:
            self._go_on()
            raise PeerUnavailable("the standby does not answer") from None
        except StillpointError:
            self._go_on()
            raise
        self._go_on()
        self.has_asked.set()
        return opened

    def _detached(self, error: Exception) -> None:
        """Nothing that waited for the standby has been answered yet."""
        if self.state is PairState.IN_SYNC and self._volume.mode is not AckMode.ASYNC:
            self._must_ask = True
            self._volume.gate.suspend(_ASKING)

    def _go_on(self) -> None:
        """The standby was asked, or cannot be: what is acknowledged from now on has a name that it does not know."""
        if not self._must_ask:
            return
        self._must_ask = False
        try:
            if self.peer is not None and self._dirty.dirty_count:
                self._going_alone(self.peer.node)
        except DeviceError as error:
            # Nothing would tell this copy from the one that lacks what waits: so it fails, as what comes later does.
            self._stuck = f"the metadata of this copy cannot be written: {error}"
            self._volume.gate.refuse(self._stuck)
        self._sharing_changed()
        self._volume.gate.resume(_ASKING)

    def _decide(self, opened: OpenedLink) -> Decision:
        """Raises SupersededError, or Refused where no session is possible."""
        theirs = self.peer = opened.state
        self._replica.become(peer_met(self._replica.state, theirs.node, theirs.name))
        mine = self._replica.state
        decision = decide(
            mine.side(theirs.node, dirty_bytes=self._dirty.dirty_bytes),
            peer_met(theirs, mine.node, mine.name).side(mine.node, dirty_bytes=opened.dirty_bytes),
        )
        self._replica.alarm = ""
        if decision.outcome is Outcome.IN_SYNC or decision.source is Source.MINE:
            if opened.session:
                return decision
            raise Refused(f"node {theirs.name} serves the volume too, and follows when it rejoins")
        if decision.reason is Reason.STALE_PRIMARY:
            if decision.at is Source.MINE:
                raise SupersededError(
                    f"node {theirs.name} has been promoted to epoch {theirs.fence.epoch}; the copy here is older"
                )
            raise Refused(f"node {theirs.name} still serves an older copy; it follows when it rejoins")
        reason = decision.reason.value if decision.reason is not None else "the other copy is newer"
        if decision.outcome is Outcome.SPLIT_BRAIN:
            self._replica.alarm = (
                f"SPLIT BRAIN with node {theirs.name}: both copies were written to without the other one; "
                f"nothing is discarded before `standbyctl resolve {self.name} --keep NODE`"
            )
            self._enter(PairState.SPLIT_BRAIN, self._replica.alarm)
        raise Refused(f"node {theirs.name}: {reason}")

    async def _adopted(self, sender: Sender) -> None:
        try:
            async with asyncio.timeout(self._peer_timeout_s):
                await sender.adopted.wait()
        except TimeoutError:
            raise PeerUnavailable("the standby did not take the data link in time") from None
        if sender.ended:
            raise PeerUnavailable("the standby closed the data link")

    async def _mark(self, decision: Decision, only_there: list[Extent]) -> None:
        """Make dirty, durably, what has to be copied besides: from then on the map alone says what the mirror lacks.

        Writes that come meanwhile are dirty too, as for any mirror that is not attached.
        """
        if decision.by in (By.FULL, By.CHECKSUM):
            self._dirty.mark_dirty(Extent(0, self._device.size))
        elif decision.by is By.FULL_SKIP_HOLES:
            for mapped in self._device.extents(0, self._device.size):
                if not mapped.hole:
                    self._dirty.mark_dirty(Extent(mapped.offset, mapped.length))
        for extent in only_there:
            self._dirty.mark_dirty(extent)
        if only_there or _marks(decision):
            await asyncio.get_running_loop().run_in_executor(self._executor, self._dirty.persist)

    def _slot(self, decision: Decision) -> contextlib.AbstractAsyncContextManager[None]:
        """What has to be copied waits for its turn before it attaches: till then the mirror stays what it was."""
        if decision.outcome is not Outcome.RESYNC:
            return contextlib.nullcontext()
        return self._limits.slot(lambda: self._enter(PairState.DISCONNECTED, "waits for the resync of other volumes"))

    def _attach(self, sender: Sender, peer: UUID, session: int, decision: Decision) -> None:
        """In one turn of the loop with the decision: no write falls between."""
        replica = self._replica
        replica.become(session_adopted(replica.state, peer, session, decision.by))
        if _marks(decision):
            replica.become(resync_prepared(replica.state, peer, mint(replica.state.fence.epoch)))
        self.sender = sender
        self._volume.attach(sender, self._dirty, self._detached)
        self.progress = Progress(self._dirty.dirty_bytes)
        base = replica.state.peer(peer).bitmap
        if decision.outcome is Outcome.RESYNC and base is not None:
            sender.resync_begin(pack_generation(base))
            sender.push()
        logger.info(
            "standby attached: %s",
            decision.by.value if decision.by is not None else "in sync already",
            extra={"volume": self.name, "session": sender.session, "dirty_bytes": self._dirty.dirty_bytes},
        )

    async def _bring_up_to_date(self, sender: Sender, peer: UUID, decision: Decision) -> None:
        """In the turn of `_attach` up to the first byte that has to be copied."""
        replica = self._replica
        offer = b""
        if decision.outcome is Outcome.RESYNC:
            assert self.progress is not None and decision.by is not None
            self._enter(PairState.SYNCING, decision.by.value)
            throttles = (self.throttle, self._limits.total)
            if decision.by is By.CHECKSUM:
                rate = self.throttle.rate
                verifier = Verifier(self._device, self._volume, sender, self._executor, rate=rate)
                await keep_differences(verifier, self._dirty)
                self.progress = Progress(self._dirty.dirty_bytes)
            await resync(self._device, self._dirty, self._volume, sender, self._executor, self.progress, throttles)
        # From here on an acknowledgement without this standby needs a new generation.
        replica.become(generation_offered(replica.state, peer))
        if decision.outcome is Outcome.RESYNC:
            offer = pack_state(replica.state)
        sequence = sender.resync_end(offer)
        self._volume.require(sender, sequence)
        self._sharing_changed()
        sender.push()
        await sender.until(lambda watermarks: watermarks.flushed >= sequence)
        if self._dirty.dirty_count:
            raise ProtocolError("chunks became dirty while the resync ended")
        self._enter(PairState.IN_SYNC, "")
        if self._stuck:  # it has what waited, by the resync
            self._volume.gate.allow(self._stuck)
            self._stuck = ""

    async def _watch(self, sender: Sender) -> None:
        """Notice a silent standby, and keep little unflushed."""
        loop = asyncio.get_running_loop()
        interval = min(self._peer_timeout_s / 4, _BACKGROUND_FLUSH_S)
        while not sender.ended:
            await asyncio.sleep(interval)
            silent_s = loop.time() - sender.heard_at
            if silent_s > self._peer_timeout_s:
                sender.end(PeerUnavailable(f"nothing was heard from the standby for {silent_s:.1f} s"))
                return
            sender.ping()
            if self.state is PairState.IN_SYNC:
                self._volume.flush_in_background(sender)

    async def resend(self) -> None:
        """Copy everything, holes as zeroes, as soon as the mirror can be reached. Durable on return.

        Raises DeviceError.
        """
        self._dirty.mark_dirty(Extent(0, self._device.size))
        await asyncio.get_running_loop().run_in_executor(self._executor, self._dirty.persist)
        if self.record.disk_failure:
            self.record.disk_failure = ""
            self.record.save()
        if self.sender is not None:
            self.sender.end(PeerUnavailable("everything is being sent again"))

    async def verify(self, *, repair: bool, rate: int) -> AsyncGenerator[Comparison, None]:
        """Compare with the mirror; yields how far it is, and last the whole result.

        repair: send what differs again, by a new session; the iterator ends when that has begun.
        rate: bytes a second, at most; 0: unlimited. Raises Refused, PeerUnavailable.
        """
        sender, name = self.sender, self.name
        if sender is None or self.state is not PairState.IN_SYNC:
            raise Refused(f"volume {name!r} is not in sync with its mirror; there is nothing to compare yet")
        if self._verifying:
            raise Refused(f"volume {name!r} is being compared with its mirror already")
        self._verifying = True
        verifier = Verifier(self._device, self._volume, sender, self._executor, rate=rate)
        try:
            async for comparison in verifier.run():
                yield comparison
        finally:
            self._verifying = False
        different = verifier.comparison.different
        self.verified_ns = time.time_ns()
        self.mismatch_bytes = 0 if repair else sum(extent.length for extent in different)
        for extent in different:
            logger.error("mirror differs", extra={"volume": name, "offset": extent.offset, "length": extent.length})
            if repair:
                self._dirty.mark_dirty(extent)
        if repair and different:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._dirty.persist)
            sender.end(PeerUnavailable("the mirror differs; what differs is being sent again"))

    def _ended(self, sender: Sender, lost: asyncio.Future[Exception], error: Exception) -> None:
        if not isinstance(error, StillpointError):
            error = PeerUnavailable(f"the data link broke: {error}")
        self._volume.detach(sender, error)
        self._enter(PairState.DISCONNECTED, str(error))
        if not self._must_ask:
            self._sharing_changed()
        if not lost.done():
            lost.set_result(error)

    def _enter(self, state: PairState, detail: str) -> None:
        if (state, detail) == (self.state, self.detail):
            return
        level = logging.WARNING if state is PairState.DISCONNECTED else logging.INFO
        logger.log(level, "pair %s%s", state.value, f": {detail}" if detail else "", extra={"volume": self.name})
        if state is not self.state:
            self.since_ns = time.time_ns()
        self.state, self.detail = state, detail


def _marks(decision: Decision) -> bool:
    """Whether more has to be copied than the maps say."""
    return decision.by not in (None, By.BITMAP)
