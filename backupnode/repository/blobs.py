"""Chunks and pages to self-describing blobs and back: keyed BLAKE3, zstd, AES-256-GCM. Format: README.md, "Blob".

Meant for worker threads: hashing, compressing and encrypting release the GIL.
"""

from __future__ import annotations

import struct
import threading
from enum import IntEnum
from functools import lru_cache
from typing import Final, NamedTuple, NewType

import zstandard
from blake3 import blake3

from stillpoint.checksum import crc32
from stillpoint.errors import DataCorrupt

from .chunking import Piece
from .keys import TAG_SIZE, Keys

VERSION: Final = 2
BLOB_MAGIC: Final = b"SPBL"
ID_SIZE: Final = 32

ChunkId = NewType("ChunkId", bytes)
# Zeroes, however many; nothing is stored for it.
ZERO_ID: Final = ChunkId(bytes(ID_SIZE))

_HEAD: Final = struct.Struct("<4sBBBBII32s24sQ")
_SUMS: Final = struct.Struct("<II")
BLOB_HEADER_SIZE: Final = _HEAD.size + _SUMS.size
# The largest chunk there is, and nothing of it compressed.
PLAIN_LENGTH_MAX: Final = 4 << 20
BLOB_SIZE_MAX: Final = BLOB_HEADER_SIZE + PLAIN_LENGTH_MAX + TAG_SIZE
# Less than 5 % gained is not worth the time of decompressing it at every restore.
_WORTHWHILE: Final = 0.95

# zstandard's objects must not be used by two threads at once, and are costly to make.
_of_thread = threading.local()


class BlobKind(IntEnum):
    CHUNK = 1
    PAGE = 2


class Codec(IntEnum):
    RAW = 0
    ZSTD = 1


class BlobHeader(NamedTuple):
    kind: int
    codec: int
    encrypted: int
    stored_length: int
    plain_length: int
    id: ChunkId
    session: bytes
    counter: int
    stored_crc: int

    @property
    def blob_size(self) -> int:
        return BLOB_HEADER_SIZE + self.stored_length


class Blob(NamedTuple):
    """`stored` may be a view of what was given, when nothing was to be gained."""

    id: ChunkId
    header: bytes
    stored: Piece
    plain_length: int

    @property
    def size(self) -> int:
        return len(self.header) + len(self.stored)


def id_of(kind: BlobKind, data: Piece, keys: Keys) -> ChunkId:
    """ZERO_ID for zeroes."""
    key = keys.chunk if kind is BlobKind.CHUNK else keys.page
    digest = blake3(data, key=key).digest()
    # The digest is needed anyway, and no other content has the digest of zeroes.
    return ZERO_ID if digest == _digest_of_zeroes(key, len(data)) else ChunkId(digest)


@lru_cache(maxsize=64)
def _digest_of_zeroes(key: bytes, length: int) -> bytes:
    return blake3(bytes(length), key=key).digest()


def encode(kind: BlobKind, chunk: ChunkId, data: Piece, keys: Keys, *, level: int) -> Blob:
    """chunk: `id_of` the data. level: of zstd; ids do not compress, so pages are stored as they are."""
    codec, stored = Codec.RAW, data
    if kind is BlobKind.CHUNK:
        compressed = _compressor(level).compress(data)
        if len(compressed) <= len(data) * _WORTHWHILE:
            codec, stored = Codec.ZSTD, compressed
    cipher = keys.cipher
    counter = 0 if cipher is None else cipher.next_counter()
    length = len(stored) + (0 if cipher is None else TAG_SIZE)
    head = _HEAD.pack(
        BLOB_MAGIC, VERSION, kind, codec, cipher is not None, length, len(data), chunk, keys.session(), counter
    )
    if cipher is not None:
        stored = cipher.encrypt(counter, head, stored)
    crc = crc32(stored)
    return Blob(chunk, head + _SUMS.pack(crc, crc32(crc.to_bytes(4, "little"), crc32(head))), stored, len(data))


def decode_header(data: Piece) -> BlobHeader:
    """Raises DataCorrupt."""
    if len(data) < BLOB_HEADER_SIZE:
        raise DataCorrupt("a blob is cut short")
    magic, version, kind, codec, encrypted, stored_length, plain_length, chunk, session, counter = _HEAD.unpack_from(
        data
    )
    stored_crc, header_crc = _SUMS.unpack_from(data, _HEAD.size)
    if magic != BLOB_MAGIC or crc32(data[: BLOB_HEADER_SIZE - 4]) != header_crc:
        raise DataCorrupt("the header of a blob is damaged")
    if version != VERSION or kind not in (1, 2) or codec not in (0, 1) or encrypted not in (0, 1):
        raise DataCorrupt("a blob is of an unknown version or kind")
    if plain_length > PLAIN_LENGTH_MAX or stored_length > plain_length + TAG_SIZE:
        raise DataCorrupt("a blob has impossible lengths")
    return BlobHeader(kind, codec, encrypted, stored_length, plain_length, ChunkId(chunk), session, counter, stored_crc)


def decode(data: bytes | memoryview, kind: BlobKind, chunk: ChunkId, keys: Keys) -> bytes:
    """The plain bytes of the blob at the start of `data`, proven to be `chunk`. Raises DataCorrupt."""
    header = decode_header(data)
    if header.id != chunk or header.kind != kind:
        raise DataCorrupt("another blob stands in its place")
    stored = memoryview(data)[BLOB_HEADER_SIZE : header.blob_size]
    check_stored(header, stored)
    payload: Piece = stored
    if header.encrypted:
        if keys.cipher is None:
            raise DataCorrupt("a blob is encrypted in a repository that is not")
        payload = keys.cipher.decrypt(header.session, header.counter, bytes(data[: _HEAD.size]), stored)
    elif keys.cipher is not None:
        raise DataCorrupt("a blob is not encrypted in a repository that is")
    plain = bytes(payload) if header.codec == Codec.RAW else _decompress(payload, header.plain_length)
    if len(plain) != header.plain_length or id_of(kind, plain, keys) != chunk:
        raise DataCorrupt("the bytes do not match their id")
    return plain


def check_stored(header: BlobHeader, stored: memoryview) -> None:
    """Needs no key. Raises DataCorrupt."""
    if len(stored) != header.stored_length:
        raise DataCorrupt("a blob is cut short")
    if crc32(stored) != header.stored_crc:
        raise DataCorrupt("the stored bytes do not match their checksum")


def _decompress(stored: Piece, plain_length: int) -> bytes:
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
