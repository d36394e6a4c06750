"""A connected, non-blocking socket in TLS, for a Channel: large receives and sends, few system calls.

An `ssl.SSLSocket` asks the kernel twice for each record it receives, and sends each with a call of its own; a record
holds 16 KiB at most, and often one small request. Here OpenSSL works on memory: one receive brings what has arrived,
all of it is decrypted into the caller's buffer, and what is encrypted leaves together.

Invariants
- What is received goes through OpenSSL and nowhere else: no byte that came in plaintext is ever handed out.
- `send` takes nothing while anything it took before has not left, so what waits here is bounded by `SEND_SIZE`.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from typing import Any, Final

# Plaintext of one send, and what one receive may bring.
SEND_SIZE: Final = 256 * 1024
_RECEIVE_SIZE: Final = 128 * 1024


class _Scratch(threading.local):
    """What a receive brings, for as long as it takes to hand it to OpenSSL: one for all the sockets of a loop."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(_RECEIVE_SIZE))


_SCRATCH: Final = _Scratch()


class TlsSocket:
    """Owns `sock` from here. `shake_hands` comes first, until it no longer raises BlockingIOError."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, host: str = "") -> None:
        """host: of the server, which its certificate has to name; empty: we are the server."""
        sock.setblocking(False)
        self._socket = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=not host, server_hostname=host or None)
        self._unsent = memoryview(b"")
        self._starved = True  # OpenSSL has nothing to go on with before more is received
        self._ended = False

    # --- handshake

    def shake_hands(self) -> None:
        """Go on with the handshake; complete on return.

        Raises BlockingIOError when the peer has to say something first, ssl.SSLError when it fails, of which the peer
        has then been told as far as the socket took it, and OSError.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self.flush()
                self._receive()
                if self._ended:
                    raise ConnectionResetError("the peer closed the connection") from None
                continue
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self.flush()
                raise
            self._starved = False
            with contextlib.suppress(BlockingIOError):
                self.flush()
            return

    def peer_certificate(self) -> dict[str, Any]:
        return dict(self._tls.getpeercert() or {})

    def version(self) -> str | None:
        return self._tls.version()

    # --- receiving

    @property
    def pending(self) -> bool:
        """Whether there may be something to receive although the socket has nothing new."""
        return not self._starved and bool(self._incoming.pending or self._tls.pending())

    def recv_into(self, target: memoryview, /) -> int:
        """As much as is there and fits; 0 at the end. Raises BlockingIOError when nothing is there, and OSError."""
        while True:
            if self.pending and (count := self._decrypt(target)):
                return count
            if self._ended:
                return 0
            self._receive()

    def _receive(self) -> None:
        buffer = _SCRATCH.buffer
        count = self._socket.recv_into(buffer)
        if count:
            self._incoming.write(buffer[:count])
            self._starved = False
        else:
            self._ended = True

    def _decrypt(self, target: memoryview) -> int:
        total, size, incoming = 0, len(target), self._incoming
        try:
            while True:
                count: Any = self._tls.read(size - total, target[total:])  # a number, when given a buffer
                if not count:
                    self._ended = True
                    break
                total += count
                # A read that had room left took all of its record.
                if total == size or not incoming.pending:
                    break
        except ssl.SSLWantReadError:
            self._starved = True  # a record is still under way
        except ssl.SSLZeroReturnError:
            self._ended = True
        except ssl.SSLError:
            if not total:  # else met again by the next call
                raise
        return total

    # --- sending

    @property
    def has_unsent(self) -> bool:
        return bool(len(self._unsent))

    def send(self, data: bytes | bytearray | memoryview, /) -> int:
        """Take up to SEND_SIZE bytes; how many. What does not leave at once does by `flush`.

        Raises BlockingIOError, and takes nothing, while something from before has not left; and OSError.
        """
        self.flush()
        count = self._tls.write(data if len(data) <= SEND_SIZE else memoryview(data)[:SEND_SIZE])
        with contextlib.suppress(BlockingIOError):
            self.flush()
        return count

    def flush(self) -> None:
        """Send on what has not left yet. Raises BlockingIOError when the socket does not take all of it."""
        while True:
            if not self._unsent:
                if not self._outgoing.pending:
                    return
                self._unsent = memoryview(self._outgoing.read())
            self._unsent = self._unsent[self._socket.send(self._unsent) :]

    # --- ending

    def say_goodbye(self) -> None:
        """Tell the peer, as far as the socket takes it, that nothing more comes."""
        with contextlib.suppress(OSError, ValueError):
            with contextlib.suppress(ssl.SSLWantReadError):  # the peer need not answer
                self._tls.unwrap()
            self.flush()

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()
