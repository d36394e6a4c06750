"""An NBD server in a thread or in a process of its own, and a client that says whatever it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import uvloop

from stillpoint.nbd import codec
from stillpoint.nbd import constants as c
from stillpoint.nbd.access import Access
from stillpoint.nbd.budget import Budget
from stillpoint.nbd.export import Export
from stillpoint.nbd.listen import listen_tcp, uri
from stillpoint.nbd.server import BUDGET_SIZE, NbdServer

T = TypeVar("T")

TIMEOUT_S = 20.0


class ServerThread:
    """An NbdServer on a loop in a thread of its own. Fill `exports` at any time."""

    def __init__(
        self,
        *,
        budget_size: int = BUDGET_SIZE,
        connection_max: int = 64,
        handshake_timeout_s: float = 10.0,
        access: Access | None = None,
    ) -> None:
        self.exports: dict[str, Export] = {}
        self.executor = ThreadPoolExecutor(4)
        self.budget = Budget(budget_size)
        self.server = NbdServer(
            self.exports,
            self.executor,
            budget=self.budget,
            connection_max=connection_max,
            handshake_timeout_s=handshake_timeout_s,
            access=access,
        )
        self._listener = listen_tcp("127.0.0.1", 0)
        self.port: int = self._listener.getsockname()[1]
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def uri(self, name: str = "") -> str:
        return uri(self._listener, name)

    def __enter__(self) -> Self:
        self._thread.start()
        self.run(self._listen())
        return self

    async def _listen(self) -> None:
        self.server.listen([self._listener.dup()])

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the server's loop and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(TIMEOUT_S)

    def stop(self, timeout_s: float = 5.0) -> bool:
        return self.run(self.server.stop(timeout_s=timeout_s))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(1.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT_S)
        self._loop.close()
        self._listener.close()
        self.executor.shutdown()


@contextlib.contextmanager
def serve_file(*arguments: str | Path) -> Iterator[tuple[str, int]]:
    """`python -m stillpoint.nbd` with these arguments: its URI and process id."""
    command = [sys.executable, "-W", "error", "-m", "stillpoint.nbd", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            assert address.startswith("nbd"), "the server did not start"
            yield address, process.pid
        finally:
            process.terminate()
            status = process.wait(TIMEOUT_S)
    assert status == 0


class RawClient:
    """A blocking connection that sends exactly what it is told to."""

    def __init__(self, port: int, *, timeout_s: float = TIMEOUT_S) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self._cookie = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, length: int) -> bytes:
        """Exactly `length` bytes; ConnectionError when the server closes before."""
        data = bytearray()
        while len(data) < length:
            part = self.socket.recv(length - len(data))
            if not part:
                raise ConnectionError(f"closed after {len(data)} of {length} bytes")
            data += part
        return bytes(data)

    def is_closed(self) -> bool:
        """Wait for the server to close the connection; False when it sends something instead."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def start_tls(self, context: ssl.SSLContext) -> Self:
        """Go over to TLS, as an honest client does."""
        assert self.answer(c.Option.STARTTLS) == c.OptionReplyKind.ACK
        return self.shake_hands(context)

    def shake_hands(self, context: ssl.SSLContext) -> Self:
        self.socket = context.wrap_socket(self.socket, server_hostname="localhost")
        return self

    def greet(self, flags: int = 3) -> None:
        codec.decode_greeting(memoryview(self.receive(18)))
        self.send(codec.ClientFlags(flags).encode())

    def option(self, code: int, payload: bytes = b"") -> list[codec.OptionReply]:
        """Send an option and collect the answers up to the one that ends it."""
        self.send(codec.OptionRequest(code, payload).encode())
        replies = []
        while True:
            _, answered, kind, length = struct.unpack(">QIII", self.receive(20))
            assert answered == code
            replies.append(codec.OptionReply(code, kind, self.receive(length)))
            if kind == c.OptionReplyKind.ACK or kind & c.OPTION_ERROR_BIT:
                return replies

    def answer(self, code: int, payload: bytes = b"") -> int:
        """The kind of the last answer to an option."""
        return self.option(code, payload)[-1].kind

    def go(self, name: str, *, structured: bool = True, contexts: Sequence[str] = ()) -> Self:
        """Go through an honest handshake."""
        self.greet()
        if structured:
            assert self.answer(c.Option.STRUCTURED_REPLY) == c.OptionReplyKind.ACK
        if contexts:
            query = codec.MetaContextRequest(name, tuple(contexts))
            assert self.answer(c.Option.SET_META_CONTEXT, query.encode()) == c.OptionReplyKind.ACK
        assert self.answer(c.Option.GO, codec.GoRequest(name).encode()) == c.OptionReplyKind.ACK
        return self

    def request(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> int:
        """Send a request; returns its cookie."""
        self._cookie += 1
        self.send(codec.Request(flags, command, self._cookie, offset, length).encode() + payload)
        return self._cookie

    def reply(self) -> tuple[int, int, bytes]:
        """The next whole reply or chunk as (cookie, errno, payload); the payload of data chunks lacks the offset."""
        magic = struct.unpack(">I", self.receive(4))[0]
        if magic == c.SIMPLE_REPLY_MAGIC:
            errno, cookie = struct.unpack(">IQ", self.receive(12))
            return cookie, errno, b""
        assert magic == c.CHUNK_MAGIC
        _, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
        payload = self.receive(length)
        if kind == c.Chunk.OFFSET_DATA:
            return cookie, 0, payload[8:]
        if kind & c.CHUNK_ERROR_BIT:
            return cookie, struct.unpack_from(">I", payload)[0], b""
        return cookie, 0, payload

    def ask(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> int:
        """Send a request and return the errno of its answer, which must be the next."""
        cookie = self.request(command, offset, length, flags=flags, payload=payload)
        answered, errno, _ = self.reply()
        assert answered == cookie
        return errno
