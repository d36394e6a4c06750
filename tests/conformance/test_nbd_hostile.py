"""Malformed input over a real socket. After each of it the same server serves on, and has not grown."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.support import resident_bytes
from stillpoint.devices import MemoryDevice
from stillpoint.nbd import codec
from stillpoint.nbd import constants as c
from stillpoint.nbd.export import DeviceExport
from tests.support.devices import FaultyDevice
from tests.support.nbd import RawClient, ServerThread, serve_file

SIZE = 64 << 20
MIB = 1 << 20
PATTERN = b"precious" * 512


@pytest.fixture
def device() -> Iterator[FaultyDevice]:
    device = FaultyDevice(MemoryDevice(SIZE))
    device.write(0, [PATTERN])
    yield device
    device.close()


@pytest.fixture
def server(device: FaultyDevice) -> Iterator[ServerThread]:
    with ServerThread() as server:
        server.exports["vol1"] = DeviceExport("vol1", device, server.executor)
        server.exports["readonly"] = DeviceExport("readonly", device, server.executor, read_only=True)
        yield server
        assert_serves(server)
        wait_until(lambda: server.server.connection_count == 0)
        assert server.budget.free == server.budget.limit


@pytest.fixture
def client(server: ServerThread) -> Iterator[RawClient]:
    with RawClient(server.port) as client:
        yield client


def assert_serves(server: ServerThread) -> None:
    with RawClient(server.port) as client:
        client.go("vol1")
        cookie = client.request(c.Command.READ, 0, len(PATTERN))
        assert client.reply() == (cookie, 0, PATTERN)


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def assert_in_step(client: RawClient) -> None:
    """The connection still understands where one request ends and the next begins."""
    cookie = client.request(c.Command.READ, 0, 8)
    assert client.reply() == (cookie, 0, b"precious")


def option_header(code: int, length: int) -> bytes:
    return struct.pack(">QII", c.OPTION_MAGIC, code, length)


# --- the handshake


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        codec.ClientFlags(0xFFFFFFFF).encode(),
        codec.ClientFlags(3).encode() + b"IHAVEOPX" + bytes(8),
        codec.ClientFlags(3).encode() + b"garbage",
        codec.ClientFlags(3).encode() + option_header(99, 0xFFFFFFFF),
        codec.ClientFlags(3).encode() + option_header(c.Option.GO, 1 << 20),
        codec.ClientFlags(3).encode() + codec.Request(0, c.Command.READ, 1, 0, 512).encode(),
        codec.ClientFlags(3).encode() + codec.OptionRequest(c.Option.EXPORT_NAME, b"../../etc/passwd").encode(),
        codec.ClientFlags(3).encode() + codec.OptionRequest(c.Option.EXPORT_NAME, b"\xff\xfe").encode(),
    ],
    ids=[
        "a web browser",
        "unknown client flags",
        "wrong option magic",
        "garbage for an option",
        "an unknown option of 4 GiB",
        "GO of 1 MiB",
        "a request before GO",
        "EXPORT_NAME of a path",
        "EXPORT_NAME not UTF-8",
    ],
)
def test_garbage_in_the_handshake_closes_the_connection(client: RawClient, data: bytes) -> None:
    client.receive(18)
    client.send(data)
    assert client.is_closed()


@pytest.mark.parametrize(
    ("code", "payload", "answer"),
    [
        (99, b"small", c.OptionReplyKind.ERR_UNSUP),
        (c.Option.STARTTLS, b"", c.OptionReplyKind.ERR_UNSUP),
        (c.Option.GO, b"\0\0\0\xffvol1\0\0", c.OptionReplyKind.ERR_INVALID),
        (c.Option.GO, b"\0\0\0\x04vol1\xff\xff\0\x03", c.OptionReplyKind.ERR_INVALID),
        (c.Option.INFO, b"", c.OptionReplyKind.ERR_INVALID),
        (c.Option.LIST, b"payload", c.OptionReplyKind.ERR_INVALID),
        (c.Option.STRUCTURED_REPLY, b"payload", c.OptionReplyKind.ERR_INVALID),
        (c.Option.SET_META_CONTEXT, codec.MetaContextRequest("vol1").encode(), c.OptionReplyKind.ERR_INVALID),
        (c.Option.GO, codec.GoRequest("../vol1").encode(), c.OptionReplyKind.ERR_UNKNOWN),
        (c.Option.GO, codec.GoRequest("/etc/passwd").encode(), c.OptionReplyKind.ERR_UNKNOWN),
        (c.Option.GO, b"\0\0\0\x05vol1\0\0\0", c.OptionReplyKind.ERR_INVALID),
        (c.Option.GO, b"\0\0\0\x02\xff\xfe\0\0", c.OptionReplyKind.ERR_INVALID),
        (c.Option.GO, codec.GoRequest("n" * 5000).encode(), c.OptionReplyKind.ERR_INVALID),
    ],
)
def test_a_bad_option_is_answered_and_the_handshake_goes_on(
    client: RawClient, code: int, payload: bytes, answer: int
) -> None:
    client.greet()
    reply = client.option(code, payload)[-1]
    assert reply.kind == answer
    assert len(reply.payload) <= 4096
    assert client.answer(c.Option.GO, codec.GoRequest("vol1").encode()) == c.OptionReplyKind.ACK
    client.request(c.Command.READ, 0, 8)
    assert client.receive(16 + 8)[16:] == b"precious"


def test_queries_that_overrun_are_invalid(client: RawClient) -> None:
    client.greet()
    client.answer(c.Option.STRUCTURED_REPLY)
    for payload in (b"\0\0\0\x04vol1\xff\xff\xff\xff", b"\0\0\0\x04vol1\0\0\0\x01\0\0\1\0base:"):
        assert client.answer(c.Option.SET_META_CONTEXT, payload) == c.OptionReplyKind.ERR_INVALID


def test_more_options_than_anyone_needs_close_the_connection(client: RawClient) -> None:
    client.greet()
    client.send(codec.OptionRequest(1000).encode() * 300)
    with pytest.raises(ConnectionError):
        client.receive(300 * 20 + 300 * len(b"unknown option"))


def test_handshakes_that_never_end_are_ended() -> None:
    with ServerThread(handshake_timeout_s=0.3) as server:
        clients = [RawClient(server.port) for _ in range(50)]
        for number, client in enumerate(clients):
            client.receive(18)
            if number % 2:
                client.send(codec.ClientFlags(3).encode() + b"IHAVE")
        assert all(client.is_closed() for client in clients)
        for client in clients:
            client.socket.close()
        wait_until(lambda: server.server.connection_count == 0)


def test_connections_above_the_limit_are_closed_at_once(device: FaultyDevice) -> None:
    with ServerThread(connection_max=3) as server:
        server.exports["vol1"] = DeviceExport("vol1", device, server.executor)
        clients = [RawClient(server.port).go("vol1") for _ in range(3)]
        with RawClient(server.port) as extra:
            assert extra.is_closed()
        clients.pop().socket.close()
        wait_until(lambda: server.server.connection_count == 2)
        assert_serves(server)
        for client in clients:
            client.socket.close()


# --- requests


def test_a_wrong_request_magic_closes_the_connection(client: RawClient) -> None:
    client.go("vol1")
    client.send(bytes(28))
    assert client.is_closed()


READ_ONE = c.CommandFlag.REQ_ONE


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "errno"),
    [
        (c.Command.READ, SIZE, 1, 0, c.Errno.EINVAL),
        (c.Command.READ, SIZE - 1, 2, 0, c.Errno.EINVAL),
        (c.Command.READ, 2**64 - 1, 1, 0, c.Errno.EINVAL),
        (c.Command.READ, 2**64 - 1, 2**32 - 1, 0, c.Errno.EINVAL),
        (c.Command.READ, 0, 2**32 - 1, 0, c.Errno.EINVAL),
        (c.Command.READ, 0, (32 << 20) + 1, 0, c.Errno.EINVAL),
        (c.Command.READ, 0, 512, 0x8000, c.Errno.EINVAL),
        (c.Command.READ, 0, 1 << 20, 0x8000, c.Errno.EINVAL),
        (c.Command.READ, 0, 512, READ_ONE, c.Errno.EINVAL),
        (c.Command.READ, 2**64 - 1, 0, 0, c.Errno.EINVAL),
        (c.Command.TRIM, SIZE, 1, 0, c.Errno.EINVAL),
        (c.Command.TRIM, 2**64 - 1, 2**32 - 1, 0, c.Errno.EINVAL),
        (c.Command.TRIM, 0, 512, c.CommandFlag.NO_HOLE, c.Errno.EINVAL),
        (c.Command.WRITE_ZEROES, SIZE - 1, 2, 0, c.Errno.ENOSPC),
        (c.Command.WRITE_ZEROES, 0, 512, c.CommandFlag.FAST_ZERO, c.Errno.EINVAL),
        (c.Command.CACHE, SIZE, 1, 0, c.Errno.EINVAL),
        (c.Command.FLUSH, 0, 0, c.CommandFlag.DF, c.Errno.EINVAL),
        (c.Command.BLOCK_STATUS, 0, 512, 0, c.Errno.EINVAL),
        (8, 0, 512, 0, c.Errno.EINVAL),
        (0xFFFF, 0, 0, 0, c.Errno.EINVAL),
        (c.Command.TRIM, SIZE, 0, 0, c.Errno.OK),
        (c.Command.WRITE_ZEROES, 5, 0, 0, c.Errno.OK),
        (c.Command.CACHE, 0, 0, 0, c.Errno.OK),
    ],
)
def test_each_bad_request_has_its_errno_and_the_connection_stays(
    server: ServerThread, structured: bool, command: int, offset: int, length: int, flags: int, errno: int
) -> None:
    with RawClient(server.port) as client:
        client.go("vol1", structured=structured)
        assert client.ask(command, offset, length, flags=flags) == errno
        assert client.ask(c.Command.WRITE, 0, 8, payload=b"precious") == 0


def test_df_needs_structured_replies(client: RawClient) -> None:
    client.go("vol1", structured=False)
    assert client.ask(c.Command.READ, 0, 512, flags=c.CommandFlag.DF) == c.Errno.EINVAL


@pytest.mark.parametrize("structured", [True, False])
def test_zero_length_requests_neither_act_nor_hang(server: ServerThread, structured: bool) -> None:
    with RawClient(server.port) as client:
        client.go("vol1", structured=structured)
        for command in (c.Command.READ, c.Command.WRITE, c.Command.TRIM, c.Command.WRITE_ZEROES, c.Command.CACHE):
            assert client.ask(command, 4096, 0) == 0


@pytest.mark.parametrize("length", [512, 100_000, 4 << 20, 32 << 20])
@pytest.mark.parametrize(
    ("name", "offset", "flags", "errno"),
    [
        ("vol1", SIZE - 256, 0, c.Errno.ENOSPC),
        ("vol1", 2**64 - 1, 0, c.Errno.ENOSPC),
        ("vol1", 0, 0x4000, c.Errno.EINVAL),
        ("vol1", 0, c.CommandFlag.PAYLOAD_LEN, c.Errno.EINVAL),
        ("readonly", 0, 0, c.Errno.EPERM),
    ],
)
def test_a_refused_write_is_drained_and_changes_nothing(
    client: RawClient, name: str, offset: int, flags: int, errno: int, length: int
) -> None:
    client.go(name)
    assert client.ask(c.Command.WRITE, offset, length, flags=flags, payload=bytes(length)) == errno
    assert_in_step(client)


def test_changes_to_a_read_only_export_are_refused(client: RawClient) -> None:
    client.go("readonly")
    assert client.ask(c.Command.TRIM, 0, 4096) == c.Errno.EPERM
    assert client.ask(c.Command.WRITE_ZEROES, 0, 4096) == c.Errno.EPERM
    assert client.ask(c.Command.FLUSH) == 0
    assert_in_step(client)


@pytest.mark.parametrize("length", [(32 << 20) + 1, 2**32 - 1])
def test_a_write_larger_than_allowed_closes_at_once(client: RawClient, length: int) -> None:
    client.go("vol1")
    client.request(c.Command.WRITE, 0, length)
    assert client.is_closed()


@pytest.mark.parametrize("end", ["half-close", "reset"])
@pytest.mark.parametrize(("length", "sent"), [(4096, 4095), (60_000, 1), (100_000, 99_999), (32 << 20, 5 << 20)])
def test_a_write_that_breaks_off_is_not_applied_at_all(
    server: ServerThread, device: FaultyDevice, end: str, length: int, sent: int
) -> None:
    client = RawClient(server.port).go("vol1")
    client.request(c.Command.WRITE, 0, length, payload=b"\xff" * sent)
    if end == "half-close":
        client.socket.shutdown(socket.SHUT_WR)
        assert client.is_closed()
    else:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.socket.close()
    wait_until(lambda: server.server.connection_count == 0)
    assert device.write_count == 1  # the pattern
    buffer = bytearray(len(PATTERN))
    device.read_into(0, memoryview(buffer))
    assert buffer == PATTERN


def test_block_status_of_the_largest_length_over_one_huge_extent() -> None:
    device = MemoryDevice(1 << 40)
    with ServerThread() as server:
        server.exports["huge"] = DeviceExport("huge", device, server.executor)
        with RawClient(server.port) as client:
            client.go("huge", contexts=["base:allocation"])
            for offset in (0, 1 << 39, (1 << 40) - (2**32 - 1)):
                client.request(c.Command.BLOCK_STATUS, offset, 2**32 - 1)
                _, errno, payload = client.reply()
                assert errno == 0
                assert codec.parse_block_status(memoryview(payload)) == (1, [(2**32 - 1, 3)])
    device.close()


# --- memory, measured on a process of its own


@pytest.fixture
def process(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Port and process id of a server on a sparse file."""
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(SIZE)
    with serve_file("--file", tmp_path / "disk") as (address, pid):
        port = int(address.rsplit(":", 1)[1].rstrip("/"))
        yield port, pid


def test_answers_that_are_never_read_stay_bounded(process: tuple[int, int]) -> None:
    port, pid = process
    with RawClient(port) as client:
        client.go("")
        before = resident_bytes(pid)
        request = codec.Request(0, c.Command.READ, 1, 0, MIB).encode()
        client.send(request * 4000)
        time.sleep(1)
        # The budget for answers, the send queue, and some slack.
        assert resident_bytes(pid) - before < 80 * MIB
        with RawClient(port) as other:
            other.go("")
            assert other.ask(c.Command.READ, 0, 4096) == 0


def test_small_answers_that_are_never_read_stay_bounded(process: tuple[int, int]) -> None:
    port, pid = process
    with RawClient(port) as client:
        client.go("")
        before = resident_bytes(pid)
        client.send(codec.Request(0, c.Command.READ, 1, 0, 4096).encode() * 9000)
        time.sleep(0.5)
        assert resident_bytes(pid) - before < 8 * MIB


def test_a_huge_write_without_its_payload_takes_no_memory(process: tuple[int, int]) -> None:
    port, pid = process
    with RawClient(port) as client:
        client.go("")
        before = resident_bytes(pid)
        client.request(c.Command.WRITE, 0, 2**32 - 1)
        assert client.is_closed()
        assert resident_bytes(pid) - before < 4 * MIB


def test_garbage_again_and_again_does_not_grow_the_server(process: tuple[int, int]) -> None:
    port, pid = process

    def misbehave(times: int) -> None:
        for number in range(times):
            with RawClient(port) as client:
                if number % 3 == 0:
                    client.receive(18)
                    client.send(b"garbage!" * 100)
                elif number % 3 == 1:
                    client.go("").send(bytes(100))
                else:
                    client.go("").request(c.Command.WRITE, 0, 32 << 20, payload=bytes(100_000))
                    client.socket.shutdown(socket.SHUT_WR)
                with pytest.raises((ConnectionError, AssertionError)):
                    client.receive(1 << 20)

    misbehave(30)
    before = resident_bytes(pid)
    misbehave(150)
    deadline = time.monotonic() + 10
    while (grown := resident_bytes(pid) - before) >= 4 * MIB:  # the last of them may still be on its way out
        assert time.monotonic() < deadline, grown
        time.sleep(0.05)


@pytest.mark.slow
def test_eight_clients_with_the_largest_writes_stay_below_200_mb(process: tuple[int, int]) -> None:
    port, pid = process
    length = 32 << 20
    clients = [RawClient(port).go("") for _ in range(8)]
    payload = bytes(length)
    peak = 0
    for _ in range(3):
        message = codec.Request(0, c.Command.WRITE, 77, 0, length).encode() + payload
        rest = {client: memoryview(message) for client in clients}
        for client in clients:
            client.socket.setblocking(False)
        while rest:
            for client in list(rest):
                try:
                    sent = client.socket.send(rest[client])
                except BlockingIOError:
                    continue
                rest[client] = rest[client][sent:]
                if not rest[client]:
                    del rest[client]
            peak = max(peak, resident_bytes(pid))
        for client in clients:
            client.socket.settimeout(20)
            assert client.reply() == (77, 0, b"")
    for client in clients:
        client.socket.close()
    assert peak < 200e6
