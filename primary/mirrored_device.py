"""A volume as its NBD clients see it: every write goes to the local device and, in the same order, to the standby.

Invariants
- A chunk is marked in the dirty map before its write starts anywhere.
- Frames leave in the order in which the local device is written; the standby's content is always a state that the
  volume had (mode by mode a little earlier).
- WRITE, TRIM and WRITE_ZEROES are answered when the mode says so (`AckMode`), and never before the local write is done.
- FLUSH, FUA and every write of a durable volume are answered when a flush that started after the local write has
  finished here and, if a standby is attached, there. ASYNC waits for the local part only; its barrier is queued.
- When the standby goes away, what it may lack is dirty before any waiting request is answered.
- A request that failed here may have reached the standby: its range is dirty and the session ends, so that the resync
  brings the standby back to what this device holds.

A batch is all that one connection had sent: its frames go out with one system call, then the local writes are made
while they travel.
"""

from __future__ import annotations

import asyncio
import enum
import errno as errno_module
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from time import perf_counter

from stillpoint.devices import BlockDevice
from stillpoint.errors import DeviceError, StillpointError
from stillpoint.extents import Extent, MappedExtent
from stillpoint.link.frames import Watermarks
from stillpoint.nbd.constants import REQUEST_SIZE_MAX
from stillpoint.nbd.errors import nbd_errno
from stillpoint.nbd.export import Replier, run_in_thread
from stillpoint.traffic import Latency, Traffic

from .dirty_map import DirtyMap
from .sender import Sender

logger = logging.getLogger(__name__)


class AckMode(enum.Enum):
    """When a write is answered."""

    ASYNC = "async"  # done here, queued for the standby within a bound
    SYNC = "sync"  # done here, and the standby has it, in order
    DURABLE = "durable"  # durable on both


class _Request:
    """A write that waits for its acknowledgement."""

    __slots__ = ("began", "cookie", "errno", "latency", "replier", "sequence")

    def __init__(self, replier: Replier, cookie: int, began: float, latency: Latency) -> None:
        """began: when its batch had arrived; how long it took from there goes to `latency`."""
        self.replier = replier
        self.cookie = cookie
        self.began = began
        self.latency = latency
        self.sequence = 0
        self.errno = 0


def _answer(requests: Iterable[_Request]) -> None:
    """Those of one batch are observed together: looking for the right bucket costs more than the rest."""
    now = perf_counter()
    count, began, latency = 0, 0.0, None
    for request in requests:
        if request.began != began or request.latency is not latency:
            if latency is not None:
                latency.observe(now - began, count)
            count, began, latency = 0, request.began, request.latency
        count += 1
        request.replier.reply(request.cookie, request.errno)
    if latency is not None:
        latency.observe(now - began, count)


class _Flush:
    """One flush of both nodes, and the requests that it answers."""

    __slots__ = ("error", "here", "sequence", "there", "waiting")

    def __init__(self, waiting: list[_Request], sequence: int | None) -> None:
        """sequence: of the FLUSH frame; None: no standby is attached."""
        self.waiting = waiting
        self.sequence = sequence
        self.here = False
        self.there = sequence is None
        self.error = 0


# What the local device still has to do for the batch: the work, the request that reports its failure, and the range.
_LocalWork = tuple[Callable[[], None], _Request, int, int]


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
        dirty: DirtyMap,
        executor: Executor,
        *,
        mode: AckMode,
        async_queue_bytes: int = 32 << 20,
    ) -> None:
        self.name = name
        self.description = f"volume {name}"
        self.mode = mode
        self.connection_count = 0
        self.traffic = Traffic()
        self.failure = ""
        # The range that a resync is reading just now; a write into it sets `read_disturbed`.
        self.reading: Extent | None = None
        self.read_disturbed = False
        self.size = device.size  # bytes; set again when the volume has grown on both nodes
        self._device = device
        self._dirty = dirty
        self._executor = executor
        self._async_queue_bytes = async_queue_bytes
        self._sender: Sender | None = None
        self._detached: Callable[[Exception], None] | None = None
        # Bound once: one call less for each read.
        self.try_read_into = device.try_read_into
        self.read_into = device.read_into
        self._began = 0.0  # when the batch in hand had arrived; 0.0: none is in hand
        self._local: list[_LocalWork] = []
        self._answer_now: list[_Request] = []
        self._pending: deque[_Request] = deque()
        self._flush_waiting: list[_Request] = []
        self._flush: _Flush | None = None

    # --- reading

    def extents(self, offset: int, length: int, /) -> Iterator[MappedExtent]:
        return self._device.extents(offset, length)

    # --- changing

    def write(self, offset: int, payload: memoryview, owned: bool, fua: bool, replier: Replier, cookie: int, /) -> None:
        length = len(payload)
        self._dirty.mark(offset, length)
        if self.reading is not None:
            self._disturb(offset, length)
        request = _Request(replier, cookie, self._began or self._begin_batch(), self.traffic.write_latency)
        if self._sender is not None:
            request.sequence = self._sender.write(offset, payload, owned=owned)
        device = self._device
        self._local.append((lambda: device.write(offset, (payload,)), request, offset, length))
        self._await_answer(request, fua)

    def trim(self, offset: int, length: int, fua: bool, replier: Replier, cookie: int, /) -> None:
        self.write_zeroes(offset, length, True, fua, replier, cookie)

    def write_zeroes(
        self, offset: int, length: int, may_trim: bool, fua: bool, replier: Replier, cookie: int, /
    ) -> None:
        self._dirty.mark(offset, length)
        if self.reading is not None:
            self._disturb(offset, length)
        request = _Request(replier, cookie, self._began or self._begin_batch(), self.traffic.write_latency)
        if self._sender is not None:
            request.sequence = self._sender.zero(offset, length, may_trim=may_trim)
        device = self._device
        # A trim here is defined to read back as zeroes, as write_zeroes is; only the space differs.
        work = (lambda: device.trim(offset, length)) if may_trim else (lambda: _zero(device, offset, length))
        self._local.append((work, request, offset, length))
        self._await_answer(request, fua)

    def flush(self, replier: Replier, cookie: int, /) -> None:
        began = self._began or self._begin_batch()
        self._flush_waiting.append(_Request(replier, cookie, began, self.traffic.flush_latency))

    def _await_answer(self, request: _Request, fua: bool) -> None:
        if fua or self.mode is AckMode.DURABLE:
            self._flush_waiting.append(request)
        elif self._sender is None or (
            self.mode is AckMode.ASYNC and self._sender.in_flight_bytes < self._async_queue_bytes
        ):
            self._answer_now.append(request)
        else:
            self._pending.append(request)

    def _begin_batch(self) -> float:
        self._began = perf_counter()
        return self._began

    def end_batch(self) -> None:
        self._began = 0.0
        if self._sender is not None:
            self._sender.push()
        if self._local:
            self._write_locally()
        if self._answer_now:
            answered, self._answer_now = self._answer_now, []
            _answer(answered)
        if self._flush_waiting and self._flush is None:
            self._start_flush()

    def _write_locally(self) -> None:
        batch, self._local = self._local, []
        failed: StillpointError | None = None
        for work, request, offset, length in batch:
            try:
                work()
            except StillpointError as error:
                request.errno = nbd_errno(error)
                failed = error
                self._dirty.mark_dirty(Extent(offset, length))
                logger.error("local write failed: %s", error, extra={"volume": self.name, "offset": offset})
        if failed is not None and self._sender is not None:
            self._sender.end(DeviceError(f"the primary could not write what it had sent: {failed}", 0))

    def _disturb(self, offset: int, length: int) -> None:
        reading = self.reading
        if reading is not None and offset < reading.end and reading.offset < offset + length:
            self.read_disturbed = True

    # --- flushing

    def _start_flush(self) -> None:
        """One at a time: the requests that come meanwhile share the next one."""
        waiting, self._flush_waiting = self._flush_waiting, []
        sequence = self._send_flush()
        self._flush = flush = _Flush(waiting, sequence)
        run_in_thread(self._executor, self._device.flush, lambda error: self._flushed_here(flush, error))

    def _send_flush(self) -> int | None:
        if self._sender is None:
            return None
        self._dirty.begin_flush()
        sequence = self._sender.flush()
        self._sender.push()
        return sequence

    def start_background_flush(self) -> None:
        """Let the standby make durable what it has, so that little is sent again when it restarts."""
        if self._flush is None and self._sender is not None and self._dirty.unflushed_bytes:
            self._flush = flush = _Flush([], self._send_flush())
            flush.here = True

    def _flushed_here(self, flush: _Flush, error: Exception | None) -> None:
        flush.here = True
        if error is not None:
            flush.error = nbd_errno(error) or errno_module.EIO
            self.failure = str(error)
            logger.error("flush failed: %s", error, extra={"volume": self.name})
        if self.mode is AckMode.ASYNC:
            self._answer_flush(flush)
        self._finish_flush()

    def _finish_flush(self) -> None:
        flush = self._flush
        if flush is None or not (flush.here and flush.there):
            return
        self._flush = None
        self._answer_flush(flush)
        if self._flush_waiting:
            self._start_flush()

    def _answer_flush(self, flush: _Flush) -> None:
        answered, flush.waiting = flush.waiting, []
        if flush.error:
            for request in answered:
                request.errno = request.errno or flush.error
        _answer(answered)

    # --- the standby

    @property
    def waiting_count(self) -> int:
        """Requests that wait for the standby."""
        return len(self._pending) + len(self._flush_waiting)

    def attach(self, sender: Sender, detached: Callable[[Exception], None]) -> None:
        """From now on every change goes to this sender too. `detached` is called once when that ends."""
        assert self._sender is None
        self._dirty.connect()
        self._sender = sender
        self._detached = detached

    def acknowledged(self, watermarks: Watermarks) -> None:
        """The sender's watermarks moved."""
        if self._pending and self._pending[0].sequence <= watermarks.applied:
            _answer(self._take_applied(watermarks.applied))
        flush = self._flush
        if (
            flush is not None
            and not flush.there
            and flush.sequence is not None
            and flush.sequence <= watermarks.flushed
        ):
            flush.there = True
            self._dirty.flushed()
            self._finish_flush()

    def _take_applied(self, applied: int) -> Iterator[_Request]:
        pending = self._pending
        while pending and pending[0].sequence <= applied:
            yield pending.popleft()

    def detach(self, error: Exception) -> None:
        """The standby is gone: go on without it, and remember what it lacks."""
        if self._sender is None:
            return
        self._sender = None
        self._dirty.disconnect()
        pending, self._pending = self._pending, deque()
        _answer(pending)
        if self._flush is not None:
            self._flush.there = True
            self._finish_flush()
        detached, self._detached = self._detached, None
        if detached is not None:
            detached(error)

    async def barrier(self) -> None:
        """Until a flush on both nodes of everything answered before has finished. Raises DeviceError."""
        waiter = _Waiter()
        self.flush(waiter, 0)
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
