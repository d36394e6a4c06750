"""Archives of images, byte for byte: tests/golden/image.sparc is what `stillpoint/archive.py` describes.

`python -m tests.golden.test_archive` made it; it is never made again.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from pathlib import Path

import pytest
import zstandard
from blake3 import blake3

from stillpoint.archive import ArchiveReader, ArchiveWriter
from stillpoint.errors import DataCorrupt, Refused

GOLDEN = Path(__file__).parent / "image.sparc"
DESCRIPTION = {"id": "20261123T101502-vol1-3f9a", "volume": "vol1", "instant": "2026-11-23T10:15:02Z", "size": 74_312}
NOISE, TEXT, HOLE = random.Random(1).randbytes(5000), b"the same again " * 200, 66_312
IMAGE = NOISE + TEXT + bytes(HOLE)
assert len(IMAGE) == DESCRIPTION["size"]


def archive() -> bytes:
    writer = ArchiveWriter(DESCRIPTION, size=len(IMAGE))
    parts = [writer.begin(), writer.data(0, NOISE), writer.data(len(NOISE), TEXT)]
    parts += [writer.zeroes(len(NOISE) + len(TEXT), HOLE), writer.end()]
    return b"".join(parts)


def image_in(data: bytes) -> bytes:
    reader = ArchiveReader(io.BytesIO(data))
    image = bytearray()
    for piece in reader.pieces():
        assert piece.offset == len(image)
        image += bytes(piece.length) if piece.data is None else piece.data
    assert len(image) == reader.size
    return bytes(image)


def test_what_was_written_then_is_read_now() -> None:
    data = GOLDEN.read_bytes()
    assert image_in(data) == IMAGE
    assert ArchiveReader(io.BytesIO(data)).description == DESCRIPTION


def test_what_is_written_now_is_the_same_but_for_what_zstd_makes() -> None:
    assert image_in(archive()) == IMAGE
    assert archive()[: 24 + 200] == GOLDEN.read_bytes()[: 24 + 200]


def test_the_table_suffices_to_read_it() -> None:
    data = GOLDEN.read_bytes()
    magic, version, size, length, crc = struct.unpack("<4sIQII", data[:24])
    assert (magic, version, size) == (b"SPAR", 1, len(IMAGE))
    assert crc == zlib.crc32(data[:20] + data[24 : 24 + length])
    assert json.loads(data[24 : 24 + length]) == DESCRIPTION
    position, image, kinds = 24 + length, b"", []
    while position < len(data):
        magic, kind, offset, plain, stored, crc = struct.unpack("<4sIQQII", data[position : position + 32])
        body = data[position + 32 : position + 32 + stored]
        assert magic == b"SPAF" and offset == len(image)
        assert crc == zlib.crc32(data[position : position + 28] + body)
        if kind == 4:
            assert body == blake3(data[:position]).digest()
        image += {1: lambda b=body: b, 2: lambda b=body: zstandard.decompress(b), 3: lambda n=plain: bytes(n)}.get(
            kind, bytes
        )()
        kinds.append(kind)
        position += 32 + stored
    assert image == IMAGE and kinds == [1, 2, 3, 4]


def test_an_archive_that_changed_anywhere_or_was_cut_is_never_complete() -> None:
    data, source = archive(), random.Random(2)
    for _ in range(300):
        position = source.randrange(len(data))
        damaged = bytearray(data)
        damaged[position] ^= 1 << source.randrange(8)
        with pytest.raises((DataCorrupt, Refused)):
            image_in(bytes(damaged))
    for _ in range(100):
        with pytest.raises(DataCorrupt):
            image_in(data[: source.randrange(len(data))])
    with pytest.raises(DataCorrupt, match="end of the archive"):
        image_in(data + b"more")


def test_parts_that_changed_places_or_are_left_out_are_noticed() -> None:
    writer = ArchiveWriter({}, size=3000)
    begin, one, two, three = writer.begin(), *(writer.data(at, bytes([at % 7]) * 1000) for at in (0, 1000, 2000))
    end = writer.end()
    assert len(image_in(b"".join((begin, one, two, three, end)))) == 3000
    for parts in (
        (begin, two, one, three, end),
        (begin, one, three, end),
        (begin, one, two, end),
        (begin, one, one, end),
    ):
        with pytest.raises(DataCorrupt):
            image_in(b"".join(parts))


def test_the_file_of_something_else_is_refused() -> None:
    with pytest.raises(Refused, match="not an archive"):
        image_in(b"precious notes of somebody, long enough to be a header")


if __name__ == "__main__":
    GOLDEN.write_bytes(archive())
