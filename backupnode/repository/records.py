"""The bytes of the first repository format: pure coding, no I/O. The tables are in README.md of this folder.

Every number is little-endian. Every byte of every file lies under a checksum that reading checks, so a change of any
byte is noticed. What is wrong with bytes that were read is told as DataCorrupt; the caller adds where they are.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, NamedTuple

from blake3 import blake3

from stillpoint.errors import DataCorrupt, Refused

# The first format. Written and read.
VERSION: Final = 1

DIGEST_SIZE: Final = 32
ENTRIES_PER_PAGE: Final = 1024

_RECORD: Final = struct.Struct("<4sBBBBQII32sI")
_CRC: Final = struct.Struct("<I")
RECORD_HEADER_SIZE: Final = _RECORD.size + _CRC.size
_RECORD_MAGIC: Final = b"SPRC"

_FILE: Final = struct.Struct("<4sIIIQI")
FILE_HEADER_SIZE: Final = _FILE.size + _CRC.size
_FILE_MAGIC: Final = b"SPDF"

_ENTRY: Final = struct.Struct("<IIQ32s")
ENTRY_SIZE: Final = _ENTRY.size

_SEAL: Final = struct.Struct("<4sII32s")
SEAL_HEADER_SIZE: Final = _SEAL.size + _CRC.size
# A manifest is below 1 KiB; this only keeps a corrupt length from being allocated.
SEALED_SIZE_MAX: Final = 1 << 20


class RecordType(IntEnum):
    CHUNK = 1
    PAGE = 2
    ROOT = 3


class Codec(IntEnum):
    RAW = 0
    ZSTD = 1


class SealedKind:
    """Magics of the small files."""

    REPOSITORY: Final = b"SPRP"
    MANIFEST: Final = b"SPMF"
    VERIFIED: Final = b"SPVT"


def digest_of(data: bytes | bytearray | memoryview) -> bytes:
    return blake3(data).digest()


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What stands before the stored bytes of a chunk, an index page or the root.

    number: index of the chunk or page; 0 for the root. digest: BLAKE3 of the plain bytes.
    stored_crc: CRC-32 of the stored bytes; it notices damage that decompression would hide.
    """

    type: RecordType
    codec: Codec
    number: int
    stored_length: int
    plain_length: int
    digest: bytes
    stored_crc: int

    def encode(self) -> bytes:
        head = _RECORD.pack(
            _RECORD_MAGIC,
            VERSION,
            self.type,
            self.codec,
            0,
            self.number,
            self.stored_length,
            self.plain_length,
            self.digest,
            self.stored_crc,
        )
        return head + _CRC.pack(zlib.crc32(head))

    @classmethod
    def decode(cls, header: bytes | memoryview) -> RecordHeader:
        fields = _checked(_RECORD, header, _RECORD_MAGIC, "a record header")
        _, version, type_, codec, reserved, number, stored_length, plain_length, digest, stored_crc = fields
        if version != VERSION or reserved:
            raise DataCorrupt(f"a record has the unknown version {version}")
        try:
            return cls(RecordType(type_), Codec(codec), number, stored_length, plain_length, digest, stored_crc)
        except ValueError:
            raise DataCorrupt(f"a record has the unknown type {type_} or codec {codec}") from None


class Entry(NamedTuple):
    """Where a record is, and what it must be. In a page `number` is the chunk's slot, in the root the page's index.

    position: of the record's header in the data file.
    """

    number: int
    stored_length: int
    position: int
    digest: bytes


def encode_entries(entries: Iterable[Entry]) -> bytes:
    return b"".join(_ENTRY.pack(*entry) for entry in entries)


def decode_entries(payload: bytes | memoryview, *, number_limit: int) -> dict[int, Entry]:
    """By number, ascending. Raises DataCorrupt unless the numbers ascend and lie below `number_limit`."""
    if len(payload) % ENTRY_SIZE:
        raise DataCorrupt("an index ends in the middle of an entry")
    entries: dict[int, Entry] = {}
    last = -1
    for fields in _ENTRY.iter_unpack(payload):
        entry = Entry._make(fields)
        if not last < entry.number < number_limit:
            raise DataCorrupt("the entries of an index are out of order")
        last = entry.number
        entries[last] = entry
    return entries


def encode_file_header(*, chunk_size: int, volume_size: int) -> bytes:
    head = _FILE.pack(_FILE_MAGIC, VERSION, chunk_size, ENTRIES_PER_PAGE, volume_size, 0)
    return head + _CRC.pack(zlib.crc32(head))


def decode_file_header(header: bytes) -> tuple[int, int]:
    """(chunk size, volume size)"""
    _, version, chunk_size, entries, volume_size, reserved = _checked(_FILE, header, _FILE_MAGIC, "the file header")
    if version != VERSION or entries != ENTRIES_PER_PAGE or reserved:
        raise DataCorrupt(f"the file header has the unknown version {version}")
    return chunk_size, volume_size


def seal(kind: bytes, document: Mapping[str, Any]) -> bytes:
    """A small file: the document as JSON, under a checksum."""
    payload = json.dumps(document, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    assert len(payload) <= SEALED_SIZE_MAX - SEAL_HEADER_SIZE
    head = _SEAL.pack(kind, VERSION, len(payload), digest_of(payload))
    return head + _CRC.pack(zlib.crc32(head)) + payload


def unseal(kind: bytes, data: bytes) -> dict[str, Any]:
    """Raises DataCorrupt, and Refused for a version of the format that this program does not know."""
    _, version, length, digest = _checked(_SEAL, data[:SEAL_HEADER_SIZE], kind, "the header")
    if version != VERSION:
        raise Refused(f"is of format version {version}; this program reads version {VERSION}")
    payload = data[SEAL_HEADER_SIZE:]
    if len(payload) != length or digest_of(payload) != digest:
        raise DataCorrupt("the contents do not match their checksum")
    document: dict[str, Any] = json.loads(payload)
    return document


def _checked(layout: struct.Struct, header: bytes | memoryview, magic: bytes, what: str) -> tuple[Any, ...]:
    if len(header) != layout.size + _CRC.size:
        raise DataCorrupt(f"{what} is cut short")
    fields = layout.unpack_from(header)
    if fields[0] != magic or _CRC.unpack_from(header, layout.size)[0] != zlib.crc32(header[: layout.size]):
        raise DataCorrupt(f"{what} is damaged")
    return fields
