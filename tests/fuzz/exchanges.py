"""What peers say when they mean well: the corpus that is mutated."""

from __future__ import annotations

import struct
import zlib

from stillpoint.link.frames import HEADER_SIZE, FrameType, Watermarks, encode_header
from stillpoint.nbd import codec
from stillpoint.nbd import constants as c


def client_handshakes() -> list[bytes]:
    """What clients send until transmission, in every form that we answer."""
    options: tuple[list[codec.OptionRequest], ...] = (
        [],
        [codec.OptionRequest(c.Option.LIST)],
        [codec.OptionRequest(c.Option.STARTTLS)],
        [codec.OptionRequest(c.Option.STRUCTURED_REPLY)],
        [
            codec.OptionRequest(c.Option.STRUCTURED_REPLY),
            codec.OptionRequest(
                c.Option.SET_META_CONTEXT, codec.MetaContextRequest("vol1", ("base:allocation",)).encode()
            ),
        ],
        [
            codec.OptionRequest(c.Option.STRUCTURED_REPLY),
            codec.OptionRequest(c.Option.LIST_META_CONTEXT, codec.MetaContextRequest("vol1", ("base:",)).encode()),
        ],
        [codec.OptionRequest(c.Option.INFO, codec.GoRequest("other@snap").encode())],
    )
    last = (
        codec.OptionRequest(c.Option.GO, codec.GoRequest("vol1").encode()),
        codec.OptionRequest(c.Option.EXPORT_NAME, b"vol1"),
        codec.OptionRequest(c.Option.ABORT),
    )
    return [
        codec.ClientFlags(3).encode() + b"".join(option.encode() for option in (*before, end))
        for before in options
        for end in last
    ]


def requests() -> list[bytes]:
    """Requests after the handshake, answered by writes, reads and all the rest."""

    def request(command: int, offset: int = 0, length: int = 4096, flags: int = 0) -> bytes:
        payload = bytes(length) if command == c.Command.WRITE else b""
        return codec.Request(flags, command, 7, offset, length).encode() + payload

    commands = (c.Command.READ, c.Command.WRITE, c.Command.TRIM, c.Command.WRITE_ZEROES, c.Command.CACHE)
    single = [request(command, offset) for command in commands for offset in (0, 8192)]
    status = request(c.Command.BLOCK_STATUS, length=1 << 20)
    return [*single, request(c.Command.FLUSH, length=0), status, b"".join(single), request(c.Command.DISC, length=0)]


def data_link_frames(epoch: int = 1, session: int = 1) -> list[bytes]:
    """Frames of a session, each by itself and all in order."""
    kinds = (
        (FrameType.RESYNC_BEGIN, 0, 0, b""),
        (FrameType.WRITE, 4096, 512, b"w" * 512),
        (FrameType.TRIM, 8192, 65536, b""),
        (FrameType.ZERO, 0, 4096, b""),
        (FrameType.FLUSH, 0, 0, b""),
        (FrameType.RESYNC_END, 0, 0, b""),
    )
    numbered = [
        encode_header(kind, 0, epoch, session, number, offset, length, payload) + payload
        for number, (kind, offset, length, payload) in enumerate(kinds, 1)
    ]
    digest = b"d" * 32
    unnumbered = [
        encode_header(FrameType.PING, 0, epoch, session, 0, 0, 0),
        encode_header(FrameType.VERIFY, 0, epoch, session, 0, 0, 4096, digest) + digest,
    ]
    marks = Watermarks(3, 2, 1).encode()
    acknowledgement = encode_header(FrameType.ACK, 0, epoch, session, 0, 0, 0, marks) + marks
    return [*numbered, *unnumbered, acknowledgement, b"".join((*numbered, *unnumbered))]


def repaired_frames(data: bytes) -> bytes:
    """Every frame that can still be told apart, with a checksum that fits."""
    fixed, at = bytearray(data), 0
    while at + HEADER_SIZE <= len(fixed):
        size = int.from_bytes(fixed[at + 40 : at + 44], "little")
        end = at + HEADER_SIZE + size
        if end > len(fixed):
            break
        crc = zlib.crc32(fixed[at + HEADER_SIZE : end], zlib.crc32(fixed[at : at + 44]))
        struct.pack_into("<I", fixed, at + 44, crc)
        at = end
    return bytes(fixed)
