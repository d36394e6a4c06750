"""Chunks to stored bytes and back: BLAKE3, zstd, CRC-32. Meant for worker threads: all three release the GIL."""

from __future__ import annotations

import threading
import zlib
from functools import cache
from typing import Final, NamedTuple

import zstandard

from stillpoint.errors import DataCorrupt

from .chunking import Piece
from .records import Codec, RecordHeader, RecordType, digest_of

# Less than 5 % gained is not worth the time of decompressing it at every restore.
_WORTHWHILE: Final = 0.95

# zstandard's objects must not be used by two threads at once, and are costly to make.
_of_thread = threading.local()


class EncodedRecord(NamedTuple):
    """`stored` may be a view of what was given, when compression gained nothing."""

    header: RecordHeader
    stored: Piece


@cache
def zero_digest(length: int) -> bytes:
    return digest_of(bytes(length))


def encode_chunk(index: int, data: Piece, *, level: int) -> EncodedRecord | None:
    """The record of a chunk; None when it is all zeroes, which is stored nowhere."""
    digest = digest_of(data)
    # The digest is needed anyway, and no other content has the digest of zeroes.
    if digest == zero_digest(len(data)):
        return None
    return _encode(RecordType.CHUNK, index, data, digest, _compressor(level).compress(data))


def encode_raw(type_: RecordType, number: int, data: bytes) -> EncodedRecord:
    """The record of a page or root. Digests do not compress."""
    return _encode(type_, number, data, digest_of(data), None)


def _encode(type_: RecordType, number: int, data: Piece, digest: bytes, compressed: bytes | None) -> EncodedRecord:
    codec, stored = Codec.RAW, data
    if compressed is not None and len(compressed) <= len(data) * _WORTHWHILE:
        codec, stored = Codec.ZSTD, compressed
    header = RecordHeader(type_, codec, number, len(stored), len(data), digest, zlib.crc32(stored))
    return EncodedRecord(header, stored)


def decode(header: RecordHeader, stored: memoryview) -> bytes:
    """The plain bytes, checked against the header. Raises DataCorrupt."""
    if zlib.crc32(stored) != header.stored_crc:
        raise DataCorrupt("the stored bytes do not match their checksum")
    plain = bytes(stored) if header.codec is Codec.RAW else _decompress(stored, header.plain_length)
    if len(plain) != header.plain_length or digest_of(plain) != header.digest:
        raise DataCorrupt("the bytes do not match their digest")
    return plain


def _decompress(stored: memoryview, plain_length: int) -> bytes:
    try:
        # The frame's own claim would be allocated unseen.
        if zstandard.frame_content_size(stored) != plain_length:
            raise DataCorrupt("a compressed chunk has another length than it should")
        return _decompressor().decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DataCorrupt(f"a chunk cannot be decompressed: {error}") from None


def _compressor(level: int) -> zstandard.ZstdCompressor:
    key = f"compressor{level}"
    compressor: zstandard.ZstdCompressor | None = getattr(_of_thread, key, None)
    if compressor is None:
        compressor = zstandard.ZstdCompressor(level=level)
        setattr(_of_thread, key, compressor)
    return compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    decompressor: zstandard.ZstdDecompressor | None = getattr(_of_thread, "decompressor", None)
    if decompressor is None:
        decompressor = _of_thread.decompressor = zstandard.ZstdDecompressor()
    return decompressor
