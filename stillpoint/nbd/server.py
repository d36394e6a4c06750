"""The NBD server: accepts connections, leads each through its handshake, and ends them in order.

Invariants
- At most `connection_max` connections; one more is closed at once, so that a client is told rather than kept waiting.
- A handshake ends within `handshake_timeout_s`, or the connection does.
- With `access`, a client is let in by its certificate, and in plaintext only where `access` says so. Bytes received in
  plaintext are never read as if they had come by TLS: TLS begins on the raw socket, with nothing buffered.
- An export is told `closed` once per `opened`, when none of that connection's requests runs any more: after `drop`
  or `stop` returned True its device may be closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Executor
from typing import Final

from ..channel import Channel
from ..errors import PeerUnavailable, PermissionRefused, ProtocolError, StillpointError
from ..tls import check_listener, peer_identity, server_handshake
from ..tls_socket import TlsSocket
from .access import Access, StartTls
from .budget import Budget
from .export import Export
from .session import ServerSession, State
from .transmission import Transmission

_log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S: Final = 10.0
CONNECTION_MAX: Final = 64
BUDGET_SIZE: Final = 64 << 20

_RECEIVE_SIZE: Final = 256 * 1024
# Answers a client may leave unread before its requests wait.
_SEND_LIMIT: Final = 1 << 20
_ACCEPT_TURNS: Final = 16
_ACCEPT_RETRY_S: Final = 0.5


class NbdServer:
    """Serves the exports of a directory, which may gain and lose entries at any time, on listening sockets.

    executor: where reads that must wait run; it outlives the server.
    budget: the bound on payloads and large answers in flight; servers of one process may share one.
    access: who may open the exports; None: everybody who reaches the port, in plaintext, which must be on loopback.
    """

    def __init__(
        self,
        exports: Mapping[str, Export],
        executor: Executor,
        *,
        budget: Budget | None = None,
        connection_max: int = CONNECTION_MAX,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
        access: Access | None = None,
    ) -> None:
        self._exports = exports
        self._executor = executor
        self.budget = budget or Budget(BUDGET_SIZE)
        self.connection_max = connection_max
        self.refused_count = 0  # connections that were refused, or ended for what the client did
        self._handshake_timeout_s = handshake_timeout_s
        self._access = access
        self._listeners: list[socket.socket] = []
        self._connections: set[_Connection] = set()

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    def peers(self, export: Export) -> list[str]:
        """Where the clients of `export` are, one entry for each connection."""
        return [connection.peer for connection in self._connections if connection.export is export]

    def listen(self, listeners: Iterable[socket.socket]) -> None:
        """Serve these listening sockets, which the server owns from here, until `stop`. Call on the loop.

        Raises ConfigError, and serves none of them, when one would offer plaintext to other machines.
        """
        loop = asyncio.get_running_loop()
        listeners = list(listeners)
        for listener in listeners:
            check_listener(listener, self._access.credentials if self._access is not None else None, "NBD")
        for listener in listeners:
            listener.setblocking(False)
            self._listeners.append(listener)
            loop.add_reader(listener.fileno(), self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        starttls = self._access.starttls(listener) if self._access is not None else StartTls.UNAVAILABLE
        for _ in range(_ACCEPT_TURNS):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # Out of descriptors, most likely: the waiting client would wake us again and again.
                _log.warning("cannot accept an NBD connection: %s", error.strerror)
                self._pause_listener(listener)
                return
            if len(self._connections) >= self.connection_max:
                self.refused_count += 1
                _log.warning(
                    "an NBD connection was refused: %d are open", len(self._connections), extra={"peer": _peer(sock)}
                )
                sock.close()
                continue
            self._serve(sock, starttls)

    def _pause_listener(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener.fileno())

        def resume() -> None:
            if listener in self._listeners:
                loop.add_reader(listener.fileno(), self._accept, listener)

        loop.call_later(_ACCEPT_RETRY_S, resume)

    def _serve(self, sock: socket.socket, starttls: StartTls) -> None:
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection = _Connection(
            sock,
            ServerSession(self._exports, starttls),
            access=self._access,
            budget=self.budget,
            executor=self._executor,
            refused=self._refused,
            gone=self._connections.discard,
        )
        self._connections.add(connection)
        connection.start(self._handshake_timeout_s)

    def _refused(self, connection: _Connection, error: StillpointError) -> None:
        self.refused_count += 1
        export = connection.export.name if connection.export is not None else ""
        _log.warning("an NBD connection was refused: %s", error, extra={"peer": connection.peer, "export": export})

    async def drop(self, export: Export, *, timeout_s: float = 5.0) -> bool:
        """Close the connections to `export`, which its owner has taken out of the directory.

        Requests in flight are answered within the limit, else cut off. True: none of them runs any more. False: a
        thread is still busy with the device.
        """
        return await _end([c for c in self._connections if c.export is export], timeout_s)

    async def stop(self, *, timeout_s: float = 5.0) -> bool:
        """Listen no more, and close every connection as `drop` does."""
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.remove_reader(listener.fileno())
            listener.close()
        self._listeners.clear()
        return await _end(list(self._connections), timeout_s)


async def _end(connections: Collection[_Connection], timeout_s: float) -> bool:
    for connection in connections:
        connection.stop()
    if await _all_gone(connections, timeout_s):
        return True
    for connection in connections:
        connection.abort()
    return await _all_gone(connections, timeout_s)


async def _all_gone(connections: Collection[_Connection], timeout_s: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            for connection in connections:
                await connection.gone.wait()
    return all(connection.gone.is_set() for connection in connections)


class _Connection:
    """One client, from accept to the end: a channel, and whoever has the say, the session or the transmission."""

    def __init__(
        self,
        sock: socket.socket,
        session: ServerSession,
        *,
        access: Access | None,
        budget: Budget,
        executor: Executor,
        refused: Callable[[_Connection, StillpointError], None],
        gone: Callable[[_Connection], None],
    ) -> None:
        self.gone = asyncio.Event()
        self.export: Export | None = None
        self.peer = _peer(sock)
        self._refused = refused
        self._forget = gone
        self._session = session
        self._access = access
        self._securing: asyncio.Future[TlsSocket] | None = None
        self._transmission: Transmission | None = None
        self._budget = budget
        self._executor = executor
        self._channel = self._over(sock)
        self._timer: asyncio.TimerHandle | None = None

    def _over(self, sock: socket.socket | TlsSocket) -> Channel:
        return Channel(sock, self, receive_size=_RECEIVE_SIZE, send_limit=_SEND_LIMIT)

    def start(self, handshake_timeout_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(handshake_timeout_s, self._handshake_too_long)
        self._send_session_output()
        self._channel.start()

    def received(self, data: memoryview) -> int:
        if self._transmission is not None:
            return self._transmission.received(data)
        position = 0
        while position < len(data) and not self._channel.congested:
            consumed = self._session.receive(data[position:])
            if not consumed:
                return position
            position += consumed
            self._send_session_output()
            if self._session.state is State.ENDED:
                self._channel.close()
                return len(data)
            if self._session.state is State.STARTING_TLS:
                self._channel.pause_reading()
                asyncio.get_running_loop().call_soon(self._begin_tls)
                return position
            if self._session.state is State.TRANSMISSION:
                return position + self._begin_transmission().received(data[position:])
        if self._channel.congested:
            self._channel.pause_reading()
        return position

    def _send_session_output(self) -> None:
        if output := self._session.output():
            self._channel.send_owned(output)
            self._channel.flush()

    def _begin_tls(self) -> None:
        if self.gone.is_set() or self._channel.is_closed:
            return
        try:
            sock = self._channel.detach()
        except ProtocolError as error:
            self._channel.abort(error)
            return
        assert self._access is not None
        # No limit of its own: `_handshake_too_long` ends it.
        handshake = server_handshake(sock, self._access.credentials, timeout_s=None)
        self._securing = asyncio.ensure_future(handshake)
        self._securing.add_done_callback(lambda done: self._tls_begun(done, sock))

    def _tls_begun(self, done: asyncio.Future[TlsSocket], plain: socket.socket) -> None:
        self._securing = None
        if done.cancelled():
            plain.close()  # nobody else does if the handshake had not begun
            self.closed(ProtocolError("the handshake was cut off"))
            return
        if (error := done.exception()) is not None:
            assert isinstance(error, StillpointError)
            self.closed(error)
            return
        secured = done.result()
        identity = peer_identity(secured)
        self.peer = f"{identity or 'unknown'} at {self.peer}"
        assert self._access is not None
        admitted = identity is not None and identity.role in self._access.roles
        if not admitted:
            self._refused(self, PermissionRefused("the client's role may not open what is served here"))
        self._session.secured(admitted=admitted)
        self._channel = self._over(secured)
        self._channel.start()

    def _begin_transmission(self) -> Transmission:
        self._cancel_timer()
        agreement = self._session.agreement
        assert agreement is not None
        self.export = agreement.export
        self.export.opened()
        self._transmission = Transmission(
            self._channel, agreement, budget=self._budget, executor=self._executor, idle=self._all_answered
        )
        return self._transmission

    def drained(self) -> None:
        if self._transmission is not None:
            self._transmission.drained()
        elif not self.gone.is_set():
            self._channel.resume_reading()

    def closed(self, error: Exception | None) -> None:
        if error is None and self._session.was_refused and self._transmission is None:
            error = PermissionRefused("the client asked in plaintext for what takes TLS")
        if isinstance(error, ProtocolError | PermissionRefused | PeerUnavailable):
            self._refused(self, error)
        elif error is not None and not isinstance(error, OSError):
            _log.error("an NBD connection failed: %s", error, exc_info=error, extra={"peer": self.peer})
        self._cancel_timer()
        if self._transmission is not None:
            self._transmission.ended()
        else:
            self._leave()

    def _all_answered(self) -> None:
        assert self.export is not None
        self.export.closed()
        self._leave()

    def _leave(self) -> None:
        self.gone.set()
        self._forget(self)
        # Channel and connection know each other; left alone, their buffers would wait for the garbage collector.
        del self._channel
        self._transmission = None

    def stop(self) -> None:
        if self._transmission is not None:
            self._transmission.stop()
        elif self._securing is not None:
            self._securing.cancel()
        elif not self.gone.is_set():
            self._channel.close()

    def abort(self) -> None:
        self._cut_off()

    def _handshake_too_long(self) -> None:
        self._timer = None
        self._cut_off(ProtocolError("the handshake took too long"))

    def _cut_off(self, error: StillpointError | None = None) -> None:
        if self._securing is not None:
            self._securing.cancel()
        elif not self.gone.is_set():
            self._channel.abort(error)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _peer(sock: socket.socket) -> str:
    """Where the client is, for people."""
    try:
        name = sock.getpeername()
    except OSError:
        return "that is gone"
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "on this host"
