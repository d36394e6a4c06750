"""The Channel: order, bounds, `fill`, pausing and endings, over plain and TLS sockets."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import struct
from collections.abc import Callable

import pytest
import trustme
import uvloop

from stillpoint.channel import Channel
from stillpoint.errors import ProtocolError
from stillpoint.tls_socket import TlsSocket


class Collector:
    """Takes everything it is shown."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.drains = 0
        self.end: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.take: Callable[[memoryview], int] | None = None

    def received(self, data: memoryview, /) -> int:
        if self.take is not None:
            return self.take(data)
        self.data += data
        return len(data)

    def drained(self) -> None:
        self.drains += 1

    def closed(self, error: Exception | None) -> None:
        self.end.set_result(error)


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[..., object]:
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def runner(main: object) -> object:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(main)  # type: ignore[arg-type]

    return runner


def plain_sockets() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def tls_sockets() -> tuple[TlsSocket, TlsSocket]:
    """Connected, their handshake complete, as `Channel` wants them."""
    authority = trustme.CA()
    server_context, client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.issue_cert("peer").configure_cert(server_context)
    authority.configure_trust(client_context)
    left, right = socket.socketpair()
    ends = TlsSocket(left, client_context, host="peer"), TlsSocket(right, server_context)
    waiting = list(ends)
    while waiting:
        for end in list(waiting):
            with contextlib.suppress(BlockingIOError):
                end.shake_hands()
                waiting.remove(end)
    return ends


@pytest.fixture(params=[plain_sockets, tls_sockets], ids=["plain", "tls"])
def connect(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `pair` use this kind of sockets."""
    monkeypatch.setattr(f"{__name__}.make_sockets", request.param)


make_sockets: Callable[[], tuple[socket.socket, socket.socket] | tuple[TlsSocket, TlsSocket]] = plain_sockets


def pair(**options: int) -> tuple[Channel, Collector, Channel, Collector]:
    left_socket, right_socket = make_sockets()
    left, right = Collector(), Collector()
    left_channel, right_channel = Channel(left_socket, left, **options), Channel(right_socket, right, **options)
    left_channel.start()
    right_channel.start()
    return left_channel, left, right_channel, right


@pytest.mark.usefixtures("connect")
def test_bytes_arrive_in_order_whatever_their_sizes(run: Callable[..., object]) -> None:
    async def main() -> None:
        generator = random.Random(7)
        sender, _, _, receiver = pair()
        expected = bytearray()
        for _ in range(300):
            buffer = bytearray(generator.randbytes(generator.choice([0, 1, 16, 4096, 70_000])))
            expected += buffer
            if generator.random() < 0.3:
                sender.send_owned(bytes(buffer))
            else:
                sender.send(buffer)
            if generator.random() < 0.5:
                sender.flush()
                buffer[:] = bytes(len(buffer))  # ours again: overwriting it must not change what is sent
            if generator.random() < 0.1:
                await asyncio.sleep(0)
            if not sender._queue:
                continue
            sender.flush()
        sender.close()
        async with asyncio.timeout(10):
            assert await receiver.end is None
        assert receiver.data == expected

    run(main())


@pytest.mark.usefixtures("connect")
def test_fill_takes_buffered_and_new_bytes_without_passing_received(run: Callable[..., object]) -> None:
    async def main() -> None:
        sender, _, channel, receiver = pair()
        payload = random.Random(1).randbytes(3_000_000)
        target = bytearray(len(payload))
        filled: list[str] = []

        def take(data: memoryview) -> int:
            if not filled:
                if len(data) < 4:
                    return 0
                filled.append("asked")
                channel.fill(memoryview(target), lambda: filled.append("full"))
                return 4
            receiver.data += data
            return len(data)

        receiver.take = take
        sender.send(b"HEAD", payload, b"TAIL")
        sender.flush()
        sender.close()
        async with asyncio.timeout(10):
            await receiver.end
        assert filled == ["asked", "full"]
        assert target == payload
        assert receiver.data == b"TAIL"

    run(main())


@pytest.mark.usefixtures("connect")
def test_what_is_not_consumed_is_shown_again_with_more(run: Callable[..., object]) -> None:
    async def main() -> None:
        sender, _, _, receiver = pair()
        messages: list[bytes] = []

        def take(data: memoryview) -> int:
            whole = len(data) // 10 * 10
            messages.extend(bytes(data[at : at + 10]) for at in range(0, whole, 10))
            return whole

        receiver.take = take
        for index in range(0, 100, 3):
            sender.send(bytes(range(index, min(index + 3, 100))))
            sender.flush()
            await asyncio.sleep(0)
        sender.close()
        async with asyncio.timeout(10):
            await receiver.end
        assert b"".join(messages) == bytes(range(100))

    run(main())


@pytest.mark.usefixtures("connect")
def test_a_paused_channel_pushes_back_and_drains_when_resumed(run: Callable[..., object]) -> None:
    async def main() -> None:
        sender, sending, channel, receiver = pair(send_limit=100_000)
        channel.pause_reading()
        sender.send_owned(bytes(5_000_000))
        sender.flush()
        await asyncio.sleep(0.02)
        assert sender.congested
        assert not receiver.data
        channel.resume_reading()
        async with asyncio.timeout(10):
            while sender.pending_bytes or len(receiver.data) < 5_000_000:
                await asyncio.sleep(0.001)
        assert sending.drains == 1
        assert not sender.congested
        sender.abort()
        channel.abort()
        await asyncio.sleep(0)

    run(main())


@pytest.mark.usefixtures("connect")
def test_pausing_inside_received_keeps_the_rest_for_later(run: Callable[..., object]) -> None:
    async def main() -> None:
        sender, _, channel, receiver = pair()
        seen: list[int] = []

        def take(data: memoryview) -> int:
            seen.append(data[0])
            channel.pause_reading()
            asyncio.get_running_loop().call_soon(channel.resume_reading)
            return 1

        receiver.take = take
        sender.send(bytes(range(50)))
        sender.flush()
        async with asyncio.timeout(10):
            while len(seen) < 50:
                await asyncio.sleep(0.001)
        assert seen == list(range(50))
        sender.abort()
        channel.abort()
        await asyncio.sleep(0)

    run(main())


@pytest.mark.usefixtures("connect")
def test_a_message_larger_than_the_buffer_ends_the_channel(run: Callable[..., object]) -> None:
    async def main() -> None:
        sender, _, _, receiver = pair(receive_size=4096)
        receiver.take = lambda data: 0
        sender.send_owned(bytes(100_000))
        sender.flush()
        async with asyncio.timeout(10):
            assert isinstance(await receiver.end, ProtocolError)
        sender.abort()
        await asyncio.sleep(0)

    run(main())


@pytest.mark.usefixtures("connect")
def test_an_error_of_the_receiver_ends_the_channel_with_it(run: Callable[..., object]) -> None:
    async def main() -> None:
        sender, sending, _, receiver = pair()

        def take(data: memoryview) -> int:
            raise ProtocolError("no")

        receiver.take = take
        sender.send(b"x")
        sender.flush()
        async with asyncio.timeout(10):
            assert str(await receiver.end) == "no"
            await sending.end

    run(main())


@pytest.mark.usefixtures("connect")
def test_a_peer_that_vanishes_ends_the_channel_once(run: Callable[..., object]) -> None:
    async def main() -> None:
        sender, sending, _, receiver = pair()
        sender.abort()
        async with asyncio.timeout(10):
            assert await sending.end is None
            await receiver.end
        sender.send(b"late")
        sender.flush()
        sender.close()

    run(main())


def test_a_reset_before_the_start_ends_the_channel_and_touches_no_other_socket(run: Callable[..., object]) -> None:
    """A server greets before it listens to the client; a client that is gone by then makes sending fail."""

    async def main() -> None:
        ours, theirs = plain_sockets()
        collector = Collector()
        theirs.close()
        channel = Channel(ours, collector)
        channel.send_owned(b"greeting")
        channel.flush()
        assert channel.is_closed
        left, right = plain_sockets()  # takes the number of the descriptor that was closed
        channel.start()
        channel.resume_reading()
        with left, right:
            right.send(b"not for the channel")
            await asyncio.sleep(0.01)
            assert left.recv(100) == b"not for the channel"
        assert isinstance(await collector.end, OSError)
        assert not collector.data

    run(main())


def test_a_reset_right_behind_data_ends_the_channel(run: Callable[..., object]) -> None:
    async def main() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        peer = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        listener.close()
        receiver = Collector()
        Channel(accepted, receiver).start()
        peer.sendall(b"half a message")
        # Linger of zero seconds: closing sends a reset instead of an orderly end.
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        async with asyncio.timeout(5):
            assert isinstance(await receiver.end, ConnectionResetError)
        assert bytes(receiver.data) in (b"", b"half a message")

    run(main())


@pytest.mark.usefixtures("connect")
def test_looking_for_bytes_shows_them_without_the_loop_and_gives_up_in_time(run: Callable[..., object]) -> None:
    async def main() -> None:
        sender, _, receiver, received = pair()
        for _ in range(5):
            await asyncio.sleep(0.01)
            assert not receiver.poll(0.001)
            sender.send(b"whole")
            sender.flush()
            assert receiver.poll(5)
        assert bytes(received.data) == b"whole" * 5
        sender.send_owned(b"x" * 1_000_000)
        sender.flush()
        assert receiver.poll(5)
        async with asyncio.timeout(10):  # what was not looked for comes by the loop
            while len(received.data) < 1_000_025:
                await asyncio.sleep(0.001)
        sender.abort()
        async with asyncio.timeout(10):
            while not receiver.is_closed:
                receiver.poll(0.001)
                await asyncio.sleep(0.001)
            await received.end

    run(main())
