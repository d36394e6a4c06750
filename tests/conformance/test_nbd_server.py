"""What the server promises honest clients: order, durability, errors, endings; and what our client makes of it."""

from __future__ import annotations

import asyncio
import errno
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop

from stillpoint.devices import MemoryDevice
from stillpoint.errors import DeviceError, NotFound, OutOfRange, PeerUnavailable, PermissionRefused
from stillpoint.extents import MappedExtent
from stillpoint.nbd import codec
from stillpoint.nbd import constants as c
from stillpoint.nbd.client import NbdClient
from stillpoint.nbd.export import DeviceExport
from tests.support.devices import Fault, FaultyDevice
from tests.support.nbd import RawClient, ServerThread

SIZE = 16 << 20
MIB = 1 << 20


@pytest.fixture
def device() -> Iterator[FaultyDevice]:
    device = FaultyDevice(MemoryDevice(SIZE))
    yield device
    device.close()


@pytest.fixture
def server(device: FaultyDevice) -> Iterator[ServerThread]:
    with ServerThread() as server:
        server.exports["vol1"] = DeviceExport("vol1", device, server.executor)
        server.exports["vol1@s1"] = DeviceExport("vol1@s1", device, server.executor, read_only=True)
        yield server
        assert server.stop()
        assert server.budget.free == server.budget.limit
        assert all(export.connection_count == 0 for export in server.exports.values())  # type: ignore[attr-defined]


def run(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(work, 30))


def read(device: FaultyDevice, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    device.read_into(offset, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize("length", [1, 4096, 60_000, 65_536, 200_000, 3 << 20, 16 << 20])
@pytest.mark.parametrize("cached", [True, False])
def test_data_of_every_size_goes_out_and_back(
    server: ServerThread, device: FaultyDevice, length: int, cached: bool
) -> None:
    device.never_cached = not cached
    data = random.Random(length).randbytes(length)

    async def scenario() -> None:
        async with await NbdClient.connect(server.uri("vol1")) as client:
            await client.write(SIZE - length, data)
            assert await client.read(SIZE - length, length) == data

    run(scenario())
    assert read(device, SIZE - length, length) == data


def test_a_batch_of_requests_is_answered_whole(server: ServerThread) -> None:
    with RawClient(server.port) as client:
        client.go("vol1")
        batch = b"".join(
            codec.Request(0, c.Command.WRITE, number, number * 4096, 4096).encode() + bytes([number]) * 4096
            for number in range(100)
        )
        client.send(batch)
        assert sorted(client.reply()[0] for _ in range(100)) == list(range(100))
        client.send(
            b"".join(codec.Request(0, c.Command.READ, number, number * 4096, 4096).encode() for number in range(100))
        )
        answers = {cookie: payload for cookie, _, payload in (client.reply() for _ in range(100))}
        assert answers == {number: bytes([number]) * 4096 for number in range(100)}


def test_requests_that_arrive_byte_by_byte_are_understood(server: ServerThread) -> None:
    with RawClient(server.port) as client:
        client.go("vol1")
        wire = codec.Request(0, c.Command.WRITE, 1, 0, 20).encode() + b"twenty bytes of data"
        for index in range(len(wire)):
            client.send(wire[index : index + 1])
            time.sleep(0.001)
        assert client.reply() == (1, 0, b"")
        client.request(c.Command.READ, 0, 20)
        assert client.reply()[2] == b"twenty bytes of data"


@pytest.mark.parametrize("command", ["flush", "write", "trim", "write_zeroes"])
def test_flush_and_fua_are_answered_after_the_device_has_flushed(
    server: ServerThread, device: FaultyDevice, command: str
) -> None:
    async def scenario() -> None:
        async with await NbdClient.connect(server.uri("vol1")) as client:
            await client.write(0, b"x" * 4096)
            assert device.flush_count == 0
            match command:
                case "flush":
                    await client.flush()
                case "write":
                    await client.write(0, b"y" * 4096, fua=True)
                case "trim":
                    await client.trim(0, 4096, fua=True)
                case _:
                    await client.write_zeroes(0, 4096, fua=True)
            assert device.flush_count == 1

    run(scenario())


def test_a_failed_flush_is_an_error_and_stays_one(server: ServerThread, device: FaultyDevice) -> None:
    device.flushes = Fault(errno.EIO, first=2, last=2)

    async def scenario() -> None:
        async with await NbdClient.connect(server.uri("vol1")) as client:
            await client.flush()
            for _ in range(3):
                with pytest.raises(DeviceError):
                    await client.flush()
            with pytest.raises(DeviceError):
                await client.write(0, b"x", fua=True)

    run(scenario())


def test_flushes_that_come_during_a_flush_share_the_next(server: ServerThread, device: FaultyDevice) -> None:
    device.flush_delay_s = 0.1

    async def scenario() -> None:
        async with await NbdClient.connect(server.uri("vol1")) as client:
            await asyncio.gather(*(client.flush() for _ in range(20)))

    run(scenario())
    assert device.flush_count <= 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("length", [4096, 100_000, 2 << 20])
def test_a_failed_write_is_its_own_error_and_the_next_works(
    server: ServerThread, device: FaultyDevice, number: int, length: int
) -> None:
    device.writes = Fault(number, first=2, last=2)

    async def scenario() -> None:
        async with await NbdClient.connect(server.uri("vol1")) as client:
            await client.write(0, b"x" * length)
            with pytest.raises(DeviceError, match=f"vol1: write of {length} bytes at 0") as raised:
                await client.write(0, b"y" * length)
            assert raised.value.errno == number
            await client.write(0, b"z" * length)

    run(scenario())


@pytest.mark.parametrize("length", [4096, 100_000, 2 << 20])
def test_a_failed_read_is_an_error_of_that_read_only(server: ServerThread, device: FaultyDevice, length: int) -> None:
    device.reads = Fault(errno.EIO, first=1, last=1)

    async def scenario() -> None:
        async with await NbdClient.connect(server.uri("vol1")) as client:
            with pytest.raises(DeviceError):
                await client.read(0, length)
            assert await client.read(0, length) == bytes(length)

    run(scenario())


def test_slow_reads_do_not_hold_up_others(server: ServerThread, device: FaultyDevice) -> None:
    device.read_delay_s = 0.3

    async def scenario() -> None:
        async with await NbdClient.connect(server.uri("vol1")) as client:
            slow = asyncio.create_task(client.read(0, 4096))
            await asyncio.sleep(0.05)
            await client.write(0, b"x" * 4096)
            assert not slow.done()
            await slow

    run(scenario())


def test_a_read_only_export_refuses_and_says_so(server: ServerThread) -> None:
    async def scenario() -> None:
        async with await NbdClient.connect(server.uri("vol1@s1")) as client:
            assert client.read_only
            with pytest.raises(PermissionRefused):
                await client.write(0, b"x")

    run(scenario())


def test_holes_are_told_and_zeroes_are_read_after_a_trim(server: ServerThread) -> None:
    async def scenario() -> None:
        async with await NbdClient.connect(server.uri("vol1")) as client:
            await client.write(0, b"x" * (4 * MIB))
            await client.trim(MIB, MIB)
            await client.write_zeroes(3 * MIB, MIB)
            assert await client.read(MIB, MIB) == bytes(MIB)
            assert [extent async for extent in client.extents(0, SIZE)] == [
                MappedExtent(0, MIB, hole=False),
                MappedExtent(MIB, MIB, hole=True),
                MappedExtent(2 * MIB, MIB, hole=False),
                MappedExtent(3 * MIB, SIZE - 3 * MIB, hole=True),
            ]

    run(scenario())


def test_block_status_of_thousands_of_extents_is_told_in_parts() -> None:
    count = 5000
    device = MemoryDevice(count * 8192)
    for number in range(count):
        device.write(number * 8192, [b"x" * 4096])

    async def scenario(address: str) -> None:
        async with await NbdClient.connect(address) as client:
            assert len(await client.block_status(0, client.size)) < count
            extents = [extent async for extent in client.extents(0, client.size)]
            assert len(extents) == 2 * count
            assert extents[-1].end == client.size

    with ServerThread() as server:
        server.exports["many"] = DeviceExport("many", device, server.executor)
        run(scenario(server.uri("many")))
        with RawClient(server.port) as client:
            client.go("many", contexts=["base:allocation"])
            client.request(c.Command.BLOCK_STATUS, 0, 1 << 20, flags=c.CommandFlag.REQ_ONE)
            assert codec.parse_block_status(memoryview(client.reply()[2])) == (1, [(4096, 0)])
    device.close()


def test_exports_come_and_go_while_the_server_runs(server: ServerThread, device: FaultyDevice) -> None:
    async def connect(name: str) -> None:
        await (await NbdClient.connect(server.uri(name))).close()

    with pytest.raises(NotFound):
        run(connect("late"))
    export = server.exports["late"] = DeviceExport("late", device, server.executor)
    run(connect("late"))
    with RawClient(server.port) as client, RawClient(server.port) as other:
        client.go("late")
        other.go("vol1")
        del server.exports["late"]
        assert server.run(server.server.drop(export))
        assert client.is_closed()
        assert other.ask(c.Command.FLUSH) == 0


def test_stopping_answers_what_is_in_flight(server: ServerThread, device: FaultyDevice) -> None:
    device.flush_delay_s = 0.3
    with RawClient(server.port) as client:
        client.go("vol1")
        client.request(c.Command.WRITE, 0, 5, payload=b"x" * 5)
        client.reply()
        cookie = client.request(c.Command.FLUSH)
        time.sleep(0.05)
        stopper = threading.Thread(target=server.stop)
        stopper.start()
        assert client.reply() == (cookie, 0, b"")
        assert client.is_closed()
        stopper.join()


def test_stopping_gives_up_on_a_device_that_hangs(device: FaultyDevice) -> None:
    device.flush_delay_s = 1.5
    with ServerThread() as server:
        server.exports["vol1"] = DeviceExport("vol1", device, server.executor)
        with RawClient(server.port) as client:
            client.go("vol1").request(c.Command.FLUSH)
            time.sleep(0.05)
            assert not server.stop(0.2)
            assert client.is_closed()


def test_a_goodbye_is_said_after_the_last_answer(server: ServerThread, device: FaultyDevice) -> None:
    device.flush_delay_s = 0.2
    with RawClient(server.port) as client:
        client.go("vol1")
        cookie = client.request(c.Command.FLUSH)
        client.request(c.Command.DISC)
        assert client.reply() == (cookie, 0, b"")
        assert client.is_closed()


def test_clients_share_a_small_budget_in_turn(device: FaultyDevice) -> None:
    async def one(address: str, seed: int) -> None:
        async with await NbdClient.connect(address) as client:
            data = random.Random(seed).randbytes(MIB)
            for _ in range(5):
                await asyncio.gather(*(client.write(seed * MIB, data) for _ in range(3)))
                pieces = await asyncio.gather(*(client.read(seed * MIB, MIB) for _ in range(3)))
                assert pieces == [data] * 3

    async def scenario(address: str) -> None:
        await asyncio.gather(*(one(address, seed) for seed in range(8)))

    with ServerThread(budget_size=2 * MIB) as server:
        server.exports["vol1"] = DeviceExport("vol1", device, server.executor)
        run(scenario(server.uri("vol1")))
        assert server.stop()
        assert server.budget.free == server.budget.limit


def test_a_write_with_one_byte_outside_is_refused_before_it_is_sent(server: ServerThread) -> None:
    async def scenario() -> None:
        async with await NbdClient.connect(server.uri("vol1")) as client:
            with pytest.raises(OutOfRange):
                await client.write(SIZE - 1, b"xx")
            with pytest.raises(OutOfRange):
                await client.read(SIZE, 1)

    run(scenario())


def test_a_client_whose_server_goes_away_says_so(server: ServerThread, device: FaultyDevice) -> None:
    device.flush_delay_s = 0.5

    async def scenario() -> None:
        client = await NbdClient.connect(server.uri("vol1"))
        flush = asyncio.create_task(client.flush())
        await asyncio.sleep(0.05)
        stopped = asyncio.get_running_loop().run_in_executor(None, server.stop, 0.1)
        with pytest.raises(PeerUnavailable, match="the connection ended"):
            await flush
        with pytest.raises(PeerUnavailable):
            await client.read(0, 1)
        await client.close()
        await stopped

    run(scenario())


# --- our client against a server that lies


def lying_server(answer: Callable[[codec.Request], bytes]) -> Callable[[], tuple[int, threading.Thread]]:
    """A server whose handshake is honest, for an export of 1 MiB, and whose answer to the first request is not."""
    import socket

    def start() -> tuple[int, threading.Thread]:
        listener = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            sock, _ = listener.accept()
            with listener, sock:
                ack = codec.OptionReply(c.Option.STRUCTURED_REPLY, c.OptionReplyKind.ACK).encode()
                context = codec.MetaContext(1, "base:allocation").encode()
                contexts = codec.OptionReply(c.Option.SET_META_CONTEXT, c.OptionReplyKind.META_CONTEXT, context)
                info = codec.OptionReply(c.Option.GO, c.OptionReplyKind.INFO, codec.ExportInfo(MIB, 1).encode())
                sock.sendall(codec.Greeting(3).encode() + ack + contexts.encode())
                sock.sendall(codec.OptionReply(c.Option.SET_META_CONTEXT, c.OptionReplyKind.ACK).encode())
                sock.sendall(info.encode() + codec.OptionReply(c.Option.GO, c.OptionReplyKind.ACK).encode())
                received = b""
                while len(received) < 28 or received[-28:-24] != b"\x25\x60\x95\x13":
                    received += sock.recv(65536)
                decoded = codec.decode_request(memoryview(received)[-28:])
                assert decoded is not None
                sock.sendall(answer(decoded[0]))
                while sock.recv(65536):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        return listener.getsockname()[1], thread

    return start


def chunk(request: codec.Request, kind: int, payload: bytes, *, length: int | None = None, done: bool = True) -> bytes:
    size = len(payload) if length is None else length
    return codec.ChunkHeader(int(done), kind, request.cookie, size).encode() + payload


LIES: dict[str, Callable[[codec.Request], bytes]] = {
    "garbage": lambda request: bytes(16),
    "an answer to nothing": lambda request: codec.SimpleReply(0, request.cookie + 1).encode(),
    "data of 4 GiB": lambda request: chunk(request, c.Chunk.OFFSET_DATA, bytes(8), length=2**32 - 1),
    "data before the range": lambda request: chunk(request, c.Chunk.OFFSET_DATA, (0).to_bytes(8, "big") + b"x" * 10),
    "data behind the range": lambda request: chunk(
        request, c.Chunk.OFFSET_DATA, (request.offset + request.length).to_bytes(8, "big") + b"x"
    ),
    "too little data": lambda request: chunk(
        request, c.Chunk.OFFSET_DATA, request.offset.to_bytes(8, "big") + b"x" * 10
    ),
    "no data": lambda request: chunk(request, c.Chunk.NONE, b""),
    "a hole too large": lambda request: chunk(
        request, c.Chunk.OFFSET_HOLE, codec.CHUNK_HOLE.pack(request.offset, 2**32 - 1)
    ),
    "an error chunk of 4 GiB": lambda request: chunk(request, c.Chunk.ERROR, b"", length=2**32 - 1),
    "an unknown chunk": lambda request: chunk(request, 77, b"x"),
    "a simple reply with data": lambda request: codec.SimpleReply(0, request.cookie).encode() + bytes(4096),
    "a status for a read": lambda request: chunk(request, c.Chunk.BLOCK_STATUS, bytes(12)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_is_left_with_an_error_that_names_it(lie: str) -> None:
    port, thread = lying_server(LIES[lie])()

    async def scenario() -> None:
        address = f"nbd://127.0.0.1:{port}/x"
        client = await NbdClient.connect(address)
        with pytest.raises(Exception, match=address) as raised:
            await client.read(4096, 4096)
        assert type(raised.value).__name__ == "ProtocolError"
        await client.close()

    run(scenario())
    thread.join()


def test_an_error_that_comes_after_data_fails_the_read() -> None:
    def answer(request: codec.Request) -> bytes:
        data = request.offset.to_bytes(8, "big") + bytes(request.length)
        failure = codec.CHUNK_ERROR.pack(c.Errno.EIO, 0)
        return chunk(request, c.Chunk.OFFSET_DATA, data, done=False) + chunk(request, c.Chunk.ERROR, failure)

    port, thread = lying_server(answer)()

    async def scenario() -> None:
        client = await NbdClient.connect(f"nbd://127.0.0.1:{port}/x")
        with pytest.raises(DeviceError):
            await client.read(0, 4096)
        await client.close()

    run(scenario())
    thread.join()


def test_random_operations_through_the_wire_agree_with_an_array_of_bytes(
    server: ServerThread, device: FaultyDevice
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    lanes = 8  # each works in its own part of the disk, all at the same time over two connections
    part = SIZE // lanes
    model = bytearray(SIZE)

    async def lane(client: NbdClient, start: int) -> None:
        for _ in range(60):
            length = choose.choice([1, 511, 4096, 65536, choose.randrange(1, 300_000)])
            offset = start + choose.randrange(part - length)
            match choose.randrange(6):
                case 0 | 1:
                    data = choose.randbytes(length)
                    await client.write(offset, data, fua=choose.random() < 0.1)
                    model[offset : offset + length] = data
                case 2:
                    await client.trim(offset, length)
                    model[offset : offset + length] = bytes(length)
                case 3:
                    await client.write_zeroes(offset, length, may_trim=choose.random() < 0.5)
                    model[offset : offset + length] = bytes(length)
                case 4:
                    device.never_cached = choose.random() < 0.3
                    await client.flush()
                case _:
                    assert await client.read(offset, length) == model[offset : offset + length]

    async def scenario() -> None:
        async with (
            await NbdClient.connect(server.uri("vol1")) as first,
            await NbdClient.connect(server.uri("vol1")) as second,
        ):
            await asyncio.gather(*(lane((first, second)[n % 2], n * part) for n in range(lanes)))
            assert await first.read(0, SIZE) == model

    run(scenario())
    assert read(device, 0, SIZE) == model
