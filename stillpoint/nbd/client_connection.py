"""One NBD connection seen from the client: requests out, replies matched to them.

Invariants
- A reply is believed only as far as it fits its request: lengths and offsets are checked before anything is stored.
- A structured reply counts when its last chunk has come; an error in any chunk fails the request.
- When the connection ends, every request that is not answered fails. Whether a failed write took place is unknown.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final

from ..channel import Channel
from ..errors import InvalidRequest, PeerUnavailable, PermissionRefused, ProtocolError, StillpointError
from ..tls import Credentials, client_handshake, tls_reason
from . import codec
from .client_session import ClientSession, ExportDescription, State
from .constants import CHUNK_ERROR_BIT, CHUNK_FLAG_DONE, REQUEST_MAGIC, Chunk, Command, Errno
from .errors import error_from_nbd
from .uri import NbdUri

_CHUNK_PAYLOAD_MAX: Final = 1 << 20  # of chunks that carry no data
_REQUEST_COST: Final = 4096  # what a request without payload counts as in flight


@dataclass(slots=True, eq=False)
class _Request:
    command: Command
    offset: int
    length: int
    done: asyncio.Future[None]
    target: memoryview | None = None
    received: int = 0
    errno: int = 0
    status: list[tuple[int, int]] = field(default_factory=list)


class ClientConnection:
    """Made by `connect`; requests may be made concurrently. Errors as NbdClient tells them, naming the URI."""

    def __init__(self, uri: NbdUri, bytes_in_flight_max: int) -> None:
        self._uri = uri
        self._session = ClientSession(uri.name, tls=uri.tls)
        self._credentials = _credentials(uri)
        self._securing: asyncio.Task[None] | None = None
        self._channel: Channel | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gone = asyncio.Event()
        self._failure: StillpointError | None = None
        self._requests: dict[int, _Request] = {}
        self._cookies = count(1)
        self._window = _Window(bytes_in_flight_max)
        self._description: ExportDescription | None = None
        self._flush_scheduled = False

    async def connect(self, timeout_s: float) -> ExportDescription:
        """Connect and negotiate, once."""
        try:
            async with asyncio.timeout(timeout_s):
                self._channel = Channel(await _connect(self._uri), self)
                self._channel.start()
                await self._ready
        except TimeoutError:
            raise PeerUnavailable(f"{self._uri}: no answer within {timeout_s:g} s") from None
        except OSError as error:
            raise PeerUnavailable(f"{self._uri}: cannot connect: {error.strerror or error}") from error
        finally:
            if self._description is None:
                if self._securing is not None:
                    self._securing.cancel()
                if self._channel is not None:
                    self._channel.abort()
        assert self._description is not None
        return self._description

    async def close(self) -> None:
        """Say goodbye and close. Flushes nothing."""
        if self._channel is not None and not self._gone.is_set():
            self._send(0, Command.DISC, 0, 0, 0)
            self._flush_channel()
            self._channel.close()
            await self._gone.wait()

    async def request(
        self,
        command: Command,
        offset: int,
        length: int,
        *,
        flags: int = 0,
        payload: memoryview | None = None,
        target: memoryview | None = None,
    ) -> list[tuple[int, int]]:
        """Send one request and wait for its answer; returns the extents of a block status."""
        cost = length if payload is not None or target is not None else _REQUEST_COST
        await self._window.take(cost)
        try:
            if self._failure is not None:
                raise self._failed()
            loop = asyncio.get_running_loop()
            request = _Request(command, offset, length, loop.create_future(), target=target)
            cookie = next(self._cookies)
            self._requests[cookie] = request
            self._send(flags, command, cookie, offset, length, payload)
            try:
                await request.done
            except asyncio.CancelledError:
                # The answer will still come, and must not be stored into a buffer that others use by then.
                if target is not None or payload is not None:
                    self.abort(PeerUnavailable(f"{self._uri}: a request was given up"))
                raise
            if request.errno:
                what = f"{self._uri}: {command.name.lower().replace('_', ' ')} of {length} bytes at {offset}"
                raise error_from_nbd(what, request.errno)
            return request.status
        finally:
            self._window.give_back(cost)

    def _send(
        self, flags: int, command: Command, cookie: int, offset: int, length: int, payload: memoryview | None = None
    ) -> None:
        assert self._channel is not None
        header = codec.REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)
        # Owned: the caller keeps its payload unchanged until the request is answered.
        if payload is None:
            self._channel.send_owned(header)
        else:
            self._channel.send_owned(header, payload)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush_channel)

    def _flush_channel(self) -> None:
        self._flush_scheduled = False
        if self._channel is not None:
            self._channel.flush()

    # --- replies: the channel's Receiver

    def received(self, data: memoryview) -> int:
        position = 0
        while position < len(data):
            if self._description is None:
                consumed = self._receive_handshake(data[position:])
                if self._session.state is State.SECURING:
                    return position + consumed
            else:
                consumed, filling = self._receive_reply(data[position:])
                if filling:
                    return position + consumed
            if not consumed:
                break
            position += consumed
        return position

    def _receive_handshake(self, data: memoryview) -> int:
        assert self._channel is not None
        consumed = self._session.receive(data)
        if output := self._session.output():
            self._channel.send_owned(output)
            self._channel.flush()
        if self._session.state is State.SECURING:
            self._channel.pause_reading()
            self._securing = asyncio.ensure_future(self._secure(self._channel))
        if self._session.state is State.READY:
            self._description = self._session.description
            if not self._ready.done():
                self._ready.set_result(None)
        return consumed

    async def _secure(self, plain: Channel) -> None:
        """The rest of the handshake over TLS. Whatever the server sent before it is an error, not an answer."""
        assert self._credentials is not None
        try:
            secured = await client_handshake(plain.detach(), self._credentials, self._uri.server_name)
        except StillpointError as error:
            plain.abort()
            self.closed(error)
            return
        self._channel = Channel(secured, self)
        self._session.secured()
        self._channel.send_owned(self._session.output())
        self._channel.start()
        self._channel.flush()

    def _receive_reply(self, data: memoryview) -> tuple[int, bool]:
        """How many bytes were consumed, and whether data of a read is now being received into its place."""
        decoded = codec.decode_reply(data)
        if decoded is None:
            return 0, False
        reply, header_size = decoded
        request = self._requests.get(reply.cookie)
        if request is None:
            raise ProtocolError("an answer to nothing that was asked")
        if isinstance(reply, codec.SimpleReply):
            return self._receive_simple(reply, request, data, header_size)
        if reply.kind == Chunk.OFFSET_DATA:
            return self._receive_data(reply, request, data, header_size)
        if reply.length > _CHUNK_PAYLOAD_MAX:
            raise ProtocolError(f"a chunk of {reply.length} bytes without data")
        end = header_size + reply.length
        if len(data) < end:
            return 0, False
        self._receive_chunk(reply, request, data[header_size:end])
        self._end_chunk(reply, request)
        return end, False

    def _receive_simple(
        self, reply: codec.SimpleReply, request: _Request, data: memoryview, header_size: int
    ) -> tuple[int, bool]:
        request.errno = reply.errno
        if request.command == Command.BLOCK_STATUS and not reply.errno:
            raise ProtocolError("a block status without extents")
        if request.target is None or reply.errno:
            self._finish(reply.cookie)
            return header_size, False
        assert self._description is not None
        if self._description.structured:
            raise ProtocolError("read data in a simple reply although structured ones were agreed")
        request.received = request.length
        return self._place(request.target, data, header_size, lambda: self._finish(reply.cookie))

    def _receive_data(
        self, reply: codec.ChunkHeader, request: _Request, data: memoryview, header_size: int
    ) -> tuple[int, bool]:
        offset_end = header_size + codec.CHUNK_OFFSET.size
        if len(data) < offset_end:
            return 0, False
        offset = codec.CHUNK_OFFSET.unpack_from(data, header_size)[0]
        target = self._part(request, offset, reply.length - codec.CHUNK_OFFSET.size)
        return self._place(target, data, offset_end, lambda: self._end_chunk(reply, request))

    def _part(self, request: _Request, offset: int, length: int) -> memoryview:
        """The part of the request's buffer that a chunk speaks of."""
        start = offset - request.offset
        if request.target is None or length <= 0 or start < 0 or start + length > request.length:
            raise ProtocolError(f"a chunk of {length} bytes at {offset} that nobody asked for")
        request.received += length
        if request.received > request.length:
            raise ProtocolError("more data than was asked for")
        return request.target[start : start + length]

    def _place(self, target: memoryview, data: memoryview, start: int, done: Callable[[], None]) -> tuple[int, bool]:
        assert self._channel is not None
        end = start + len(target)
        if len(data) >= end:
            target[:] = data[start:end]
            done()
            return end, False
        self._channel.fill(target, done)
        return start, True

    def _receive_chunk(self, reply: codec.ChunkHeader, request: _Request, payload: memoryview) -> None:
        if reply.kind & CHUNK_ERROR_BIT:
            if len(payload) < codec.CHUNK_ERROR.size:
                raise ProtocolError("an error without a number")
            request.errno = codec.CHUNK_ERROR.unpack_from(payload)[0] or Errno.EIO
        elif reply.kind == Chunk.OFFSET_HOLE:
            if len(payload) != codec.CHUNK_HOLE.size:
                raise ProtocolError("a hole without its place")
            offset, length = codec.CHUNK_HOLE.unpack(payload)
            part = self._part(request, offset, length)
            part[:] = bytes(length)
        elif reply.kind == Chunk.BLOCK_STATUS:
            assert self._description is not None
            context, extents = codec.parse_block_status(payload)
            if request.command != Command.BLOCK_STATUS or context != self._description.allocation_id or request.status:
                raise ProtocolError("a block status that nobody asked for")
            request.status = extents
        elif reply.kind != Chunk.NONE or payload:
            raise ProtocolError(f"an unknown chunk of kind {reply.kind}")

    def _end_chunk(self, reply: codec.ChunkHeader, request: _Request) -> None:
        if not reply.flags & CHUNK_FLAG_DONE:
            return
        if not request.errno:
            if request.target is not None and request.received != request.length:
                raise ProtocolError(f"{request.received} bytes of {request.length} that were asked for")
            if request.command == Command.BLOCK_STATUS and not request.status:
                raise ProtocolError("a block status without extents")
        self._finish(reply.cookie)

    def _finish(self, cookie: int) -> None:
        request = self._requests.pop(cookie)
        if not request.done.done():
            request.done.set_result(None)

    def drained(self) -> None:
        """The window bounds what is queued; nothing waits for this."""

    def closed(self, error: Exception | None) -> None:
        if self._failure is None:
            if isinstance(error, ProtocolError):
                self._failure = ProtocolError(f"{self._uri}: the server sent {error}")
            elif isinstance(error, StillpointError):
                self._failure = type(error)(f"{self._uri}: {error}")
            elif isinstance(error, ssl.SSLError):
                self._failure = PermissionRefused(f"{self._uri}: the server refused TLS: {tls_reason(error)}")
            else:
                self._failure = PeerUnavailable(f"{self._uri}: the connection ended" + (f": {error}" if error else ""))
        if not self._ready.done():
            self._ready.set_exception(self._failure)
        requests, self._requests = self._requests, {}
        for request in requests.values():
            if not request.done.done():
                request.done.set_exception(self._failed())
        self._gone.set()

    def _failed(self) -> StillpointError:
        """A new exception each time: one that is raised in several places collects all their tracebacks."""
        assert self._failure is not None
        return type(self._failure)(str(self._failure))

    def abort(self, error: StillpointError) -> StillpointError:
        assert self._channel is not None
        self._failure = self._failure or error
        self._channel.abort(error)
        return error


class _Window:
    """At most `limit` bytes in flight, in the order in which they were asked for; a single request may be larger."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size: int) -> None:
        if not self._waiting and self._fits(size):
            self._taken += size
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(size)
            else:
                self._waiting = deque(entry for entry in self._waiting if entry[1] is not turn)
            raise

    def give_back(self, size: int) -> None:
        self._taken -= size
        while self._waiting and self._fits(self._waiting[0][0]):
            size, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._taken += size
                turn.set_result(None)

    def _fits(self, size: int) -> bool:
        return not self._taken or self._taken + size <= self._limit


def _credentials(uri: NbdUri) -> Credentials | None:
    if not uri.tls:
        return None
    if not uri.certificates:
        raise InvalidRequest(f"{uri}: TLS needs certificates; add ?tls-certificates=FOLDER")
    return Credentials(Path(uri.certificates))


async def _connect(uri: NbdUri) -> socket.socket:
    loop = asyncio.get_running_loop()
    if uri.socket_path:
        return await _connected(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), uri.socket_path)
    failure: OSError | None = None
    for family, kind, protocol, _, address in await loop.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        try:
            return await _connected(sock, address)
        except OSError as error:
            failure = error
    raise failure or OSError(f"{uri.host} has no address")


async def _connected(sock: socket.socket, address: Any) -> socket.socket:
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock
