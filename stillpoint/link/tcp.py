"""The data link over TCP, in TLS where the node has certificates: it opens with the one-time token of OpenLink.

TLS says that the other end is a data node, the token which of its sessions this is. Neither is enough alone.
"""

from __future__ import annotations

import asyncio
import logging
import socket

from ..channel import Channel, Receiver
from ..config import Address
from ..errors import PeerUnavailable, PermissionRefused, StillpointError
from ..security.authorization import DATA_LINK
from ..tls import Credentials, check_listener, client_handshake, peer_identity, server_handshake
from ..tls_socket import TlsSocket
from .frames import HEADER_SIZE, MAX_PAYLOAD_SIZE, FrameType, encode_header
from .tokens import TokenGate, Tokens

logger = logging.getLogger(__name__)

# Room for three of the largest frames: while one is half received, two whole ones are handled.
RECEIVE_SIZE = 3 * (MAX_PAYLOAD_SIZE + HEADER_SIZE)
_SOCKET_BUFFER_SIZE = 4 * 1024 * 1024
# Connections that have not shown a token yet.
_STRANGERS_MAX = 32
_ACCEPT_RETRY_S = 0.5


def tune(sock: socket.socket) -> None:
    """Options that every data connection needs."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_SIZE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_SIZE)


async def connect(
    address: Address,
    token: bytes,
    receiver: Receiver,
    *,
    credentials: Credentials | None = None,
    timeout_s: float = 5.0,
) -> Channel:
    """A started channel to the standby, HELLO sent.

    credentials: ours; the standby must show those of a data node at `address`. None: plaintext.
    Raises PeerUnavailable, PermissionRefused.
    """
    try:
        async with asyncio.timeout(timeout_s):
            raw = await _connected(address)
            sock = raw if credentials is None else await _secured(raw, credentials, address)
    except (OSError, TimeoutError) as error:
        raise PeerUnavailable(f"cannot reach the standby's data link at {address}: {_reason(error)}") from None
    channel = Channel(sock, receiver, receive_size=RECEIVE_SIZE)
    channel.send_owned(encode_header(FrameType.HELLO, 0, 0, 0, 0, 0, 0, token), token)
    channel.start()
    channel.flush()
    return channel


async def _connected(address: Address) -> socket.socket:
    loop = asyncio.get_running_loop()
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
    return sock


async def _secured(sock: socket.socket, credentials: Credentials, address: Address) -> TlsSocket:
    try:
        secured = await client_handshake(sock, credentials, address.host)
    except StillpointError as error:
        raise type(error)(f"the standby's data link at {address}: {error}") from None
    identity = peer_identity(secured)
    if identity is None or identity.role not in DATA_LINK:
        secured.close()
        raise PermissionRefused(f"what answers at {address} is no data node but {identity or 'without a role'}")
    return secured


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


class DataLinkListener:
    """Accepts data connections, lets in data nodes alone, and puts each before the token gate."""

    def __init__(self, sock: socket.socket, tokens: Tokens, credentials: Credentials | None = None) -> None:
        """credentials: None for plaintext, on loopback only; raises ConfigError for one that other machines reach."""
        check_listener(sock, credentials, "the data link")
        sock.setblocking(False)
        self._socket = sock
        self._tokens = tokens
        self._credentials = credentials
        self._handshakes: set[asyncio.Task[None]] = set()
        self._strangers: set[TokenGate] = set()
        asyncio.get_running_loop().add_reader(sock.fileno(), self._accept)

    @property
    def port(self) -> int:
        port: int = self._socket.getsockname()[1]
        return port

    def _accept(self) -> None:
        while True:
            try:
                sock, address = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # Out of descriptors, most likely: the waiting peer would wake us again and again.
                logger.warning("cannot accept a data link: %s", error.strerror)
                self._pause()
                return
            try:
                self._admit(sock, str(Address(address[0], address[1])))
            except OSError:  # gone already
                sock.close()

    def _pause(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket.fileno())

        def resume() -> None:
            if self._socket.fileno() >= 0:
                loop.add_reader(self._socket.fileno(), self._accept)

        loop.call_later(_ACCEPT_RETRY_S, resume)

    def _admit(self, sock: socket.socket, peer: str) -> None:
        if len(self._strangers) + len(self._handshakes) >= _STRANGERS_MAX:
            logger.warning("data link refused: too many connections that have shown nothing", extra={"peer": peer})
            sock.close()
            return
        tune(sock)
        if self._credentials is None:
            self._put_before_gate(sock, peer)
            return
        task = asyncio.ensure_future(self._secure(sock, peer, self._credentials))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _secure(self, sock: socket.socket, peer: str, credentials: Credentials) -> None:
        try:
            secured = await server_handshake(sock, credentials)
        except StillpointError as error:
            logger.warning("data link refused: %s", error, extra={"peer": peer})
            return
        identity = peer_identity(secured)
        if identity is None or identity.role not in DATA_LINK:
            logger.warning(
                "data link refused: the peer's role does not allow it",
                extra={"peer": peer, "identity": str(identity or "unknown")},
            )
            secured.close()
            return
        self._put_before_gate(secured, f"{identity} at {peer}")

    def _put_before_gate(self, sock: socket.socket | TlsSocket, peer: str) -> None:
        gate = TokenGate(self._tokens, peer, self._strangers.discard)
        channel = Channel(sock, gate, receive_size=RECEIVE_SIZE)
        self._strangers.add(gate)
        gate.guard(channel)
        channel.start()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        for task in self._handshakes:
            task.cancel()
        for gate in list(self._strangers):
            gate.abort()
