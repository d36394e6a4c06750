"""What an NBD connection serves: the promise, and its plain implementation on a device."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from time import perf_counter
from typing import Protocol

from ..devices import BlockDevice
from ..errors import StillpointError
from ..extents import MappedExtent
from ..traffic import Traffic
from .constants import REQUEST_SIZE_MAX
from .errors import nbd_errno

_log = logging.getLogger(__name__)

# Writes of this many bytes and more leave the loop to others while they are copied into the page cache.
_THREAD_WRITE_SIZE = 1 << 20


class Replier(Protocol):
    """Whoever started a request; a connection."""

    def reply(self, cookie: int, errno: int) -> None:
        """The request is finished; 0 is success, other numbers are NBD's. Once per request, on the loop.

        May be called inside the call that started the request. Replies made in one turn of the loop travel together.
        """
        ...


class Export(Protocol):
    """A disk as NBD clients see it. All calls come from the loop, except `read_into`, which runs in threads.

    Ranges lie within `size` and are not empty; writes reach only exports that are not `read_only`.
    A request is either answered through its replier, or its call raises a StillpointError and has had no effect
    that was promised; never both.
    """

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def size(self) -> int:
        """Bytes. May grow; a connected client keeps the size it was told."""
        ...

    @property
    def read_only(self) -> bool: ...

    @property
    def rotational(self) -> bool: ...

    @property
    def multi_conn(self) -> bool:
        """Whether a flush on one connection covers the writes acknowledged on all of them."""
        ...

    @property
    def minimum_block(self) -> int: ...

    @property
    def preferred_block(self) -> int: ...

    @property
    def maximum_request(self) -> int:
        """Bytes of the largest read or write."""
        ...

    @property
    def traffic(self) -> Traffic:
        """What clients asked. The connections count requests and bytes, and how long reads took."""
        ...

    def try_read_into(self, offset: int, buffer: memoryview, /) -> bool:
        """Fill `buffer` if that needs no wait; False: use `read_into`."""
        ...

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        """Fill `buffer`. May wait; called in a thread."""
        ...

    def write(self, offset: int, payload: memoryview, owned: bool, fua: bool, replier: Replier, cookie: int, /) -> None:
        """Write `payload`. It is borrowed during the call, or the export's for good if `owned`.

        fua: reply when it is durable.
        """
        ...

    def trim(self, offset: int, length: int, fua: bool, replier: Replier, cookie: int, /) -> None: ...

    def write_zeroes(
        self, offset: int, length: int, may_trim: bool, fua: bool, replier: Replier, cookie: int, /
    ) -> None: ...

    def flush(self, replier: Replier, cookie: int, /) -> None:
        """Reply when everything replied to before this call, on any connection, is durable."""
        ...

    def extents(self, offset: int, length: int, /) -> Iterator[MappedExtent]:
        """The range as data and holes, in order and without gaps; read only as far as the client may be told."""
        ...

    def end_batch(self) -> None:
        """A connection has handed over all the requests that it had received."""
        ...

    def opened(self) -> None:
        """One more connection serves this export."""
        ...

    def closed(self) -> None:
        """One connection less, and none of its requests is running."""
        ...


class DeviceExport:
    """A plain device, unmirrored. Writes go to the page cache on the loop; whatever waits goes to `executor`.

    One flush runs at a time; those that come meanwhile share the next one.
    """

    rotational = False
    multi_conn = True
    minimum_block = 1
    preferred_block = 4096
    maximum_request = REQUEST_SIZE_MAX

    def __init__(
        self, name: str, device: BlockDevice, executor: Executor, *, read_only: bool = False, description: str = ""
    ) -> None:
        self.name = name
        self.description = description
        self.read_only = read_only or device.read_only
        self.connection_count = 0
        self.traffic = Traffic()
        self._device = device
        self._executor = executor
        self._flushing: list[tuple[Replier, int, float]] = []
        self._flush_next: list[tuple[Replier, int, float]] = []
        # Bound once: one call less on the hottest path.
        self.try_read_into = device.try_read_into
        self.read_into = device.read_into

    @property
    def size(self) -> int:
        return self._device.size

    def write(self, offset: int, payload: memoryview, owned: bool, fua: bool, replier: Replier, cookie: int, /) -> None:
        if owned and len(payload) >= _THREAD_WRITE_SIZE:
            self._in_thread(lambda: self._device.write(offset, (payload,)), fua, replier, cookie)
            return
        self._device.write(offset, (payload,))
        if fua:
            self.flush(replier, cookie)
        else:
            replier.reply(cookie, 0)

    def trim(self, offset: int, length: int, fua: bool, replier: Replier, cookie: int, /) -> None:
        self._in_thread(lambda: self._device.trim(offset, length), fua, replier, cookie)

    def write_zeroes(
        self, offset: int, length: int, may_trim: bool, fua: bool, replier: Replier, cookie: int, /
    ) -> None:
        self._in_thread(lambda: self._device.write_zeroes(offset, length, may_trim=may_trim), fua, replier, cookie)

    def flush(self, replier: Replier, cookie: int, /) -> None:
        self._flush_next.append((replier, cookie, perf_counter()))
        if not self._flushing:
            self._start_flush()

    def _start_flush(self) -> None:
        self._flushing, self._flush_next = self._flush_next, []
        run_in_thread(self._executor, self._device.flush, self._flushed)

    def _flushed(self, error: Exception | None) -> None:
        errno = 0 if error is None else nbd_errno(error)
        answered, self._flushing = self._flushing, []
        if self._flush_next:
            self._start_flush()
        now = perf_counter()
        for replier, cookie, began in answered:
            self.traffic.flush_latency.observe(now - began)
            replier.reply(cookie, errno)

    def _in_thread(self, work: Callable[[], None], fua: bool, replier: Replier, cookie: int) -> None:
        began = perf_counter()

        def done(error: Exception | None) -> None:
            self.traffic.write_latency.observe(perf_counter() - began)
            if error is not None:
                replier.reply(cookie, nbd_errno(error))
            elif fua:
                self.flush(replier, cookie)
            else:
                replier.reply(cookie, 0)

        run_in_thread(self._executor, work, done)

    def extents(self, offset: int, length: int, /) -> Iterator[MappedExtent]:
        return self._device.extents(offset, length)

    def end_batch(self) -> None:
        """Nothing waits for the end of a batch."""

    def opened(self) -> None:
        self.connection_count += 1

    def closed(self) -> None:
        self.connection_count -= 1


def run_in_thread(executor: Executor, work: Callable[[], None], done: Callable[[Exception | None], None]) -> None:
    """Run `work` in a thread, then `done` on this loop with the error it raised, or None."""
    loop = asyncio.get_running_loop()

    def run() -> None:
        failure: Exception | None = None
        try:
            work()
        except StillpointError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - an invariant broke in a thread; the request must still be answered
            _log.exception("a request failed unexpectedly")
            failure = error
        loop.call_soon_threadsafe(done, failure)

    executor.submit(run)
