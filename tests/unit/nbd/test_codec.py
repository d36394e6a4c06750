"""Messages to bytes and back: one table, in both directions, fed whole, byte by byte, and with more behind."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from stillpoint.errors import ProtocolError
from stillpoint.nbd import codec
from stillpoint.nbd import constants as c

Decoder = Callable[[memoryview], tuple[Any, int] | None]


@dataclass(frozen=True)
class Case:
    message: Any
    wire: bytes
    decode: Decoder


CASES = [
    Case(codec.Greeting(3), b"NBDMAGICIHAVEOPT\x00\x03", codec.decode_greeting),
    Case(codec.ClientFlags(3), b"\x00\x00\x00\x03", codec.decode_client_flags),
    Case(codec.OptionRequest(3), b"IHAVEOPT\x00\x00\x00\x03\x00\x00\x00\x00", codec.decode_option),
    Case(codec.OptionRequest(99, b"abc"), b"IHAVEOPT\x00\x00\x00\x63\x00\x00\x00\x03abc", codec.decode_option),
    Case(
        codec.OptionReply(7, 3, b"xy"),
        bytes.fromhex("0003e889045565a9 00000007 00000003 00000002") + b"xy",
        codec.decode_option_reply,
    ),
    Case(
        codec.Request(1, 1, 0x1122334455667788, 0x8877665544332211, 0xFFFFFFFF),
        bytes.fromhex("25609513 0001 0001 1122334455667788 8877665544332211 ffffffff"),
        codec.decode_request,
    ),
    Case(codec.SimpleReply(28, 5), bytes.fromhex("67446698 0000001c 0000000000000005"), codec.decode_reply),
    Case(
        codec.ChunkHeader(1, 0x8001, 5, 6),
        bytes.fromhex("668e33ef 0001 8001 0000000000000005 00000006"),
        codec.decode_reply,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: type(case.message).__name__)
class TestEveryMessage:
    def test_is_written_as_specified(self, case: Case) -> None:
        assert case.message.encode() == case.wire

    def test_is_read_when_whole(self, case: Case) -> None:
        assert case.decode(memoryview(case.wire)) == (case.message, len(case.wire))

    def test_asks_for_more_until_it_is_whole(self, case: Case) -> None:
        for length in range(len(case.wire)):
            assert case.decode(memoryview(case.wire[:length])) is None

    def test_leaves_what_is_behind_it(self, case: Case) -> None:
        assert case.decode(memoryview(case.wire + b"IHAVEOPT trailing")) == (case.message, len(case.wire))


@dataclass(frozen=True)
class PayloadCase:
    message: Any
    wire: bytes
    parse: Callable[[bytes], Any]


PAYLOADS = [
    PayloadCase(codec.GoRequest("vol1", (3, 1)), b"\0\0\0\x04vol1\0\x02\0\x03\0\x01", codec.GoRequest.parse),
    PayloadCase(codec.GoRequest(""), b"\0\0\0\0\0\0", codec.GoRequest.parse),
    PayloadCase(
        codec.MetaContextRequest("é", ("base:", "x:y")),
        b"\0\0\0\x02\xc3\xa9\0\0\0\x02\0\0\0\x05base:\0\0\0\x03x:y",
        codec.MetaContextRequest.parse,
    ),
    PayloadCase(codec.MetaContextRequest("v"), b"\0\0\0\x01v\0\0\0\0", codec.MetaContextRequest.parse),
    PayloadCase(codec.ServerEntry("vol1", "a disk"), b"\0\0\0\x04vol1a disk", codec.ServerEntry.parse),
    PayloadCase(codec.MetaContext(7, "base:allocation"), b"\0\0\0\x07base:allocation", codec.MetaContext.parse),
    PayloadCase(codec.ExportInfo(1 << 40, 0x105), b"\0\0\0\0\x01\0\0\0\0\0\x01\x05", codec.parse_info),
    PayloadCase(codec.BlockSizeInfo(1, 4096, 32 << 20), b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0", codec.parse_info),
    PayloadCase(codec.TextInfo(2, "a disk"), b"\0\x02a disk", codec.parse_info),
]


@pytest.mark.parametrize("case", PAYLOADS, ids=lambda case: type(case.message).__name__)
def test_payloads_are_written_and_read_as_specified(case: PayloadCase) -> None:
    assert case.message.encode() == case.wire
    assert case.parse(case.wire) == case.message


# What may be cut anywhere without becoming another valid payload: those with counts.
@pytest.mark.parametrize("case", [*PAYLOADS[:4], *PAYLOADS[6:8]], ids=lambda case: type(case.message).__name__)
def test_payloads_that_are_cut_or_too_long_are_bad(case: PayloadCase) -> None:
    for length in range(len(case.wire)):
        with pytest.raises(codec.BadOption):
            case.parse(case.wire[:length])
    with pytest.raises(codec.BadOption):
        case.parse(case.wire + b"x")


@pytest.mark.parametrize(
    "payload",
    [
        b"\xff\xff\xff\xff",
        b"\0\0\0\x05vol1\0\0",
        b"\0\0\0\x04vo\xff\xfe\0\0",
        b"\0\0\0\x04vo\0l\0\0",
        b"\0\0\x10\x01" + b"n" * 4097 + b"\0\0",
        b"\0\0\0\x00\xff\xff",
    ],
    ids=["no name", "short name", "not UTF-8", "NUL", "too long", "count that lies"],
)
def test_lying_go_requests_are_bad(payload: bytes) -> None:
    with pytest.raises(codec.BadOption):
        codec.GoRequest.parse(payload)


@pytest.mark.parametrize(
    "payload",
    [
        b"\0\0\0\x01v\xff\xff\xff\xff",
        b"\0\0\0\x01v\0\0\0\x01\xff\xff\xff\xffbase:",
        b"\0\0\0\x01v\0\0\0\x02\0\0\0\x05base:",
        b"\0\0\0\x01v\0\0\0\x01\0\0\0\x05base:more",
    ],
    ids=["4 G queries", "a query of 4 GiB", "a query too few", "bytes behind"],
)
def test_queries_that_overrun_are_bad(payload: bytes) -> None:
    with pytest.raises(codec.BadOption):
        codec.MetaContextRequest.parse(payload)


@pytest.mark.parametrize(
    ("decode", "data"),
    [
        (codec.decode_greeting, b"G"),
        (codec.decode_greeting, b"NBDMAGIX"),
        (codec.decode_greeting, b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\0\0"),
        (codec.decode_option, b"GET / HTTP/1.1\r\n"),
        (codec.decode_option, b"IHAVEOPX"),
        (codec.decode_option, b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"),
        (codec.decode_option_reply, b"\0\x03\xe8\x88"),
        (codec.decode_option_reply, struct.pack(">QIII", c.OPTION_REPLY_MAGIC, 7, 3, 1 << 31)),
        (codec.decode_request, bytes(28)),
        (codec.decode_reply, bytes(16)),
    ],
)
def test_garbage_is_known_as_early_as_its_first_bytes_tell(decode: Decoder, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(memoryview(data))


def test_a_block_status_is_read_as_it_was_written() -> None:
    extents = [(4096, 0), (0xFFFFFFFF, 3)]
    wire = codec.encode_block_status(9, 1, extents, last=True)
    header, size = codec.decode_reply(memoryview(wire)) or (None, 0)
    assert header == codec.ChunkHeader(c.CHUNK_FLAG_DONE, c.Chunk.BLOCK_STATUS, 9, len(wire) - size)
    assert codec.parse_block_status(memoryview(wire)[size:]) == (1, extents)


@pytest.mark.parametrize("length", [0, 3, 4, 11, 13])
def test_a_block_status_of_an_odd_length_is_nonsense(length: int) -> None:
    with pytest.raises(ProtocolError):
        codec.parse_block_status(memoryview(bytes(length)))
