"""The parsers of what comes over a network."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from google.protobuf.message import DecodeError

from stillpoint.devices import MemoryDevice
from stillpoint.link import frames
from stillpoint.link.frames import FrameType, Watermarks
from stillpoint.nbd import codec
from stillpoint.nbd import constants as c
from stillpoint.nbd.client_session import ClientSession
from stillpoint.nbd.export import DeviceExport
from stillpoint.nbd.session import ServerSession, State
from stillpoint.wire import chunks
from stillpoint.wire.v1 import backup_pb2, common_pb2, primary_pb2, standby_pb2
from tests.fuzz.exchanges import client_handshakes, data_link_frames, repaired_frames
from tests.fuzz.parser import Parser

_EXECUTOR: Final = ThreadPoolExecutor(1)


# --- NBD


def _exports() -> dict[str, DeviceExport]:
    return {name: DeviceExport(name, MemoryDevice(1 << 20), _EXECUTOR) for name in ("vol1", "other@snap")}


_EXPORTS: Final = _exports()


def feed_server_session(data: bytes) -> None:
    session = ServerSession(_EXPORTS)
    session.output()
    view = memoryview(data)
    while session.state not in (State.ENDED, State.TRANSMISSION) and (consumed := session.receive(view)):
        view = view[consumed:]
        assert len(session.output()) < 1 << 16


def feed_client_session(data: bytes) -> None:
    session = ClientSession("vol1")
    view = memoryview(data)
    while consumed := session.receive(view):
        view = view[consumed:]
        session.output()


def feed_replies(data: bytes) -> None:
    view = memoryview(data)
    while decoded := codec.decode_reply(view):
        reply, size = decoded
        view = view[size:]
        if isinstance(reply, codec.ChunkHeader):
            if reply.kind == c.Chunk.BLOCK_STATUS:
                codec.parse_block_status(view[: reply.length])
            view = view[reply.length :]


def server_handshakes() -> list[bytes]:
    """What our server answers to our client, up to transmission."""
    server, client = ServerSession(_EXPORTS), ClientSession("vol1")
    said = bytearray()
    while output := server.output():
        said += output
        view = memoryview(output)
        while consumed := client.receive(view):
            view = view[consumed:]
        for _ in range(4):
            request = memoryview(client.output())
            while request and server.state is not State.TRANSMISSION and (consumed := server.receive(request)):
                request = request[consumed:]
    return [bytes(said)]


def replies() -> list[bytes]:
    status = codec.encode_block_status(7, 1, [(4096, 0), (8192, 3)], last=True)
    data = codec.ChunkHeader(c.CHUNK_FLAG_DONE, c.Chunk.OFFSET_DATA, 7, 8 + 16).encode() + bytes(24)
    return [codec.SimpleReply(0, 7).encode(), status, data, codec.encode_error_chunk(7, 5), status + status]


# --- the data link


def feed_frames(data: bytes) -> None:
    def handle(kind: int, flags: int, *rest: Any) -> None:
        if kind == FrameType.ACK:
            Watermarks.decode(rest[-1])

    frames.read_frames(memoryview(data), handle)


# --- messages


def feed_messages(data: bytes) -> None:
    for message in (
        primary_pb2.CreateVolumeRequest,
        standby_pb2.OpenLinkRequest,
        standby_pb2.StandbyStatus,
        backup_pb2.RestoreBackupRequest,
    ):
        with contextlib.suppress(DecodeError):
            message.FromString(data)


def feed_chunks(data: bytes) -> None:
    chunks.decode(data)


def feed_frames_message(data: bytes) -> None:
    chunks.decode_frames(data)


WIRE_PARSERS: Final[Mapping[str, Parser]] = {
    "nbd server handshake": Parser(client_handshakes(), feed_server_session),
    "nbd client handshake": Parser(server_handshakes(), feed_client_session),
    "nbd replies": Parser(replies(), feed_replies),
    "data link frames": Parser(data_link_frames(), feed_frames, repaired=repaired_frames),
    "chunk messages": Parser([chunks.encode_data(4096, b"x" * 100), chunks.encode_hole(1 << 40, 1 << 30)], feed_chunks),
    "frame messages": Parser([chunks.encode_frames(b"f" * 200)], feed_frames_message),
    "protobuf messages": Parser(
        [
            primary_pb2.CreateVolumeRequest(name="v", size=1 << 40, device_paths=["/dev/x"]).SerializeToString(),
            standby_pb2.OpenLinkRequest(volume="v", volume_uuid="u", size=1).SerializeToString(),
            common_pb2.NodeInfo(node="n", version="1", pid=7).SerializeToString(),
        ],
        feed_messages,
    ),
}
