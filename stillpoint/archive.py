"""An image as an archive for a tape or a pipe: written and read in one pass, holes left out, proven to its end.

All numbers are little-endian. `tests/golden/test_archive.py` reads `tests/golden/image.sparc` by this table.

| part | offset | size | type | field |
|---|---|---|---|---|
| header | 0 | 4 | bytes | magic `SPAR` |
| | 4 | 4 | u32 | version: 1 |
| | 8 | 8 | u64 | bytes of the image |
| | 16 | 4 | u32 | length of the description, at most 64 KiB |
| | 20 | 4 | u32 | CRC-32 of bytes 0-19 and the description |
| | 24 | | UTF-8 | the description: JSON, keys sorted; any keys |
| frame | 0 | 4 | bytes | magic `SPAF` |
| | 4 | 4 | u32 | kind: 1 data, 2 data as one zstd frame, 3 zeroes, 4 the end |
| | 8 | 8 | u64 | offset in the image; of the end: the image's size |
| | 16 | 8 | u64 | length in the image; of data at most 4 MiB; of the end: 0 |
| | 24 | 4 | u32 | length of what follows |
| | 28 | 4 | u32 | CRC-32 of bytes 0-27 and of what follows |
| | 32 | | bytes | the data; of the end: BLAKE3 of every byte of the archive before this frame |

Frames follow each other without gaps, in the archive and in the image. Without its end an archive is cut short, and
nothing that was made of it may be called complete. It is not encrypted.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any, BinaryIO, Final, NamedTuple

import zstandard
from blake3 import blake3

from .devices import Buffer
from .errors import DataCorrupt, Refused
from .extents import Extent, split

VERSION: Final = 1
_MAGIC: Final = b"SPAR"
_FRAME_MAGIC: Final = b"SPAF"
_HEAD: Final = struct.Struct("<4sIQI")
_FRAME: Final = struct.Struct("<4sIQQI")
_CRC: Final = struct.Struct("<I")
_DESCRIPTION_MAX: Final = 64 << 10
_DATA_MAX: Final = 4 << 20
_SIZE_MAX: Final = 1 << 62


class Frame(IntEnum):
    DATA = 1
    ZSTD = 2
    ZEROES = 3
    END = 4


class Piece(NamedTuple):
    """`length` bytes of the image from `offset` on. data None: zeroes."""

    offset: int
    length: int
    data: bytes | None


class ArchiveWriter:
    """Makes the bytes; the caller writes them in the order in which it got them. Gaps are errors of the caller."""

    def __init__(self, description: Mapping[str, Any], *, size: int) -> None:
        self._description = json.dumps(description, sort_keys=True, ensure_ascii=False).encode()
        assert 0 < size < _SIZE_MAX and len(self._description) <= _DESCRIPTION_MAX
        self._size = size
        self._position = 0
        self._digest = blake3()
        self._compressor = zstandard.ZstdCompressor(level=1)

    def begin(self) -> bytes:
        """First."""
        head = _HEAD.pack(_MAGIC, VERSION, self._size, len(self._description))
        return self._count(head + _CRC.pack(zlib.crc32(self._description, zlib.crc32(head))) + self._description)

    def data(self, offset: int, data: Buffer) -> bytes:
        view = memoryview(data)
        frames = []
        for extent in split(Extent(offset, len(view)), limit=_DATA_MAX):
            plain = view[extent.offset - offset : extent.end - offset]
            packed = self._compressor.compress(plain)
            frames.append(
                self._frame(Frame.ZSTD, extent.offset, extent.length, packed)
                if len(packed) < len(plain)
                else self._frame(Frame.DATA, extent.offset, extent.length, bytes(plain))
            )
        return b"".join(frames)

    def zeroes(self, offset: int, length: int) -> bytes:
        return self._frame(Frame.ZEROES, offset, length, b"")

    def end(self) -> bytes:
        """Last. The whole image must have been given (assert)."""
        assert self._position == self._size, "an archive is ended before all of the image was given"
        return self._frame(Frame.END, self._size, 0, self._digest.digest())

    def _frame(self, kind: Frame, offset: int, length: int, stored: bytes) -> bytes:
        assert offset == self._position and offset + length <= self._size, "an archive is written in order"
        self._position += length
        head = _FRAME.pack(_FRAME_MAGIC, kind, offset, length, len(stored))
        return self._count(head + _CRC.pack(zlib.crc32(stored, zlib.crc32(head))) + stored)

    def _count(self, data: bytes) -> bytes:
        self._digest.update(data)
        return data


class ArchiveReader:
    """Reads one from a stream that need not be seekable. `pieces` is iterated once, to its end."""

    def __init__(self, source: BinaryIO) -> None:
        """Raises DataCorrupt, and Refused for another version or what is no archive."""
        self._source = source
        self._digest = blake3()
        head = self._read(_HEAD.size)
        magic, version, self.size, length = _HEAD.unpack(head)
        if magic != _MAGIC:
            raise Refused("is not an archive of Stillpoint")
        if version != VERSION:
            raise Refused(f"is an archive of version {version}; this program reads version {VERSION}")
        if not 0 < self.size < _SIZE_MAX or length > _DESCRIPTION_MAX:
            raise DataCorrupt("the header of the archive is damaged")
        (crc,) = _CRC.unpack(self._read(_CRC.size))
        description = self._read(length)
        if zlib.crc32(description, zlib.crc32(head)) != crc:
            raise DataCorrupt("the header of the archive is damaged")
        self.description: dict[str, Any] = json.loads(description)

    def pieces(self) -> Iterator[Piece]:
        """Gapless over the image. Raises DataCorrupt, also at the end when that is missing or does not fit the rest."""
        position = 0
        while True:
            digest = self._digest.digest()
            head = self._read(_FRAME.size)
            magic, kind, offset, length, stored_length = _FRAME.unpack(head)
            (crc,) = _CRC.unpack(self._read(_CRC.size))
            if magic != _FRAME_MAGIC or stored_length > _DATA_MAX:
                raise DataCorrupt(f"the archive is damaged at byte {position} of the image")
            stored = self._read(stored_length)
            if zlib.crc32(stored, zlib.crc32(head)) != crc:
                raise DataCorrupt(f"the archive is damaged at byte {position} of the image")
            if offset != position or length > self.size - position:
                raise DataCorrupt(f"the archive has bytes {offset}+{length} of the image where {position} is due")
            if kind == Frame.END:
                if position != self.size or stored != digest or self._source.read(1):
                    raise DataCorrupt("the end of the archive does not fit the rest")
                return
            if not length:
                raise DataCorrupt(f"the archive has an empty part at byte {position} of the image")
            yield Piece(offset, length, _plain(kind, stored, length))
            position += length

    def _read(self, length: int) -> bytes:
        parts, left = [], length
        while left:
            part = self._source.read(left)
            if not part:
                raise DataCorrupt("the archive is cut short")
            parts.append(part)
            left -= len(part)
        data = b"".join(parts)
        self._digest.update(data)
        return data


def _plain(kind: int, stored: bytes, length: int) -> bytes | None:
    if kind == Frame.ZEROES and not stored:
        return None
    if kind == Frame.DATA and len(stored) == length:
        return stored
    if kind == Frame.ZSTD and length <= _DATA_MAX:
        try:
            # The frame's own claim would be allocated unseen.
            if zstandard.frame_content_size(stored) == length:
                return zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise DataCorrupt(f"a part of the archive cannot be decompressed: {error}") from None
    raise DataCorrupt("a part of the archive makes no sense")
