"""The hand-coded messages are the same bytes as protobuf's."""

from __future__ import annotations

import random

import pytest

from stillpoint.errors import DataCorrupt, ProtocolError
from stillpoint.wire import chunks
from stillpoint.wire.v1 import common_pb2, standby_pb2


@pytest.mark.parametrize("offset", [0, 1, 127, 128, 65536, 2**40 + 5, 2**63])
@pytest.mark.parametrize("data", [b"", b"x", b"a" * 127, b"b" * 128, random.Random(3).randbytes(70_000)])
def test_a_data_chunk_is_what_protobuf_makes_and_reads(offset: int, data: bytes) -> None:
    ours = chunks.encode_data(offset, data)
    theirs = common_pb2.Chunk.FromString(ours)
    assert (theirs.offset, theirs.data, theirs.hole_length) == (offset, data, 0)
    if data:
        assert theirs.SerializeToString(deterministic=True) == ours
    decoded = chunks.decode(theirs.SerializeToString())
    assert (decoded.offset, bytes(decoded.data), decoded.length) == (offset, data, len(data))


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (4096, 2**42), (2**50, 300)])
def test_a_hole_is_what_protobuf_makes_and_reads(offset: int, length: int) -> None:
    ours = chunks.encode_hole(offset, length)
    assert common_pb2.Chunk(offset=offset, hole_length=length).SerializeToString(deterministic=True) == ours
    decoded = chunks.decode(ours)
    assert (decoded.offset, decoded.hole_length, len(decoded.data)) == (offset, length, 0)


def test_golden_bytes_of_a_chunk() -> None:
    assert chunks.encode_data(300, b"abc").hex() == "08ac021dc2412435" + "2203616263"


@pytest.mark.parametrize("data", [b"", b"f" * 50, b"g" * 5000])
def test_frames_are_what_protobuf_makes_and_reads(data: bytes) -> None:
    ours = chunks.encode_frames(data)
    assert standby_pb2.Frames(frames=data).SerializeToString() == ours
    assert bytes(chunks.decode_frames(ours)) == data


def test_a_changed_bit_in_the_data_is_noticed() -> None:
    message = bytearray(chunks.encode_data(9, b"some data"))
    message[-3] ^= 4
    with pytest.raises(DataCorrupt):
        chunks.decode(bytes(message))


def test_every_truncation_is_an_error_or_a_shorter_truth() -> None:
    message = chunks.encode_data(300, b"abcdefgh")
    for cut in range(1, len(message)):
        try:
            decoded = chunks.decode(message[:cut])
        except (ProtocolError, DataCorrupt):
            continue
        # Only the head survived: protobuf, too, calls that a valid message without data.
        assert (decoded.offset, decoded.length) == (300, 0)


def test_random_bytes_never_do_anything_but_raise() -> None:
    generator = random.Random(20)
    for _ in range(5000):
        garbage = generator.randbytes(generator.randrange(1, 40))
        for decode in (chunks.decode, chunks.decode_frames):
            try:
                decode(garbage)
            except (ProtocolError, DataCorrupt):
                continue
