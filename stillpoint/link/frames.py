"""The frames of the data link: what a primary sends to a standby, and the acknowledgements that come back.

A frame is a header of 48 bytes, then `payload_size` bytes. Integers are little-endian.

| offset | size | field | |
|---|---|---|---|
| 0 | 4 | magic | "SPLK" |
| 4 | 1 | type | `FrameType` |
| 5 | 1 | flags | bit 0 RESYNC: part of a resync, not a client's write; in a READ_DATA FAILED |
| 6 | 2 | reserved | 0 |
| 8 | 4 | epoch | of the volume; a frame of an older one is refused |
| 12 | 4 | session | of the link; likewise |
| 16 | 8 | sequence | 1, 2, 3 … over the frames of a session that change or flush the mirror; else 0 |
| 24 | 8 | offset | bytes in the volume |
| 32 | 8 | length | bytes of the volume; equals payload_size for WRITE |
| 40 | 4 | payload_size | at most 1 MiB |
| 44 | 4 | crc32 | zlib CRC-32 of bytes 0-43 and the payload |

tests/golden/test_frames.py holds the bytes. Both carriers move these frames unchanged. Pure functions; no I/O here.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass

from ..checksum import crc32
from ..errors import ProtocolError

# Spoken since the first release. The number is agreed in OpenLink, before any frame.
PROTOCOL_VERSION = 1

MAGIC = 0x4B4C5053
HEADER_SIZE = 48
MAX_PAYLOAD_SIZE = 1024 * 1024
RESYNC = 1
FAILED = 1

_HEADER = struct.Struct("<IBBHIIQQQII")
_UNSIGNED = struct.Struct("<IBBHIIQQQI")  # the header without its checksum
_ACK = struct.Struct("<QQQ")
_CRC = struct.Struct("<I")
_unpack_header = _HEADER.unpack_from


class FrameType(enum.IntEnum):
    HELLO = 1  # first on a connection; the payload is the token of OpenLink
    WRITE = 2
    TRIM = 3
    ZERO = 4  # make the range zeroes, keep it allocated where possible
    FLUSH = 5  # make everything before it durable
    ACK = 6  # payload: the three watermarks
    RESYNC_BEGIN = 7  # the mirror is a mixture from here on
    RESYNC_END = 8  # flush; the mirror is the volume, in order, from here on
    PING = 9
    PONG = 10
    ERROR = 11  # payload: one line of text; the sender closes the link
    VERIFY = 12  # payload: the digest of the range at this point of the stream; none: the range reads as zeroes
    VERIFIED = 13  # the range, and in flags a `Verdict`
    READ = 14  # asks for the range, at most 1 MiB, with all that was sent before; sequence: the number of the question
    READ_DATA = 15  # sequence: that number; payload: the content, or with the flag FAILED one line of text


class Verdict(enum.IntEnum):
    """What the standby says of a range that it was asked to compare."""

    SAME = 0
    DIFFERENT = 1
    UNKNOWN = 2  # it was written to while it was read; ask again


# Plain ints for the hot path: an IntEnum comparison costs more than the rest of the dispatch.
WRITE, TRIM, ZERO, FLUSH, ACK = (
    int(t) for t in (FrameType.WRITE, FrameType.TRIM, FrameType.ZERO, FrameType.FLUSH, FrameType.ACK)
)
_KNOWN = frozenset(int(t) for t in FrameType)


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Sequence numbers up to which, without a gap, the standby has received, applied and made durable."""

    received: int
    applied: int
    flushed: int

    def encode(self) -> bytes:
        return _ACK.pack(self.received, self.applied, self.flushed)

    @classmethod
    def decode(cls, payload: bytes | memoryview) -> Watermarks:
        if len(payload) != _ACK.size:
            raise ProtocolError(f"an acknowledgement of {len(payload)} bytes")
        return cls(*_ACK.unpack(payload))


def encode_header(
    frame_type: int,
    flags: int,
    epoch: int,
    session: int,
    sequence: int,
    offset: int,
    length: int,
    payload: bytes | bytearray | memoryview = b"",
) -> bytes:
    """The 48 bytes that go before `payload`."""
    head = _UNSIGNED.pack(MAGIC, frame_type, flags, 0, epoch, session, sequence, offset, length, len(payload))
    return head + _CRC.pack(crc32(payload, crc32(head)))


# (type, flags, epoch, session, sequence, offset, length, payload). The payload is borrowed for the call. Returning True
# stops the reading after this frame.
FrameHandler = Callable[[int, int, int, int, int, int, int, memoryview], "bool | None"]


def read_frames(data: memoryview, handle: FrameHandler) -> int:
    """Hand every whole frame in `data` to `handle`, in order; returns the bytes consumed.

    Raises ProtocolError for anything that is not a frame; frames before it have been handled.
    """
    at = 0
    size = len(data)
    while size - at >= HEADER_SIZE:
        magic, kind, flags, reserved, epoch, session, sequence, offset, length, payload_size, crc = _unpack_header(
            data, at
        )
        if magic != MAGIC or kind not in _KNOWN or reserved:
            raise ProtocolError("the data link carries something that is not a frame")
        if payload_size > MAX_PAYLOAD_SIZE:
            raise ProtocolError(f"a frame announces {payload_size} bytes, more than the {MAX_PAYLOAD_SIZE} allowed")
        end = at + HEADER_SIZE + payload_size
        if end > size:
            break
        payload = data[at + HEADER_SIZE : end]
        if crc32(payload, crc32(data[at : at + HEADER_SIZE - 4])) != crc:
            raise ProtocolError(f"frame {sequence} does not match its checksum")
        if kind == WRITE and length != payload_size:
            raise ProtocolError(f"frame {sequence} writes {length} bytes and carries {payload_size}")
        at = end
        if handle(kind, flags, epoch, session, sequence, offset, length, payload):
            break
    return at
