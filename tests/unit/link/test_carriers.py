"""Both carriers of the data link keep one promise: ordered bytes both ways, back-pressure, tokens, one ending."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import grpc
import pytest
import uvloop

from stillpoint.channel import Receiver
from stillpoint.config import Address
from stillpoint.link import grpc as grpc_link
from stillpoint.link import tcp
from stillpoint.link.base import Link
from stillpoint.link.frames import MAX_PAYLOAD_SIZE, WRITE, FrameType, encode_header, read_frames
from stillpoint.link.tokens import TokenGate, Tokens
from stillpoint.nbd.listen import listen_tcp
from stillpoint.security.roles import Role
from stillpoint.tls import Credentials
from stillpoint.wire import streams
from stillpoint.wire.channel import SERVER_OPTIONS, open_channel
from stillpoint.wire.v1 import standby_pb2_grpc
from tests.support.pki import TestPki


class Frames:
    """Collects the frames that arrive."""

    def __init__(self) -> None:
        self.frames: list[tuple[int, bytes]] = []
        self.arrived = asyncio.Event()
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def received(self, data: memoryview, /) -> int:
        return read_frames(data, self._frame)

    def _frame(
        self, kind: int, flags: int, epoch: int, session: int, seq: int, offset: int, length: int, payload: memoryview
    ) -> None:
        self.frames.append((seq, bytes(payload)))
        self.arrived.set()

    def drained(self) -> None: ...

    def closed(self, error: Exception | None) -> None:
        self.ended.set_result(error)

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(20):
            while len(self.frames) < count:
                self.arrived.clear()
                await self.arrived.wait()


@dataclass
class Server:
    tokens: Tokens = field(default_factory=Tokens)
    links: list[Link] = field(default_factory=list)
    owners: list[Frames] = field(default_factory=list)

    def issue(self) -> bytes:
        def adopt(link: Link) -> Receiver:
            owner = Frames()
            self.links.append(link)
            self.owners.append(owner)
            return owner

        return self.tokens.issue(adopt)


Connect = Callable[[bytes, Receiver], Awaitable[Link]]


class StreamService(standby_pb2_grpc.StandbyServiceServicer):
    def __init__(self, server: Server) -> None:
        self._server = server

    async def MirrorStream(self, request: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        gate = TokenGate(self._server.tokens, "test")
        link = grpc_link.over_context(context, gate)
        gate.guard(link)
        await link.finished.wait()


Story = Callable[[Server, Connect], Awaitable[None]]


async def over_tcp(story: Story, credentials: Credentials | None = None) -> None:
    server = Server()
    listener = tcp.DataLinkListener(listen_tcp("127.0.0.1", 0), server.tokens, credentials)

    async def connect(token: bytes, receiver: Receiver) -> Link:
        return await tcp.connect(Address("127.0.0.1", listener.port), token, receiver, credentials=credentials)

    try:
        await story(server, connect)
    finally:
        listener.close()


async def over_grpc(story: Story) -> None:
    server = Server()
    rpc = grpc.aio.server(options=SERVER_OPTIONS)
    standby_pb2_grpc.add_StandbyServiceServicer_to_server(StreamService(server), streams.RawServer(rpc))  # type: ignore[no-untyped-call]
    port = rpc.add_insecure_port("127.0.0.1:0")
    await rpc.start()
    channel = open_channel(Address("127.0.0.1", port))

    async def connect(token: bytes, receiver: Receiver) -> Link:
        link = grpc_link.over_call(streams.mirror_stream(channel), receiver)
        link.send_owned(encode_header(FrameType.HELLO, 0, 0, 0, 0, 0, 0, token), token)
        link.flush()
        return link

    try:
        await story(server, connect)
    finally:
        await channel.close()
        await rpc.stop(0)


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    return TestPki(tmp_path_factory.mktemp("pki")).credentials(Role.DATA)


@pytest.fixture(params=["tcp", "tls", "grpc"])
def play(request: pytest.FixtureRequest, credentials: Credentials) -> Callable[[Story], None]:
    def run(story: Story) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            if request.param == "grpc":
                runner.run(over_grpc(story))
            else:
                runner.run(over_tcp(story, credentials if request.param == "tls" else None))

    return run


def write_frame(sequence: int, payload: bytes | bytearray) -> bytes:
    return encode_header(WRITE, 0, 1, 1, sequence, 0, len(payload), payload)


def test_frames_arrive_in_order_both_ways(play: Callable[[Story], None]) -> None:
    async def story(server: Server, connect: Connect) -> None:
        generator = random.Random(2)
        here = Frames()
        link = await connect(server.issue(), here)
        expected = []
        for sequence in range(1, 120):
            payload = bytearray(generator.randbytes(generator.choice([0, 16, 4096, 70_000, MAX_PAYLOAD_SIZE])))
            expected.append((sequence, bytes(payload)))
            link.send(write_frame(sequence, payload), payload)
            if generator.random() < 0.6:
                link.flush()
                payload[:] = bytes(len(payload))  # borrowed only until the flush
            while link.congested:
                await asyncio.sleep(0.001)
        link.flush()
        while not server.owners:
            await asyncio.sleep(0.001)
        await server.owners[0].wait_for(len(expected))
        assert server.owners[0].frames == expected
        server.links[0].send_owned(write_frame(1, b"back"), b"back")
        server.links[0].flush()
        await here.wait_for(1)
        assert here.frames == [(1, b"back")]
        link.abort()
        async with asyncio.timeout(10):
            await server.owners[0].ended
            assert await here.ended is None

    play(story)


@pytest.mark.parametrize("token", [b"", b"x" * 32, b"y" * 200])
def test_a_token_that_was_not_given_out_ends_the_link(play: Callable[[Story], None], token: bytes) -> None:
    async def story(server: Server, connect: Connect) -> None:
        server.issue()
        here = Frames()
        await connect(token, here)
        async with asyncio.timeout(10):
            await here.ended
        assert not server.links

    play(story)


def test_a_token_is_good_for_one_link(play: Callable[[Story], None]) -> None:
    async def story(server: Server, connect: Connect) -> None:
        token = server.issue()
        first, second = Frames(), Frames()
        link = await connect(token, first)
        async with asyncio.timeout(10):
            while not server.links:
                await asyncio.sleep(0.001)
            await connect(token, second)
            await second.ended
        assert len(server.links) == 1
        assert not first.ended.done()
        link.abort()
        await first.ended

    play(story)


def test_a_receiver_that_pauses_pushes_the_sender_back(play: Callable[[Story], None]) -> None:
    async def story(server: Server, connect: Connect) -> None:
        here = Frames()
        link = await connect(server.issue(), here)
        async with asyncio.timeout(10):
            while not server.links:
                await asyncio.sleep(0.001)
        server.links[0].pause_reading()
        payload = bytes(MAX_PAYLOAD_SIZE)
        sent = 0
        for _ in range(64):
            sent += 1
            link.send_owned(write_frame(sent, payload), payload)
            link.flush()
            await asyncio.sleep(0.005)
            if link.congested:
                break
        assert link.congested
        server.links[0].resume_reading()
        await server.owners[0].wait_for(sent)
        async with asyncio.timeout(10):
            while link.congested:
                await asyncio.sleep(0.001)
        link.abort()
        await here.ended

    play(story)


def test_garbage_instead_of_hello_ends_the_link(play: Callable[[Story], None]) -> None:
    async def story(server: Server, connect: Connect) -> None:
        here = Frames()
        link = await connect(b"z" * 32, here)
        link.send_owned(b"\xff" * 100)
        link.flush()
        async with asyncio.timeout(10):
            await here.ended
        assert not server.links

    play(story)
