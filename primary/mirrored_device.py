"""A volume as its NBD clients see it: every write goes to the local device and, in the same order, to every standby.

Invariants
- A chunk is marked in the map of every standby, attached or not, before its write starts anywhere, and the extents of
  a write are in the log of hot extents before that (`write_intent.py`): a write that has to wait for the log is held
  back whole, with a copy of its payload.
- Frames leave in the order in which the local device is written; a standby's content is always a state that the
  volume had (mode by mode a little earlier).
- WRITE, TRIM and WRITE_ZEROES are answered when the mode says so (`AckMode`), and never before the local write is done.
- FLUSH, FUA and every write of a durable volume are answered when a flush that started after the local write has
  finished here and on every required standby. ASYNC waits for the local part only; its barriers are queued.
- A standby is waited for (`require`) from the frame on that ends its resync. One that is still being brought up to date
  holds a write back only while its queue is long.
- When a standby goes away, what it may lack is dirty before any request that waited for it is answered, if the policy
  has it answered at all (`gate.py`). The others never notice.
- A request that failed here may have reached the standbys: its range is dirty and their sessions end, so that the
  resync brings them back to what this device holds.

A batch is all that one connection had sent: its frames go out with one system call for each standby, then the local
writes are made while they travel.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from time import perf_counter

from stillpoint.devices import BlockDevice
from stillpoint.errors import DeviceError, PeerUnavailable, StillpointError
from stillpoint.extents import Extent, MappedExtent, split
from stillpoint.nbd.constants import REQUEST_SIZE_MAX, Errno
from stillpoint.nbd.errors import nbd_errno
from stillpoint.nbd.export import Replier
from stillpoint.traffic import Latency, Traffic

from .attached import AttachedStandby
from .dirty_map import DirtyMap
from .flusher import Flusher
from .gate import Gate, LossPolicy
from .hot_extents import EXTENT_SHIFT, USED, HotExtents
from .requests import PartedReplier, Request, answer
from .rescue import ReadRescue, Watched
from .sender import Sender
from .spin import Spin
from .write_intent import WriteIntent

logger = logging.getLogger(__name__)

# What may be in flight to a standby that is not in sync yet, before clients are slowed down to its pace.
_SYNCING_QUEUE_BYTES = 1 << 20


class AckMode(enum.Enum):
    """When a write is answered."""

    ASYNC = "async"  # done here, queued for the standbys within a bound
    SYNC = "sync"  # done here, and every standby in sync has it, in order
    DURABLE = "durable"  # durable on all of them


class CongestionPolicy(enum.Enum):
    """What happens when the queue of an asynchronous volume is full."""

    BLOCK = "block"  # writes wait for room
    DETACH = "detach"  # the standby is detached, and gets what it lacks when it attaches again


# What the local device still has to do for the batch: the work, the request that reports its failure, and the range.
_LocalWork = tuple[Callable[[], None], Request, int, int]


class MirroredDevice:
    """Implements `stillpoint.nbd.export.Export`. Everything but `read_into` runs on the loop."""

    rotational = False
    multi_conn = True  # one object serves every connection, and its flush covers whatever was answered before
    minimum_block = 1
    preferred_block = 4096
    maximum_request = REQUEST_SIZE_MAX
    read_only = False

    def __init__(
        self,
        name: str,
        device: BlockDevice,
        maps: Sequence[DirtyMap],
        executor: Executor,
        *,
        mode: AckMode,
        on_standby_loss: LossPolicy = LossPolicy.CONTINUE,
        congestion: CongestionPolicy = CongestionPolicy.BLOCK,
        intent: WriteIntent | None = None,
        spin: Spin | None = None,
        async_queue_bytes: int = 32 << 20,
        congested: Callable[[], bool] | None = None,
    ) -> None:
        """maps: one for each standby that the volume has, whether or not it is attached.
        intent: notes which extents are written to, for all maps; None: a power loss makes everything dirty.
        spin: of the node; None: acknowledgements come by the loop.
        congested: the device holds as much in memory as it may: a write is answered after a flush. None: it never is.
        """
        self.name = name
        self.description = f"volume {name}"
        self.mode = mode
        self.congestion = congestion
        self.connection_count = 0
        self.traffic = Traffic()
        self.failure = ""
        self.size = device.size  # bytes; set again when the volume has grown on all nodes
        self._device = device
        self._maps = tuple(maps)
        self._intent = intent
        self._spin = spin
        self._hot = HotExtents(device.size).states if intent is None else intent.extents.states
        if intent is not None:
            intent.released = self.end_batch
            intent.failed = self._fail
        self._async_queue_bytes = async_queue_bytes
        self._congested = congested
        # Called before anything is acknowledged that a standby lacks which could be taken for up to date. When it
        # raises DeviceError, nothing is written or acknowledged.
        self.unshared: Callable[[], None] | None = None
        self._standbys: tuple[AttachedStandby, ...] = ()
        self._watched: list[Watched] = []
        # Bound once: one call less for each read.
        self.try_read_into = device.try_read_into
        self.rescue = ReadRescue(name, device, lambda: self._standbys, self.watching)
        self.read_into = self.rescue.read_into
        self._began = 0.0  # when the batch in hand had arrived; 0.0: none is in hand
        self._local: list[_LocalWork] = []
        self._answer_now: list[Request] = []
        self.gate = Gate(on_standby_loss, opened=lambda: self._flusher.begin())
        self._flusher = Flusher(name, device, executor, self.gate, self._disk_failed)
        self.disk_failed: Callable[[str], None] = self._fail  # a flush failed: called before that is answered

    # --- reading

    def extents(self, offset: int, length: int, /) -> Iterator[MappedExtent]:
        return self._device.extents(offset, length)

    @contextlib.contextmanager
    def watching(self, extent: Extent) -> Iterator[Watched]:
        """While it lasts, a write into `extent` is noted as `disturbed`."""
        watched = Watched(extent)
        self._watched.append(watched)
        try:
            yield watched
        finally:
            self._watched.remove(watched)

    def _disturb(self, offset: int, length: int) -> None:
        for watched in self._watched:
            if offset < watched.end and watched.offset < offset + length:
                watched.disturbed = True

    # --- changing

    def write(
        self,
        offset: int,
        payload: memoryview,
        owned: bool,
        fua: bool,
        replier: Replier,
        cookie: int,
        /,
        held_since: float = 0.0,
    ) -> None:
        """held_since: not 0.0: it was held back, its batch began then, and its extents are hot now."""
        if self.gate.refusing:
            replier.reply(cookie, Errno.EIO)
            return
        if self.unshared is not None and (refusal := self._go_on_alone()):
            replier.reply(cookie, refusal)
            return
        length = len(payload)
        began = held_since or self._began or self._begin_batch()
        extent = offset >> EXTENT_SHIFT
        if (self._hot[extent] != USED or (offset + length - 1) >> EXTENT_SHIFT != extent) and not held_since:
            intent = self._intent
            if intent is not None and not intent.may_start(offset, length):
                kept = payload if owned else memoryview(bytes(payload))
                intent.hold(
                    offset,
                    length,
                    lambda: self.write(offset, kept, True, fua, replier, cookie, began),
                    lambda errno: replier.reply(cookie, errno),
                )
                return
        for dirty in self._maps:
            dirty.mark(offset, length)
        if self._watched:
            self._disturb(offset, length)
        request = Request(replier, cookie, began, self.traffic.write_latency)
        flushed = fua or self.mode is AckMode.DURABLE or (self._congested is not None and self._congested())
        for standby in self._standbys:
            sequence = standby.sender.write(offset, payload, owned=owned)
            if not flushed:
                standby.hold_back(request, sequence)
        device = self._device
        self._local.append((lambda: device.write(offset, (payload,)), request, offset, length))
        self._answer_after(request, flushed)

    def trim(self, offset: int, length: int, fua: bool, replier: Replier, cookie: int, /) -> None:
        self.write_zeroes(offset, length, True, fua, replier, cookie)

    def write_zeroes(
        self,
        offset: int,
        length: int,
        may_trim: bool,
        fua: bool,
        replier: Replier,
        cookie: int,
        /,
        held_since: float = 0.0,
    ) -> None:
        """held_since: as for `write`."""
        if self.gate.refusing:
            replier.reply(cookie, Errno.EIO)
            return
        began = held_since or self._began or self._begin_batch()
        if self.unshared is not None and (refusal := self._go_on_alone()):
            replier.reply(cookie, refusal)
            return
        intent = self._intent
        if intent is not None and not held_since:
            if length > intent.part_size:
                parts = list(split(Extent(offset, length), limit=intent.part_size))
                whole = PartedReplier(replier, len(parts))
                for part in parts:
                    self.write_zeroes(part.offset, part.length, may_trim, fua, whole, cookie)
                return
            if not intent.may_start(offset, length):
                intent.hold(
                    offset,
                    length,
                    lambda: self.write_zeroes(offset, length, may_trim, fua, replier, cookie, began),
                    lambda errno: replier.reply(cookie, errno),
                )
                return
        for dirty in self._maps:
            dirty.mark(offset, length)
        if self._watched:
            self._disturb(offset, length)
        request = Request(replier, cookie, began, self.traffic.write_latency)
        flushed = fua or self.mode is AckMode.DURABLE or (self._congested is not None and self._congested())
        for standby in self._standbys:
            sequence = standby.sender.zero(offset, length, may_trim=may_trim)
            if not flushed:
                standby.hold_back(request, sequence)
        device = self._device
        # A trim here is defined to read back as zeroes, as write_zeroes is; only the space differs.
        work = (lambda: device.trim(offset, length)) if may_trim else (lambda: _zero(device, offset, length))
        self._local.append((work, request, offset, length))
        self._answer_after(request, flushed)

    def flush(self, replier: Replier, cookie: int, /) -> None:
        began = self._began or self._begin_batch()
        lacking = self.unshared is not None and any(dirty.dirty_count or dirty.unflushed_bytes for dirty in self._maps)
        if lacking and (refusal := self._go_on_alone()):
            replier.reply(cookie, refusal)
            return
        self._flusher.waiting.append(Request(replier, cookie, began, self.traffic.flush_latency))

    def _answer_after(self, request: Request, flushed: bool) -> None:
        if flushed:
            self._flusher.waiting.append(request)
            return
        if self.gate.closed:
            self.gate.withhold(request)
        if not request.remaining:
            self._answer_now.append(request)

    def _begin_batch(self) -> float:
        self._began = perf_counter()
        return self._began

    def _go_on_alone(self) -> int:
        """0, or the errno of whatever would be acknowledged by this node alone now."""
        assert self.unshared is not None
        try:
            self.unshared()
        except DeviceError as error:
            self._fail(str(error))
            return error.errno or Errno.EIO
        return 0

    def end_batch(self) -> None:
        self._began = 0.0
        for standby in self._standbys:
            standby.sender.push()
        if self._local:
            self._write_locally()
        if self._answer_now:
            answered, self._answer_now = self._answer_now, []
            answer(answered)
        if self._flusher.waiting:
            self._flusher.begin()
        if self.congestion is CongestionPolicy.DETACH and self.mode is AckMode.ASYNC:
            self._detach_congested()
        if self._intent is not None:
            self._intent.batch_ended()
        if self._spin is not None and len(self._standbys) == 1:
            self._look_for_answer(self._standbys[0], self._spin)

    def _look_for_answer(self, standby: AttachedStandby, spin: Spin) -> None:
        pending = standby.pending
        if len(pending) != 1:
            if pending:
                spin.crowded()
        elif spin.pays(pending[0][1].replier):
            spin.done(came=standby.sender.poll(spin.limit_s))

    def _fail(self, reason: str) -> None:
        """For an operator; requests report their own errors."""
        self.failure = self.failure or reason

    def _disk_failed(self, reason: str) -> None:
        self._fail(reason)
        self.disk_failed(reason)

    def grow(self, size: int) -> None:
        """All nodes have room for `size` bytes."""
        if self._intent is not None:
            self._intent.extents.grow(size)
            self._hot = self._intent.extents.states
        self.size = size

    def _write_locally(self) -> None:
        batch, self._local = self._local, []
        failed: StillpointError | None = None
        for work, request, offset, length in batch:
            try:
                work()
            except StillpointError as error:
                request.errno = nbd_errno(error)
                failed = error
                self.gate.failed(request)
                for dirty in self._maps:
                    dirty.mark_dirty(Extent(offset, length))
                logger.error("local write failed: %s", error, extra={"volume": self.name, "offset": offset})
        if failed is not None:
            for standby in self._standbys:
                standby.sender.end(DeviceError(f"the primary could not write what it had sent: {failed}", 0))

    # --- the standbys

    @property
    def withheld_count(self) -> int:
        """Requests that wait for the gate."""
        return self.gate.withheld_count + (len(self._flusher.waiting) if self.gate.closed else 0)

    @property
    def waiting_count(self) -> int:
        """Requests that wait for a standby."""
        return sum(len(standby.pending) for standby in self._standbys) + len(self._flusher.waiting)

    def attach(self, sender: Sender, dirty: DirtyMap, detached: Callable[[Exception], None]) -> None:
        """From now on every change goes to this sender too. `detached` is called once when that ends."""
        assert dirty in self._maps
        assert all(standby.dirty is not dirty for standby in self._standbys)
        standby = AttachedStandby(
            sender, dirty, detached=detached, moved=self._flusher.moved, joined=self._standbys_changed
        )
        self._weigh(standby)
        self._standbys = self._flusher.standbys = (*self._standbys, standby)

    def require(self, sender: Sender, sequence: int) -> None:
        """Frame `sequence`, which was just sent, ends this sender's resync: writes wait for it from now on."""
        standby = self._attached(sender)
        if standby is not None:
            standby.joining, standby.required = sequence, True
            self._weigh(standby)

    def is_required(self, sender: Sender) -> bool:
        """Whether it counts as holding what is acknowledged: in sync, or about to be."""
        standby = self._attached(sender)
        return standby is not None and standby.required

    def set_mode(self, mode: AckMode) -> None:
        """For every write from now on."""
        self.mode = mode
        for standby in self._standbys:
            self._weigh(standby)

    def _weigh(self, standby: AttachedStandby) -> None:
        """What the mode means for this standby."""
        asynchronous = self.mode is AckMode.ASYNC
        standby.awaited = standby.required and not asynchronous
        standby.queue_bytes = self._async_queue_bytes if asynchronous else _SYNCING_QUEUE_BYTES

    def _attached(self, sender: Sender) -> AttachedStandby | None:
        return next((standby for standby in self._standbys if standby.sender is sender), None)

    def flush_in_background(self, sender: Sender) -> None:
        """Let this standby make durable what it has, so that little is sent again when it restarts."""
        standby = self._attached(sender)
        if standby is not None:
            standby.flush_in_background()

    def detach(self, sender: Sender, error: Exception) -> None:
        """This standby is gone: go on without it as the policy says, and remember what it lacks.

        `detached` of `attach` is called before anything is answered: it may close the gate.
        """
        standby = self._attached(sender)
        if standby is None:
            return
        self._standbys = self._flusher.standbys = tuple(other for other in self._standbys if other is not standby)
        standby.dirty.disconnect()
        standby.detached(error)
        self._standbys_changed()
        self.gate.settle(standby.take_pending())
        self._flusher.lost(standby)

    def _standbys_changed(self) -> None:
        self.gate.standbys_changed(alone=not any(standby.in_sync for standby in self._standbys))

    def _detach_congested(self) -> None:
        for standby in self._standbys:
            if standby.required and standby.sender.in_flight_bytes >= standby.queue_bytes:
                standby.sender.end(PeerUnavailable("its queue is full; what it lacks is remembered"))

    async def barrier(self) -> None:
        """Until a flush on all nodes of everything answered before has finished. Raises DeviceError."""
        waiter = _Waiter()
        self._flusher.waiting.append(Request(waiter, 0, perf_counter(), Latency()))  # no client's, so not their latency
        self.end_batch()
        errno = await waiter.result
        if errno:
            raise DeviceError(f"volume {self.name}: {self.failure or 'flush failed'}", errno)

    def opened(self) -> None:
        self.connection_count += 1

    def closed(self) -> None:
        self.connection_count -= 1


def _zero(device: BlockDevice, offset: int, length: int) -> None:
    device.write_zeroes(offset, length, may_trim=False)


class _Waiter:
    """A replier for requests of our own."""

    def __init__(self) -> None:
        self.result: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def reply(self, cookie: int, errno: int) -> None:
        if not self.result.done():
            self.result.set_result(errno)
