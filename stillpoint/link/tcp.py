"""The data link over TCP: a connection that opens with the one-time token of OpenLink."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from ..channel import Channel, Receiver
from ..config import Address
from ..errors import PeerUnavailable
from .frames import HEADER_SIZE, MAX_PAYLOAD_SIZE, FrameType, encode_header
from .tokens import TokenGate, Tokens

# Room for three of the largest frames: while one is half received, two whole ones are handled.
RECEIVE_SIZE = 3 * (MAX_PAYLOAD_SIZE + HEADER_SIZE)
_SOCKET_BUFFER_SIZE = 4 * 1024 * 1024
# Connections that have not shown a token yet.
_STRANGERS_MAX = 32


def tune(sock: socket.socket) -> None:
    """Options that every data connection needs."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_SIZE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_SIZE)


async def connect(address: Address, token: bytes, receiver: Receiver, *, timeout_s: float = 5.0) -> Channel:
    """A started channel to the standby, HELLO sent. Raises PeerUnavailable."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            infos = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            family, kind, protocol, _, target = infos[0]
            sock = socket.socket(family, kind, protocol)
            try:
                sock.setblocking(False)
                tune(sock)
                await loop.sock_connect(sock, target)
            except BaseException:
                sock.close()
                raise
    except (OSError, TimeoutError) as error:
        raise PeerUnavailable(f"cannot reach the standby's data link at {address}: {_reason(error)}") from None
    channel = Channel(sock, receiver, receive_size=64 * 1024)
    channel.send_owned(encode_header(FrameType.HELLO, 0, 0, 0, 0, 0, 0, token), token)
    channel.start()
    channel.flush()
    return channel


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


class DataLinkListener:
    """Accepts data connections and puts each before the token gate."""

    def __init__(self, sock: socket.socket, tokens: Tokens) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._tokens = tokens
        self._strangers: set[TokenGate] = set()
        asyncio.get_running_loop().add_reader(sock.fileno(), self._accept)

    @property
    def port(self) -> int:
        port: int = self._socket.getsockname()[1]
        return port

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, peer = self._socket.accept()
                if len(self._strangers) >= _STRANGERS_MAX:
                    sock.close()
                    continue
                tune(sock)
                gate = TokenGate(self._tokens, f"{peer[0]}:{peer[1]}", self._strangers.discard)
                channel = Channel(sock, gate, receive_size=RECEIVE_SIZE)
                self._strangers.add(gate)
                gate.guard(channel)
                channel.start()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        for gate in list(self._strangers):
            gate.abort()
