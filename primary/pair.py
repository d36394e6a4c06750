"""A volume and its mirror: connect, bring the mirror up to date, notice when it goes, begin again.

Order of a session, each step only after the one before it has succeeded
1. OpenLink: the standby ends the session before, makes the new fence durable and gives out a token.
2. The data link is opened; the standby makes durable that it adopted the session, and acknowledges.
3. What has to be copied is marked dirty, durably; then the mirror's identity and the session are made durable.
4. If something has to be copied, it waits for its turn among the resyncs of the node. Then the volume is attached:
   every write from now on is sent too. RESYNC_BEGIN is sent if anything is dirty.
5. The dirty chunks are copied; then RESYNC_END: the standby flushes, makes durable that its mirror is whole, and says
   so. Only then is the pair in sync.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Executor
from typing import Protocol

from stillpoint.devices import BlockDevice
from stillpoint.errors import PeerUnavailable, ProtocolError, Refused, StillpointError
from stillpoint.extents import Extent
from stillpoint.link.base import Link

from .dirty_map import DirtyMap
from .handshake import Answer, Known, Plan, decide
from .mirrored_device import MirroredDevice
from .record import VolumeRecord
from .resync import Progress, resync
from .resync_limits import ResyncLimits
from .sender import Sender
from .throttle import Throttle
from .verify import Comparison, Verifier

logger = logging.getLogger(__name__)

_RETRY_FIRST_S = 0.2
_RETRY_MAX_S = 5.0
_BACKGROUND_FLUSH_S = 1.0
_EPOCH = 1


class PairState(enum.Enum):
    DISCONNECTED = "disconnected"
    SYNCING = "syncing"
    IN_SYNC = "in sync"


class OpenedLink(Protocol):
    """What OpenLink answered."""

    @property
    def answer(self) -> Answer: ...

    @property
    def session(self) -> int: ...

    async def connect(self, sender: Sender) -> Link:
        """Open the carrier and show the token. Raises PeerUnavailable."""
        ...


class Pair:
    """Runs one volume's sessions for as long as the volume is open."""

    def __init__(
        self,
        record: VolumeRecord,
        device: BlockDevice,
        dirty: DirtyMap,
        volume: MirroredDevice,
        executor: Executor,
        open_link: Callable[[VolumeRecord, int], Awaitable[OpenedLink]],
        *,
        peer_timeout_s: float,
        limits: ResyncLimits,
    ) -> None:
        """limits: of the node; the volume's own is `throttle`."""
        self.record = record
        self.throttle = Throttle(record.resync_rate)
        self._limits = limits
        self.state = PairState.DISCONNECTED
        self.since_ns = time.time_ns()
        self.detail = "not connected yet"
        self.progress: Progress | None = None
        self.sender: Sender | None = None
        self._device = device
        self._dirty = dirty
        self._volume = volume
        self._executor = executor
        self._open_link = open_link
        self._peer_timeout_s = peer_timeout_s
        self.verified_ns = 0
        self.mismatch_bytes = 0
        self._verifying = False

    async def run(self) -> None:
        """Until cancelled."""
        retry_s = _RETRY_FIRST_S
        while True:
            started = time.monotonic()
            try:
                await self._session()
            except StillpointError as error:
                self._enter(PairState.DISCONNECTED, str(error))
            if time.monotonic() - started > _RETRY_MAX_S:
                retry_s = _RETRY_FIRST_S
            await asyncio.sleep(retry_s)
            retry_s = min(retry_s * 2, _RETRY_MAX_S)

    async def _session(self) -> None:
        """One session, until it ends; always ends by raising."""
        if self.record.disk_failure:
            raise Refused(
                "the disk here failed a flush and may lack what the mirror has, so nothing is copied from it; promote "
                f"the standby, or let this disk count with `standbyctl mirror resync {self.record.name}`"
            )
        opened = await self._open_link(self.record, _EPOCH)
        lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        sender = Sender(
            epoch=_EPOCH,
            session=opened.session,
            lost=lambda error: self._ended(sender, lost, error),
        )
        sender.attach(await opened.connect(sender))
        try:
            await self._adopted(sender)
            plan = decide(
                Known(self.record.mirror_uuid, self.record.session, self._dirty.dirty_count > 0), opened.answer
            )
            await self._mark(plan)
            self.record.adopt(opened.answer.mirror_uuid, opened.session)
            watching = asyncio.ensure_future(self._watch(sender))
            try:
                async with self._slot(plan):
                    if sender.ended:
                        raise PeerUnavailable("the standby closed the data link")
                    self._attach(sender, plan)
                    await self._bring_up_to_date(sender, plan)
                raise await lost
            finally:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching
        finally:
            sender.end(PeerUnavailable("this node ended the session"))
            self.sender = None

    async def _adopted(self, sender: Sender) -> None:
        try:
            async with asyncio.timeout(self._peer_timeout_s):
                await sender.adopted.wait()
        except TimeoutError:
            raise PeerUnavailable("the standby did not take the data link in time") from None
        if sender.ended:
            raise PeerUnavailable("the standby closed the data link")

    async def _mark(self, plan: Plan) -> None:
        """Make dirty, durably, what has to be copied besides: from then on the map alone says what the mirror lacks.

        Writes that come meanwhile are dirty too, as for any mirror that is not attached.
        """
        if plan is Plan.FULL:
            self._dirty.mark_dirty(Extent(0, self._device.size))
        elif plan is Plan.FULL_SKIP_HOLES:
            for mapped in self._device.extents(0, self._device.size):
                if not mapped.hole:
                    self._dirty.mark_dirty(Extent(mapped.offset, mapped.length))
        if plan in (Plan.FULL, Plan.FULL_SKIP_HOLES):
            await asyncio.get_running_loop().run_in_executor(self._executor, self._dirty.persist)

    def _slot(self, plan: Plan) -> contextlib.AbstractAsyncContextManager[None]:
        """What has to be copied waits for its turn before it attaches: till then the mirror stays what it was."""
        if plan is Plan.NOTHING:
            return contextlib.nullcontext()
        return self._limits.slot(lambda: self._enter(PairState.DISCONNECTED, "waits for the resync of other volumes"))

    def _attach(self, sender: Sender, plan: Plan) -> None:
        self.sender = sender
        self._volume.attach(sender, self._dirty, lambda error: None)
        self.progress = Progress(self._dirty.dirty_bytes)
        logger.info(
            "standby attached: %s",
            plan.value,
            extra={"volume": self.record.name, "session": sender.session, "dirty_bytes": self._dirty.dirty_bytes},
        )

    async def _bring_up_to_date(self, sender: Sender, plan: Plan) -> None:
        if self._dirty.dirty_count or plan is not Plan.NOTHING:
            self._enter(PairState.SYNCING, plan.value)
            assert self.progress is not None
            sender.resync_begin()
            sender.push()
            throttles = (self.throttle, self._limits.total)
            await resync(self._device, self._dirty, self._volume, sender, self._executor, self.progress, throttles)
        sequence = sender.resync_end()
        self._volume.require(sender, sequence)
        sender.push()
        await sender.until(lambda watermarks: watermarks.flushed >= sequence)
        if self._dirty.dirty_count:
            raise ProtocolError("chunks became dirty while the resync ended")
        self._enter(PairState.IN_SYNC, "")

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
        sender, name = self.sender, self.record.name
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
        self._enter(PairState.DISCONNECTED, str(error))
        self._volume.detach(sender, error)
        if not lost.done():
            lost.set_result(error)

    def _enter(self, state: PairState, detail: str) -> None:
        if (state, detail) == (self.state, self.detail):
            return
        level = logging.WARNING if state is PairState.DISCONNECTED else logging.INFO
        logger.log(level, "pair %s%s", state.value, f": {detail}" if detail else "", extra={"volume": self.record.name})
        if state is not self.state:
            self.since_ns = time.time_ns()
        self.state, self.detail = state, detail
