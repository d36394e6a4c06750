"""What a hostile peer says to each listener of a running cluster, and how it is said."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Final

import grpc

from stillpoint.config import Address
from stillpoint.wire import chunks
from stillpoint.wire.v1 import (
    backup_pb2,
    common_pb2,
    export_pb2,
    primary_pb2,
    standby_pb2,
    standby_pb2_grpc,
)
from tests.fuzz.mutation import Mutator
from tests.support.replica import primary_state

UUID_OF_OURS = "0f0e0d0c-0b0a-4908-8706-050403020100"

_AT_ONCE: Final = 24
# The server must have ended the connection by then: the client has said that it is done.
_PATIENCE_S: Final = 20.0

# What a caller gets when nobody has thought of its mistake.
_NO_ANSWERS: Final = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED)

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


async def at_once(count: int, one: Callable[[int], Awaitable[None]]) -> None:
    """Call `one` so many times, several at a time. The first error ends all."""
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await one(number)

    async with asyncio.TaskGroup() as group:
        for _ in range(_AT_ONCE):
            group.create_task(worker())


async def say(address: Address, pieces: Iterable[bytes], *, reset: bool = False, listen_s: float | None = None) -> None:
    """Connect, send all of it, half-close or reset, and take what comes until the server closes.

    listen_s: hang up after so long; None: fail when the server takes longer than it ever should.
    """
    with contextlib.closing(socket.socket()) as sock:
        sock.setblocking(False)
        with contextlib.suppress(TimeoutError) if listen_s is not None else contextlib.nullcontext():
            async with asyncio.timeout(listen_s or _PATIENCE_S):
                await _say(sock, address, pieces, reset=reset)


async def _say(sock: socket.socket, address: Address, pieces: Iterable[bytes], *, reset: bool) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionError, BrokenPipeError):
        while True:
            try:
                await loop.sock_connect(sock, (address.host, address.port))
                break
            except ConnectionRefusedError:  # a gRPC server that is just being started again
                await asyncio.sleep(0.02)
        for piece in pieces:
            await loop.sock_sendall(sock, piece)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        with contextlib.suppress(OSError):  # the server may have reset it already
            sock.shutdown(socket.SHUT_WR)
        while await loop.sock_recv(sock, 1 << 16):
            pass


async def listen_badly(
    address: Address,
    corpus: Sequence[bytes],
    count: int,
    randomness: random.Random,
    *,
    before: bytes = b"",
    listen_s: float | None = None,
) -> None:
    """`count` connections, each of which says `before` rightly and then something mutated."""
    mutator = Mutator(corpus, randomness)

    async def one(number: int) -> None:
        said = before + next(mutator.inputs(1))
        await say(address, mutator.pieces(said), reset=number % 10 == 0, listen_s=listen_s)

    await at_once(count, one)


async def recorded_grpc_calls(address: Address) -> list[bytes]:
    """The bytes that a real gRPC client sends for a few calls, taken by a proxy before `address`."""
    taken: list[bytearray] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_server, from_server = await asyncio.open_connection(address.host, address.port), bytearray()
        taken.append(from_server)

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter, record: bytearray | None) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(1 << 16):
                    if record is not None:
                        record += data
                    target.write(data)
            target.close()

        await asyncio.gather(pump(reader, to_server[1], from_server), pump(to_server[0], writer, None))

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = proxy.sockets[0].getsockname()[1]
    for method in ("stillpoint.wire.v1.PrimaryService/GetStatus", "grpc.health.v1.Health/Check"):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call: Any = channel.unary_unary(f"/{method}")
            with contextlib.suppress(grpc.RpcError):
                await call(b"", metadata=(("x-name", "value"),), timeout=5)
    proxy.close()
    return [bytes(each) for each in taken if each.startswith(PREFACE)]


# By service: requests that each method takes, with names that exist where that leads deeper. Left out is what writes to
# paths of the caller's choice, which would be this machine's.
def calls(volume: str) -> dict[str, list[tuple[str, Any]]]:
    extent: dict[str, Any] = {"volume": volume, "snapshot": "s1"}
    return {
        "PrimaryService": [
            ("GetVolume", primary_pb2.GetVolumeRequest(name=volume)),
            ("ListVolumes", common_pb2.Empty()),
            ("ResizeVolume", primary_pb2.ResizeVolumeRequest(name=volume, size=1 << 20)),
            ("Freeze", primary_pb2.FreezeRequest(volumes=[volume], limit_ms=50)),
            ("Thaw", primary_pb2.FreezeId(id="x")),
            ("VerifyMirror", primary_pb2.VerifyMirrorRequest(volume=volume)),
            ("GetStatus", common_pb2.Empty()),
        ],
        "StandbyService": [
            ("ResizeMirror", standby_pb2.ResizeMirrorRequest(volume=volume, volume_uuid="u", size=1 << 20)),
            ("OpenLink", standby_pb2.OpenLinkRequest(protocol_max=9, volume=volume, volume_uuid="u", size=1 << 20)),
            ("ListSnapshots", standby_pb2.ListSnapshotsRequest(volume=volume)),
            ("GetSnapshot", standby_pb2.SnapshotName(volume=volume, name="s1")),
            ("DeleteSnapshot", standby_pb2.DeleteSnapshotRequest(volume=volume, name="none")),
            ("ProtectSnapshot", standby_pb2.ProtectSnapshotRequest(volume=volume, name="none", protected=True)),
            ("ListBookmarks", standby_pb2.ListBookmarksRequest(volume=volume)),
            ("DeleteBookmark", standby_pb2.BookmarkName(volume=volume, name="b")),
            ("ListStores", common_pb2.Empty()),
            ("DeleteStore", standby_pb2.DeleteStoreRequest(name="none")),
            ("GetStatus", common_pb2.Empty()),
        ],
        "ExportService": [
            ("ReadSnapshot", export_pb2.ReadSnapshotRequest(**extent, offset=4096, length=8192)),
            ("ChangedExtents", export_pb2.ChangedExtentsRequest(**extent, base="b")),
            ("DescribeSnapshot", export_pb2.DescribeSnapshotRequest(**extent)),
            ("GetStatus", common_pb2.Empty()),
        ],
        "BackupService": [
            ("ListBackups", backup_pb2.ListBackupsRequest(volume=volume)),
            ("GetBackup", backup_pb2.BackupId(id="20261123T101639-vol1-3c58")),
            ("VerifyBackup", backup_pb2.BackupId(id="20261123T101639-vol1-3c58")),
            ("GetStatus", common_pb2.Empty()),
        ],
    }


async def call_badly(
    address: Address, service: str, requests: Sequence[tuple[str, Any]], count: int, randomness: random.Random
) -> None:
    """Calls with mutated messages. Each ends with an answer or a status that says what is wrong."""
    corpora = [(method, Mutator([message.SerializeToString()], randomness)) for method, message in requests]
    async with grpc.aio.insecure_channel(str(address)) as channel:

        async def one(number: int) -> None:
            method, mutator = corpora[number % len(corpora)]
            request = next(mutator.inputs(1))
            stub: Any = channel.unary_stream(f"/stillpoint.wire.v1.{service}/{method}")
            call = stub(request, timeout=_PATIENCE_S)
            try:
                async for _ in call:
                    pass
            except grpc.aio.AioRpcError as error:
                # A message that is none: grpc itself answers so, before any of our code.
                if "DecodeError" in (error.details() or ""):
                    return
                if error.code() in _NO_ANSWERS or "internal error" in (error.details() or ""):
                    raise AssertionError(f"{service}.{method}({request!r}): {error.details()}") from error

        await at_once(count, one)


class MirrorOfOurs:
    """A mirror made for the fuzzer alone: its sessions can be opened by whoever knows its uuid."""

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        make_stub: Any = standby_pb2_grpc.StandbyServiceStub
        self._stub = make_stub(channel)
        self._raw: Any = channel.stream_stream("/stillpoint.wire.v1.StandbyService/MirrorStream")
        self._name = name

    async def create(self, size: int) -> None:
        request = standby_pb2.CreateMirrorRequest(
            volume=self._name, volume_uuid=UUID_OF_OURS, size=size, block_size=65536
        )
        await self._stub.CreateMirror(request)
        self._size = size
        self._replica = primary_state(UUID_OF_OURS, size=size)  # of one primary, whose sessions follow each other

    async def delete(self) -> None:
        request = standby_pb2.DeleteMirrorRequest(volume=self._name, volume_uuid=UUID_OF_OURS, force=True)
        await self._stub.DeleteMirror(request)

    async def open(self) -> Any:
        request = standby_pb2.OpenLinkRequest(
            protocol_min=1,
            protocol_max=1,
            volume=self._name,
            volume_uuid=UUID_OF_OURS,
            size=self._size,
            replica=self._replica,
        )
        return await self._stub.OpenLink(request)

    async def stream(self, messages: Sequence[bytes]) -> None:
        """Over gRPC instead of TCP."""

        async def sent() -> AsyncIterator[bytes]:
            for message in messages:
                yield chunks.encode_frames(message)

        with contextlib.suppress(grpc.RpcError):
            # grpc may leave a call open whose handler has returned while it was writing; the caller's limit ends it.
            async for _ in self._raw(sent(), timeout=1.0):
                pass
