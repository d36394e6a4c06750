"""The bytes of the data link's frames, and what is not a frame."""

from __future__ import annotations

import random

import pytest

from stillpoint.errors import ProtocolError
from stillpoint.link.frames import (
    FAILED,
    HEADER_SIZE,
    MAX_PAYLOAD_SIZE,
    FrameType,
    Watermarks,
    encode_header,
    read_frames,
)

Frame = tuple[int, int, int, int, int, int, int, bytes]

CASES: list[tuple[Frame, str]] = [
    (
        (FrameType.WRITE, 1, 7, 9, 3, 0x10000, 4, b"data"),
        "53504c4b020100000700000009000000030000000000000000000100000000000400000000000000040000001bcbc19e"
        + b"data".hex(),
    ),
    (
        (FrameType.TRIM, 0, 1, 2, 4, 512, 1 << 40, b""),
        "53504c4b030000000100000002000000040000000000000000020000000000000000000000010000" + "00000000" + "b8d0ad56",
    ),
    (
        (FrameType.READ, 0, 7, 9, 5, 0x2000, 4096, b""),
        "53504c4b0e0000000700000009000000050000000000000000200000000000000010000000000000000000004f09d4eb",
    ),
    (
        (FrameType.READ_DATA, 0, 7, 9, 5, 0x2000, 4, b"back"),
        "53504c4b0f000000070000000900000005000000000000000020000000000000"
        "040000000000000004000000686cd54d" + b"back".hex(),
    ),
    (
        (FrameType.READ_DATA, FAILED, 7, 9, 6, 0x2000, 4096, b"disk failed"),
        "53504c4b0f010000070000000900000006000000000000000020000000000000"
        "00100000000000000b000000dfbcb76f" + b"disk failed".hex(),
    ),
]


def encode(frame: Frame) -> bytes:
    kind, flags, epoch, session, sequence, offset, length, payload = frame
    return encode_header(kind, flags, epoch, session, sequence, offset, length, payload) + payload


def read(data: bytes) -> tuple[list[Frame], int]:
    frames: list[Frame] = []

    def handle(
        kind: int, flags: int, epoch: int, session: int, seq: int, offset: int, length: int, payload: memoryview
    ) -> None:
        frames.append((kind, flags, epoch, session, seq, offset, length, bytes(payload)))

    return frames, read_frames(memoryview(data), handle)


@pytest.mark.parametrize(("frame", "golden"), CASES)
def test_golden_bytes(frame: Frame, golden: str) -> None:
    assert encode(frame).hex() == golden
    assert read(bytes.fromhex(golden)) == ([frame], len(golden) // 2)


def test_frames_are_read_however_they_are_cut() -> None:
    stream = b"".join(encode(frame) for frame, _ in CASES)
    for cut in range(len(stream) + 1):
        frames, consumed = read(stream[:cut])
        rest, _ = read(stream[consumed:])
        assert [*frames, *rest] == [frame for frame, _ in CASES]


def test_every_changed_bit_is_noticed() -> None:
    whole = encode(CASES[0][0])
    for position in range(len(whole) * 8):
        broken = bytearray(whole)
        broken[position // 8] ^= 1 << position % 8
        try:
            frames, consumed = read(bytes(broken))
        except ProtocolError:
            continue
        assert (frames, consumed) == ([], 0)  # it announces a longer payload and is waited for


def test_a_payload_above_the_limit_is_refused_before_it_is_awaited() -> None:
    header = bytearray(encode_header(FrameType.WRITE, 0, 1, 1, 1, 0, 1, b"x"))
    header[40:44] = (MAX_PAYLOAD_SIZE + 1).to_bytes(4, "little")
    with pytest.raises(ProtocolError, match="more than"):
        read(bytes(header))


def test_a_write_whose_length_and_payload_differ_is_refused() -> None:
    with pytest.raises(ProtocolError, match="carries"):
        read(encode_header(FrameType.WRITE, 0, 1, 1, 1, 0, 5, b"abcd") + b"abcd")


def test_garbage_is_refused() -> None:
    generator = random.Random(5)
    for _ in range(2000):
        garbage = generator.randbytes(HEADER_SIZE + generator.randrange(20))
        with pytest.raises(ProtocolError):
            read(garbage)


def test_watermarks_are_three_numbers() -> None:
    marks = Watermarks(5, 4, 1 << 40)
    assert Watermarks.decode(marks.encode()) == marks
    with pytest.raises(ProtocolError):
        Watermarks.decode(b"short")
