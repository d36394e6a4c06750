"""Small files: a document as JSON under a checksum. Format: README.md, "Sealed file"."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any, Final

from blake3 import blake3

from stillpoint.errors import DataCorrupt, Refused

from .keys import TAG_SIZE, Cipher

# 1 was the first, simple format: one data file for each backup. 2 is written and read.
VERSION: Final = 2
# The payload is encrypted: written by encrypted repositories, except for the file that holds the keys.
VERSION_ENCRYPTED: Final = 3
_NONCE: Final = struct.Struct("<24sQ")

_SEAL: Final = struct.Struct("<4sII32s")
_CRC: Final = struct.Struct("<I")
SEAL_HEADER_SIZE: Final = _SEAL.size + _CRC.size
# A manifest is below 4 KiB; this only keeps a corrupt length from being allocated.
SEALED_SIZE_MAX: Final = 1 << 20


class SealedKind:
    """Magics of the small files."""

    REPOSITORY: Final = b"SPRP"
    MANIFEST: Final = b"SPMF"
    NOTE: Final = b"SPNT"


def seal(kind: bytes, document: Mapping[str, Any], key: bytes | None, cipher: Cipher | None = None) -> bytes:
    """key: of the digest; None for the file that holds the keys. cipher: of an encrypted repository."""
    payload = json.dumps(document, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    version = VERSION
    if cipher is not None:
        version, counter = VERSION_ENCRYPTED, cipher.next_counter()
        payload = _NONCE.pack(cipher.session, counter) + cipher.encrypt(counter, kind, payload)
    assert len(payload) <= SEALED_SIZE_MAX - SEAL_HEADER_SIZE
    head = _SEAL.pack(kind, version, len(payload), _digest(payload, key))
    return head + _CRC.pack(zlib.crc32(head)) + payload


def unseal(kind: bytes, data: bytes, key: bytes | None, cipher: Cipher | None = None) -> dict[str, Any]:
    """cipher: of an encrypted repository; what it wrote before it encrypted this kind of file is read too.

    Raises DataCorrupt, and Refused for a version of the format that this program does not know."""
    if len(data) < SEAL_HEADER_SIZE:
        raise DataCorrupt("the header is cut short")
    magic, version, length, digest = _SEAL.unpack_from(data)
    if magic != kind or _CRC.unpack_from(data, _SEAL.size)[0] != zlib.crc32(data[: _SEAL.size]):
        raise DataCorrupt("the header is damaged")
    if version not in (VERSION, VERSION_ENCRYPTED):
        raise Refused(f"is of format version {version}; this program reads {VERSION} and {VERSION_ENCRYPTED}")
    payload = data[SEAL_HEADER_SIZE:]
    if len(payload) != length or _digest(payload, key) != digest:
        raise DataCorrupt("the contents do not match their checksum, or belong to another repository")
    if version == VERSION_ENCRYPTED:
        payload = _decrypted(kind, payload, cipher)
    try:
        document = json.loads(payload)
    except (RecursionError, ValueError) as error:
        raise DataCorrupt(f"the contents are no document: {error}") from None
    if not isinstance(document, dict):
        raise DataCorrupt("the contents are no document")
    return document


def _decrypted(kind: bytes, payload: bytes, cipher: Cipher | None) -> bytes:
    if cipher is None or len(payload) < _NONCE.size + TAG_SIZE:
        raise DataCorrupt("the contents are encrypted in a repository that is not, or cut short")
    session, counter = _NONCE.unpack_from(payload)
    return cipher.decrypt(session, counter, kind, payload[_NONCE.size :])


def _digest(payload: bytes, key: bytes | None) -> bytes:
    return blake3(payload).digest() if key is None else blake3(payload, key=key).digest()
