"""NBD messages to bytes and back, without any I/O.

A `decode_*` function looks at the start of `data` and returns the message and how many bytes it took, or None when
more data is needed; it raises ProtocolError when no data could make it right. Every message encodes itself with
`encode`. Option payloads arrive whole: their `parse` raises BadOption, which is answered and not fatal.

Lengths are checked before anything of that length is waited for.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import ProtocolError
from . import constants as c

# What a connection in the transmission phase packs and unpacks in place, hundreds of thousands of times a second.
REQUEST: Final = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
SIMPLE_REPLY: Final = struct.Struct(">IIQ")  # magic, errno, cookie
CHUNK: Final = struct.Struct(">IHHQI")  # magic, flags, kind, cookie, payload length
DATA_CHUNK: Final = struct.Struct(">IHHQIQ")  # a chunk header and the offset of the data behind it
CHUNK_ERROR: Final = struct.Struct(">IH")  # errno, message length
CHUNK_HOLE: Final = struct.Struct(">QI")  # offset, length
CHUNK_OFFSET: Final = struct.Struct(">Q")
STATUS_DESCRIPTOR: Final = struct.Struct(">II")  # length, flags

_GREETING: Final = struct.Struct(">QQH")
_CLIENT_FLAGS: Final = struct.Struct(">I")
_OPTION: Final = struct.Struct(">QII")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_EXPORT_NAME_REPLY: Final = struct.Struct(">QH")
_INFO_EXPORT: Final = struct.Struct(">HQH")
_INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")


class BadOption(Exception):
    """An option's payload is malformed; the answer is ERR_INVALID and the handshake goes on."""


@dataclass(frozen=True, slots=True)
class Greeting:
    flags: int

    def encode(self) -> bytes:
        return _GREETING.pack(c.GREETING_MAGIC, c.OPTION_MAGIC, self.flags)


def decode_greeting(data: memoryview) -> tuple[Greeting, int] | None:
    if len(data) < _GREETING.size:
        _check_prefix(data, c.GREETING_MAGIC, "the server does not speak NBD")
        return None
    magic, kind, flags = _GREETING.unpack_from(data)
    if magic != c.GREETING_MAGIC:
        raise ProtocolError("the server does not speak NBD")
    if kind != c.OPTION_MAGIC:
        raise ProtocolError("the server speaks oldstyle NBD, which names no exports")
    return Greeting(flags), _GREETING.size


@dataclass(frozen=True, slots=True)
class ClientFlags:
    flags: int

    def encode(self) -> bytes:
        return _CLIENT_FLAGS.pack(self.flags)


def decode_client_flags(data: memoryview) -> tuple[ClientFlags, int] | None:
    if len(data) < _CLIENT_FLAGS.size:
        return None
    return ClientFlags(_CLIENT_FLAGS.unpack_from(data)[0]), _CLIENT_FLAGS.size


@dataclass(frozen=True, slots=True)
class OptionRequest:
    """One option from the client; `code` may be one we do not know."""

    code: int
    payload: bytes = b""

    def encode(self) -> bytes:
        return _OPTION.pack(c.OPTION_MAGIC, self.code, len(self.payload)) + self.payload


def decode_option(data: memoryview) -> tuple[OptionRequest, int] | None:
    if len(data) < _OPTION.size:
        _check_prefix(data, c.OPTION_MAGIC, "not an option")
        return None
    magic, code, length = _OPTION.unpack_from(data)
    if magic != c.OPTION_MAGIC:
        raise ProtocolError("not an option")
    if length > c.OPTION_SIZE_MAX:
        raise ProtocolError(f"option {code} of {length} bytes is more than any option needs")
    end = _OPTION.size + length
    if len(data) < end:
        return None
    return OptionRequest(code, bytes(data[_OPTION.size : end])), end


@dataclass(frozen=True, slots=True)
class OptionReply:
    code: int
    kind: int
    payload: bytes = b""

    def encode(self) -> bytes:
        return _OPTION_REPLY.pack(c.OPTION_REPLY_MAGIC, self.code, self.kind, len(self.payload)) + self.payload


def decode_option_reply(data: memoryview) -> tuple[OptionReply, int] | None:
    if len(data) < _OPTION_REPLY.size:
        _check_prefix(data, c.OPTION_REPLY_MAGIC, "not an answer to an option")
        return None
    magic, code, kind, length = _OPTION_REPLY.unpack_from(data)
    if magic != c.OPTION_REPLY_MAGIC:
        raise ProtocolError("not an answer to an option")
    if length > c.OPTION_SIZE_MAX:
        raise ProtocolError(f"an answer of {length} bytes to option {code} is more than any option needs")
    end = _OPTION_REPLY.size + length
    if len(data) < end:
        return None
    return OptionReply(code, kind, bytes(data[_OPTION_REPLY.size : end])), end


@dataclass(frozen=True, slots=True)
class ExportNameReply:
    """The answer to EXPORT_NAME, the one option without a proper reply."""

    size: int
    flags: int

    def encode(self, *, zeroes: bool) -> bytes:
        return _EXPORT_NAME_REPLY.pack(self.size, self.flags) + bytes(124 if zeroes else 0)


@dataclass(frozen=True, slots=True)
class GoRequest:
    """The payload of INFO and GO."""

    name: str
    infos: tuple[int, ...] = ()

    def encode(self) -> bytes:
        return _string(self.name) + _U16.pack(len(self.infos)) + b"".join(map(_U16.pack, self.infos))

    @classmethod
    def parse(cls, payload: bytes) -> GoRequest:
        name, position = _take_string(payload, 0)
        if len(payload) < position + _U16.size:
            raise BadOption("ends before its count of information requests")
        count = _U16.unpack_from(payload, position)[0]
        position += _U16.size
        if len(payload) != position + count * _U16.size:
            raise BadOption("its count of information requests does not fit its length")
        return cls(name, struct.unpack_from(f">{count}H", payload, position))


@dataclass(frozen=True, slots=True)
class MetaContextRequest:
    """The payload of LIST_META_CONTEXT and SET_META_CONTEXT."""

    name: str
    queries: tuple[str, ...] = ()

    def encode(self) -> bytes:
        return _string(self.name) + _U32.pack(len(self.queries)) + b"".join(map(_string, self.queries))

    @classmethod
    def parse(cls, payload: bytes) -> MetaContextRequest:
        name, position = _take_string(payload, 0)
        if len(payload) < position + _U32.size:
            raise BadOption("ends before its count of queries")
        count = _U32.unpack_from(payload, position)[0]
        position += _U32.size
        if count > (len(payload) - position) // _U32.size:
            raise BadOption("its count of queries does not fit its length")
        queries = []
        for _ in range(count):
            query, position = _take_string(payload, position)
            queries.append(query)
        if position != len(payload):
            raise BadOption("has bytes behind its last query")
        return cls(name, tuple(queries))


def parse_export_name(payload: bytes) -> str:
    """The payload of EXPORT_NAME is the name and nothing else."""
    return _text(payload)


@dataclass(frozen=True, slots=True)
class ServerEntry:
    """One line of the answer to LIST."""

    name: str
    description: str = ""

    def encode(self) -> bytes:
        return _string(self.name) + self.description.encode()

    @classmethod
    def parse(cls, payload: bytes) -> ServerEntry:
        name, position = _take_string(payload, 0)
        return cls(name, _text(payload[position:]))


@dataclass(frozen=True, slots=True)
class MetaContext:
    """A context the server has, and the number its replies carry."""

    id: int
    name: str

    def encode(self) -> bytes:
        return _U32.pack(self.id) + self.name.encode()

    @classmethod
    def parse(cls, payload: bytes) -> MetaContext:
        if len(payload) < _U32.size:
            raise BadOption("ends within a context's number")
        return cls(_U32.unpack_from(payload)[0], _text(payload[_U32.size :]))


@dataclass(frozen=True, slots=True)
class ExportInfo:
    size: int
    flags: int

    def encode(self) -> bytes:
        return _INFO_EXPORT.pack(c.Info.EXPORT, self.size, self.flags)


@dataclass(frozen=True, slots=True)
class BlockSizeInfo:
    minimum: int
    preferred: int
    maximum: int

    def encode(self) -> bytes:
        return _INFO_BLOCK_SIZE.pack(c.Info.BLOCK_SIZE, self.minimum, self.preferred, self.maximum)


@dataclass(frozen=True, slots=True)
class TextInfo:
    """The export's canonical name or its description."""

    kind: int
    text: str

    def encode(self) -> bytes:
        return _U16.pack(self.kind) + self.text.encode()


AnyInfo = ExportInfo | BlockSizeInfo | TextInfo


def parse_info(payload: bytes) -> AnyInfo | None:
    """One piece of information about an export; None for kinds we did not ask for. Raises BadOption."""
    if len(payload) < _U16.size:
        raise BadOption("ends within the kind of information")
    kind = _U16.unpack_from(payload)[0]
    if kind == c.Info.EXPORT:
        return ExportInfo(*_unpack_whole(_INFO_EXPORT, payload)[1:])
    if kind == c.Info.BLOCK_SIZE:
        return BlockSizeInfo(*_unpack_whole(_INFO_BLOCK_SIZE, payload)[1:])
    if kind in (c.Info.NAME, c.Info.DESCRIPTION):
        return TextInfo(kind, _text(payload[_U16.size :]))
    return None


@dataclass(frozen=True, slots=True)
class Request:
    """A request's header; a write's payload follows it."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int

    def encode(self) -> bytes:
        return REQUEST.pack(c.REQUEST_MAGIC, self.flags, self.command, self.cookie, self.offset, self.length)


def decode_request(data: memoryview) -> tuple[Request, int] | None:
    if len(data) < REQUEST.size:
        return None
    magic, *fields = REQUEST.unpack_from(data)
    if magic != c.REQUEST_MAGIC:
        raise ProtocolError("not a request")
    return Request(*fields), REQUEST.size


@dataclass(frozen=True, slots=True)
class SimpleReply:
    """The header of a simple reply; the data of a read without error follows it."""

    errno: int
    cookie: int

    def encode(self) -> bytes:
        return SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, self.errno, self.cookie)


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """The header of one chunk of a structured reply; `length` bytes follow it."""

    flags: int
    kind: int
    cookie: int
    length: int

    def encode(self) -> bytes:
        return CHUNK.pack(c.CHUNK_MAGIC, self.flags, self.kind, self.cookie, self.length)


def decode_reply(data: memoryview) -> tuple[SimpleReply | ChunkHeader, int] | None:
    if len(data) < SIMPLE_REPLY.size:
        return None
    magic = _U32.unpack_from(data)[0]
    if magic == c.SIMPLE_REPLY_MAGIC:
        _, errno, cookie = SIMPLE_REPLY.unpack_from(data)
        return SimpleReply(errno, cookie), SIMPLE_REPLY.size
    if magic != c.CHUNK_MAGIC:
        raise ProtocolError("not a reply")
    if len(data) < CHUNK.size:
        return None
    _, flags, kind, cookie, length = CHUNK.unpack_from(data)
    return ChunkHeader(flags, kind, cookie, length), CHUNK.size


def encode_error_chunk(cookie: int, errno: int) -> bytes:
    """A structured reply that is nothing but an error."""
    header = ChunkHeader(c.CHUNK_FLAG_DONE, c.Chunk.ERROR, cookie, CHUNK_ERROR.size)
    return header.encode() + CHUNK_ERROR.pack(errno, 0)


def encode_block_status(cookie: int, context_id: int, extents: Sequence[tuple[int, int]], *, last: bool) -> bytes:
    """One context's extents as (length, flags)."""
    length = _U32.size + len(extents) * STATUS_DESCRIPTOR.size
    flags = c.CHUNK_FLAG_DONE if last else 0
    header = ChunkHeader(flags, c.Chunk.BLOCK_STATUS, cookie, length).encode()
    numbers = [number for extent in extents for number in extent]
    return header + struct.pack(f">I{len(numbers)}I", context_id, *numbers)


def parse_block_status(payload: memoryview) -> tuple[int, list[tuple[int, int]]]:
    """The context's number and its (length, flags) pairs."""
    if len(payload) < _U32.size + STATUS_DESCRIPTOR.size or (len(payload) - _U32.size) % STATUS_DESCRIPTOR.size:
        raise ProtocolError(f"a block status of {len(payload)} bytes")
    return _U32.unpack_from(payload)[0], list(STATUS_DESCRIPTOR.iter_unpack(payload[_U32.size :]))


def _string(text: str) -> bytes:
    data = text.encode()
    return _U32.pack(len(data)) + data


def _take_string(payload: bytes, position: int) -> tuple[str, int]:
    start = position + _U32.size
    if len(payload) < start:
        raise BadOption("ends within the length of a string")
    end = start + _U32.unpack_from(payload, position)[0]
    if len(payload) < end:
        raise BadOption("has a string longer than itself")
    return _text(payload[start:end]), end


def _text(data: bytes) -> str:
    if len(data) > c.STRING_SIZE_MAX:
        raise BadOption(f"has a string of {len(data)} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise BadOption("has a string that is not UTF-8") from None
    if "\0" in text:
        raise BadOption("has a string with a NUL in it")
    return text


def _unpack_whole(form: struct.Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) != form.size:
        raise BadOption(f"has {len(payload)} bytes instead of {form.size}")
    return form.unpack(payload)


def _check_prefix(data: memoryview, magic: int, complaint: str) -> None:
    """Garbage is known by its first bytes; waiting for the rest of it would keep a stranger connected."""
    if bytes(data[:8]) != magic.to_bytes(8, "big")[: len(data)]:
        raise ProtocolError(complaint)
