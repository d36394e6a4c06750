"""`Chunk` and `Frames` messages, encoded and decoded by hand.

The protobuf runtime copies a `bytes` field on the way in and on the way out, which halves the rate of a stream of 1 MiB
messages. These functions make and read the same bytes (tests/golden/test_chunks.py) with one copy at most, and are
given to gRPC as serializers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ..checksum import crc32
from ..errors import DataCorrupt, ProtocolError

# Field tags: (field number << 3) | wire type. Varint 0, length-delimited 2, 32 bits 5.
_OFFSET, _HOLE, _CRC, _DATA = 0x08, 0x10, 0x1D, 0x22
_FRAMES = 0x0A
_U32 = struct.Struct("<I")

# Most bytes of data in one Chunk; keeps the message below gRPC's receive limit.
MESSAGE_SIZE = 1024 * 1024


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(message: bytes | memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ProtocolError("a message ends in the middle of a number")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


@dataclass(frozen=True, slots=True)
class DecodedChunk:
    """`data` is a view of the message. A hole has `hole_length` > 0 and no data."""

    offset: int
    hole_length: int
    data: memoryview

    @property
    def length(self) -> int:
        return self.hole_length or len(self.data)


def encode_data(offset: int, data: bytes | bytearray | memoryview) -> bytes:
    """A Chunk of `data` with its CRC-32."""
    head = (b"\x08" + _varint(offset)) if offset else b""
    crc = crc32(data)
    middle = (b"\x1d" + _U32.pack(crc)) if crc else b""
    return b"".join((head, middle, b"\x22", _varint(len(data)), data))


def encode_hole(offset: int, length: int) -> bytes:
    """A Chunk that says `length` bytes are zeroes."""
    return ((b"\x08" + _varint(offset)) if offset else b"") + b"\x10" + _varint(length)


def decode(message: bytes) -> DecodedChunk:
    """The Chunk in a message. Raises DataCorrupt when its CRC-32 does not match, ProtocolError when it is none."""
    view = memoryview(message)
    offset = hole_length = crc = 0
    data = view[:0]
    at = 0
    while at < len(message):
        tag = message[at]
        at += 1
        if tag == _OFFSET:
            offset, at = _read_varint(message, at)
        elif tag == _HOLE:
            hole_length, at = _read_varint(message, at)
        elif tag == _CRC:
            if at + 4 > len(message):
                raise ProtocolError("a chunk ends in the middle of its checksum")
            crc = _U32.unpack_from(message, at)[0]
            at += 4
        elif tag == _DATA:
            length, at = _read_varint(message, at)
            if length > len(message) - at:
                raise ProtocolError("a chunk is shorter than it says")
            data = view[at : at + length]
            at += length
        else:
            raise ProtocolError(f"a chunk has an unknown field (tag {tag})")
    if hole_length and len(data):
        raise ProtocolError("a chunk is a hole and has data")
    if crc32(data) != crc:
        raise DataCorrupt(f"the data received for offset {offset} does not match its checksum")
    return DecodedChunk(offset, hole_length, data)


def encode_frames(frames: bytes | bytearray | memoryview) -> bytes:
    """A Frames message."""
    return b"".join((b"\x0a", _varint(len(frames)), frames)) if len(frames) else b""


def decode_frames(message: bytes) -> memoryview:
    """The frames in a Frames message, as a view of it."""
    if not message:
        return memoryview(b"")
    if message[0] != _FRAMES:
        raise ProtocolError(f"a frames message has an unknown field (tag {message[0]})")
    length, at = _read_varint(message, 1)
    if length != len(message) - at:
        raise ProtocolError("a frames message is not as long as it says")
    return memoryview(message)[at:]
