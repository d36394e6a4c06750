"""A stream socket driven by the event loop, without copies: the carrier of NBD and of the data link.

asyncio's transports copy what does not fit the socket buffer and hand out data in pieces of their own choosing. A
Channel receives into one large buffer, shows its owner everything that has arrived, and sends a whole batch of buffers
with one system call.

Invariants
- `Receiver` calls happen on the loop, one at a time, never from inside `send`, `flush`, `close` or `abort`.
- Bytes are sent in the order in which they were queued, all of them or, after `closed`, none further.
- `pending_bytes` counts what is queued and not yet taken by the socket. The owner bounds it: it stops making data when
  `congested` is true, and goes on at `drained`.
- A buffer given to `send` is borrowed until the next `flush` returns; one given to `send_owned` belongs to the channel.

TLS: give it a `TlsSocket` whose handshake is complete (`tls.py`).
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Protocol

from .errors import ProtocolError
from .tls_socket import SEND_SIZE, TlsSocket

Buffer = bytes | bytearray | memoryview

# One sendmsg takes at most IOV_MAX buffers.
_IOV_MAX = 1024
# Turns of the receive loop before other channels of the process get theirs.
_RECEIVE_TURNS = 4


class Receiver(Protocol):
    """The owner of a channel."""

    def received(self, data: memoryview, /) -> int:
        """All bytes that have arrived and are not consumed yet. Returns how many are consumed now.

        `data` is borrowed: it is valid only during the call. What is not consumed is shown again with more behind it.
        Raising ProtocolError (or any StillpointError) aborts the channel with it.
        """
        ...

    def drained(self) -> None:
        """The channel was congested and no longer is."""
        ...

    def closed(self, error: Exception | None) -> None:
        """The last call, made once. None: ended in order, by the peer or by `close`."""
        ...


class _Nobody:
    """Owns a channel that has ended."""

    def received(self, data: memoryview, /) -> int:
        return len(data)

    def drained(self) -> None: ...

    def closed(self, error: Exception | None) -> None: ...


_NOBODY = _Nobody()
_NOTHING = memoryview(b"")


class Channel:
    """One connected stream socket. Create it on the running loop, then `start` it."""

    def __init__(
        self,
        sock: socket.socket | TlsSocket,
        receiver: Receiver,
        *,
        receive_size: int = 256 * 1024,
        send_limit: int = 4 * 1024 * 1024,
    ) -> None:
        """`receive_size`: bytes of the receive buffer, and so the largest message that `received` can ask to see whole.

        `send_limit`: pending bytes above which the channel counts as congested.
        """
        # One of the two is None. A plain socket is asked without a detour on the hot path.
        self._tls = sock if isinstance(sock, TlsSocket) else None
        self._plain = sock if isinstance(sock, socket.socket) else None
        if self._plain is not None:
            self._plain.setblocking(False)
        self._recv_into: Callable[[memoryview], int] = sock.recv_into
        self._close_socket = sock.close
        self._fd = sock.fileno()
        # May be replaced inside `received`, when a handshake hands the channel to its real owner.
        self.receiver = receiver
        # While `in_turn`, the socket is asked for more after `received` returns. An owner may hold its answers until
        # `turn_ended` is called, and so send those of several receptions at once.
        self.in_turn = False
        self.turn_ended: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray(receive_size)
        self._view = memoryview(self._buffer)
        self._start = 0  # the unconsumed bytes are buffer[start:end]
        self._end = 0
        self._fill_view: memoryview | None = None
        self._fill_then: Callable[[], None] | None = None
        self._queue: deque[Buffer] = deque()
        self._borrowed_from = 0  # queue entries from this index on are borrowed
        self.pending_bytes = 0
        self._send_limit = send_limit
        self._was_congested = False
        self._reading = False
        self._paused = False
        self._in_received = False
        self._writing = False
        self._closing = False
        self._dead = False
        self._close_timer: asyncio.TimerHandle | None = None

    # --- receiving

    def start(self) -> None:
        self._want_read(True)
        if self._tls is not None:
            self._transmit()
            if self._tls.pending:  # it came together with the end of the handshake: the socket will not say so again
                self._loop.call_soon(self._read_on)

    def pause_reading(self) -> None:
        """Show nothing more to the receiver until `resume_reading`; the peer is pushed back by its full socket."""
        self._paused = True
        self._want_read(False)

    def resume_reading(self) -> None:
        """Go on; bytes that are already buffered are shown soon, without waiting for more."""
        if not self._paused or self._dead:
            return
        self._paused = False
        self._want_read(True)
        if self._start < self._end or (self._tls and self._tls.pending):
            self._loop.call_soon(self._resumed)

    def fill(self, buffer: memoryview, then: Callable[[], None]) -> None:
        """Let the bytes after those that this call of `received` consumes go straight into `buffer`, then call `then`.

        For payloads too large to be worth a second copy. Call it inside `received`, once. Nothing else is shown
        before the buffer is full. If the channel ends first, `then` is never called.
        """
        assert self._in_received and self._fill_view is None
        assert len(buffer) > 0
        self._fill_view = buffer
        self._fill_then = then

    def _resumed(self) -> None:
        if not self._paused and not self._dead and not self._closing:
            self._show()
            if self._tls and not self._dead and self._tls.pending:
                self._readable()

    def _readable(self) -> None:
        self.in_turn = True
        try:
            self._receive()
        finally:
            self.in_turn = False
            if self.turn_ended is not None and not self._dead:
                self.turn_ended()

    def _receive(self) -> None:
        for _ in range(_RECEIVE_TURNS):
            fill = self._fill_view
            if fill is not None:
                target = fill
            else:
                if not self._make_room():
                    self._show()  # reading was resumed before what lay in the buffer could be shown
                    if self._paused or self._dead or self._closing or self._fill_view is not None:
                        return
                    if not self._make_room():
                        self._end_with(ProtocolError("the peer sent a message larger than the receive buffer"))
                        return
                target = self._view[self._end :]
            try:
                count = self._recv_into(target)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._end_with(error)
                return
            if count == 0:
                self._end_with(None)
                return
            if fill is not None:
                self._filled(count)
            else:
                self._end += count
                self._show()
            if self._dead or self._closing or self._paused:
                return
        # uvloop reports a reset that comes together with data once, and then never again: only a socket that said it
        # is empty may be left to the loop.
        self._loop.call_soon(self._read_on)

    def poll(self, limit_s: float) -> bool:
        """Look for bytes again and again instead of waiting for the loop, and show what comes first.

        Blocks the loop, for at most `limit_s`. True: something came. Not for use inside this channel's `received`.
        """
        if self._paused or self._dead or self._closing or self._fill_view is not None or not self._make_room():
            return False
        assert not self._in_received
        target = self._view[self._end :]
        deadline = perf_counter() + limit_s
        while True:
            try:
                count = self._recv_into(target)
                break
            except (BlockingIOError, InterruptedError):
                if perf_counter() > deadline:
                    return False
            except OSError as error:
                self._end_with(error)
                return True
        if count:
            self._end += count
            self._show()
            self._loop.call_soon(self._read_on)  # as after every reception that did not empty the socket
        else:
            self._end_with(None)
        return True

    def _read_on(self) -> None:
        if self._reading:
            self._readable()

    def _make_room(self) -> bool:
        """Keep the free part of the buffer at its end; unconsumed bytes are a partial message, so short."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start and (self._end == len(self._buffer) or self._start >= len(self._buffer) // 2):
            rest = bytes(self._view[self._start : self._end])
            self._view[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        return self._end < len(self._buffer)

    def _filled(self, count: int) -> None:
        assert self._fill_view is not None
        self._fill_view = self._fill_view[count:]
        if not len(self._fill_view):
            self._finish_fill()
            if self._start < self._end:
                self._show()

    def _finish_fill(self) -> None:
        then = self._fill_then
        self._fill_view = None
        self._fill_then = None
        assert then is not None
        try:
            then()
        except Exception as error:  # noqa: BLE001 - the owner's failure ends its channel, not the loop
            self._end_with(error)

    def _show(self) -> None:
        """Show the unconsumed bytes to the receiver until it has no use for what is there."""
        while self._start < self._end and not (self._paused or self._dead or self._closing):
            self._in_received = True
            try:
                consumed = self.receiver.received(self._view[self._start : self._end])
            except Exception as error:  # noqa: BLE001 - the owner's failure ends its channel, not the loop
                self._end_with(error)
                return
            finally:
                self._in_received = False
            self._start += consumed
            if self._fill_view is None:
                # A receiver that consumed something but not all stopped at a partial message, unless it paused.
                return
            have = min(len(self._fill_view), self._end - self._start)
            self._fill_view[:have] = self._view[self._start : self._start + have]
            self._start += have
            self._fill_view = self._fill_view[have:]
            if len(self._fill_view):
                return
            self._finish_fill()

    # --- sending

    @property
    def congested(self) -> bool:
        return self.pending_bytes > self._send_limit

    def send(self, *buffers: Buffer) -> None:
        """Queue buffers that stay the caller's: `flush` before changing them."""
        if self._dead or self._closing:
            return
        self._enqueue(buffers)

    def send_owned(self, *buffers: Buffer) -> None:
        """Queue buffers that the caller gives up for good; they are never copied."""
        if self._dead or self._closing:
            return
        if self._borrowed_from < len(self._queue):
            self._own()
        self._enqueue(buffers)
        self._borrowed_from = len(self._queue)

    def _enqueue(self, buffers: tuple[Buffer, ...]) -> None:
        for buffer in buffers:
            size = len(buffer)
            if size:  # an empty one would never be seen to leave
                self.pending_bytes += size
                self._queue.append(buffer)

    def flush(self) -> None:
        """Send what the socket takes now; the rest follows by itself. Borrowed buffers are the caller's again."""
        if self._dead:
            return
        if self._queue and not self._writing:
            self._transmit()
        if self._borrowed_from < len(self._queue):
            self._own()
        if self.pending_bytes > self._send_limit:
            self._was_congested = True

    def _own(self) -> None:
        """Copy the borrowed rest of the queue."""
        kept = self._borrowed_from
        borrowed = [self._queue.pop() for _ in range(len(self._queue) - kept)]
        borrowed.reverse()
        self._queue.append(b"".join(borrowed))
        self._borrowed_from = len(self._queue)

    def _transmit(self) -> None:
        queue = self._queue
        try:
            while queue:
                sent = self._send_some()
                self.pending_bytes -= sent
                while sent:
                    size = len(queue[0])
                    if sent < size:
                        queue[0] = memoryview(queue[0])[sent:]
                        break
                    sent -= size
                    queue.popleft()
                    if self._borrowed_from:
                        self._borrowed_from -= 1
            if self._tls:
                self._tls.flush()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._end_with(error)
            return
        waiting = self._has_unsent
        if waiting != self._writing:
            self._writing = waiting
            if waiting:
                self._loop.add_writer(self._fd, self._writable)
            else:
                self._loop.remove_writer(self._fd)
        if not waiting and self._closing:
            self._finish_close()

    @property
    def _has_unsent(self) -> bool:
        return bool(self._queue) or (self._tls is not None and self._tls.has_unsent)

    def _send_some(self) -> int:
        queue = self._queue
        plain = self._plain
        if plain is not None:
            if len(queue) == 1:
                return plain.send(queue[0])
            if len(queue) <= _IOV_MAX:
                return plain.sendmsg(queue)
            return plain.sendmsg([queue[index] for index in range(_IOV_MAX)])
        assert self._tls is not None
        # Small neighbours go into one record together; what TLS has taken is its own copy.
        first = queue[0]
        if len(first) >= SEND_SIZE or len(queue) == 1:
            return self._tls.send(first)
        total = 0
        joined: list[Buffer] = []
        for buffer in queue:
            if total and total + len(buffer) > SEND_SIZE:
                break
            joined.append(buffer)
            total += len(buffer)
        return self._tls.send(b"".join(joined))

    def _writable(self) -> None:
        self._transmit()
        if self._was_congested and not self._dead and self.pending_bytes <= self._send_limit // 2:
            self._was_congested = False
            self.receiver.drained()

    # --- ending

    def close(self, *, timeout_s: float = 5.0) -> None:
        """Receive nothing more, send what is queued within `timeout_s`, then close. `closed(None)` follows."""
        if self._dead or self._closing:
            return
        self._closing = True
        self._want_read(False)
        if self._has_unsent:
            if self._borrowed_from < len(self._queue):
                self._own()
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._fd, self._writable)
            self._close_timer = self._loop.call_later(timeout_s, self.abort)
        else:
            self._loop.call_soon(self._finish_close)

    def abort(self, error: Exception | None = None) -> None:
        """Close at once; what is queued is lost. `closed(error)` follows."""
        self._end_with(error)

    def detach(self) -> socket.socket:
        """Give the socket back, open, so that TLS can begin on it. The channel is over; `closed` does not follow.

        Only while reading is paused. Raises ProtocolError, and changes nothing, when the peer has sent more already:
        it came unprotected and must not be taken for what comes after; or when it has not taken all that was sent.
        """
        assert self._paused and not self._in_received and not self._dead
        if self._start < self._end:
            raise ProtocolError("the peer sent more before TLS had begun")
        if self._queue or self._closing:
            raise ProtocolError("the peer does not read its answers")
        self._dead = True
        self.receiver = _NOBODY
        self.turn_ended = None
        assert self._plain is not None
        return self._plain

    def _finish_close(self) -> None:
        if self._tls is not None and not self._dead:
            self._tls.say_goodbye()
        self._end_with(None)

    def _end_with(self, error: Exception | None) -> None:
        if self._dead:
            return
        self._dead = True
        self._want_read(False)
        if self._writing:
            self._loop.remove_writer(self._fd)
            self._writing = False
        if self._close_timer is not None:
            self._close_timer.cancel()
        self._queue.clear()
        self._borrowed_from = 0
        self.pending_bytes = 0
        self._fill_view = None
        self._fill_then = None
        self._close_socket()
        self._loop.call_soon(self._finish, error)

    def _finish(self, error: Exception | None) -> None:
        """The last call to the owner; then let go of it and of the buffers.

        The owner knows the channel and the channel its owner: left alone, the garbage collector would have to find
        them, and hundreds of dead connections may come before it looks.
        """
        owner, self.receiver = self.receiver, _NOBODY
        self.turn_ended = None
        self._view = _NOTHING
        self._buffer = bytearray()
        owner.closed(error)

    @property
    def is_closed(self) -> bool:
        return self._dead

    def _want_read(self, want: bool) -> None:
        # Dead before it was started, or resumed: the number of its descriptor may be another socket's by now.
        if want == self._reading or (want and self._dead):
            return
        self._reading = want
        if want:
            self._loop.add_reader(self._fd, self._readable)
        else:
            self._loop.remove_reader(self._fd)
