"""The keys of a repository: ids of chunks and pages, digests of manifests, and, when it is encrypted, the cipher.

Invariants:
- Every repository has a random secret of its own, so ids tell nobody what is stored and are never the same in two.
- A nonce is used once: each process that opens the repository draws a session of 192 random bits, derives a subkey
  from it, and counts upwards.
- The master key is stored only wrapped, by a passphrase (scrypt) or by the contents of a key file.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import secrets
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from blake3 import blake3

from stillpoint.errors import ConfigError, DataCorrupt, Refused

KEY_SIZE: Final = 32
SESSION_SIZE: Final = 24
TAG_SIZE: Final = 16
_NO_SESSION: Final = bytes(SESSION_SIZE)
# About 64 MiB and 0.1 s for each guess.
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 1 << 16, 8, 1
_SCRYPT_MEMORY_MAX: Final = 256 << 20
_KEY_FILE_SIZE_MIN: Final = 32


@dataclass(frozen=True, slots=True)
class Secret:
    """What an operator unlocks an encrypted repository with: one of the two, or the recovery form."""

    passphrase: bytes | None = None
    key_file: bytes | None = None
    recovery: str | None = None


class Cipher:
    """AES-256-GCM under a subkey of the session."""

    def __init__(self, master: bytes) -> None:
        self._master = master
        self.session = secrets.token_bytes(SESSION_SIZE)
        self._counter = itertools.count(1)
        self._subkey = lru_cache(maxsize=256)(self._derive)

    def next_counter(self) -> int:
        return next(self._counter)

    def encrypt(self, counter: int, header: bytes, data: bytes | bytearray | memoryview) -> bytes:
        sealed: bytes = self._subkey(self.session).encrypt(_nonce(counter), bytes(data), header)
        return sealed

    def decrypt(self, session: bytes, counter: int, header: bytes, data: bytes | memoryview) -> bytes:
        """Raises DataCorrupt."""
        from cryptography.exceptions import InvalidTag

        try:
            plain: bytes = self._subkey(session).decrypt(_nonce(counter), bytes(data), header)
        except InvalidTag:
            raise DataCorrupt("the bytes do not match their authentication tag") from None
        return plain

    def _derive(self, session: bytes) -> Any:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(_hkdf(self._master, session, b"stillpoint blobs"))


@dataclass(frozen=True, slots=True)
class Keys:
    """Made from the repository's secret."""

    secret: bytes = field(repr=False)
    chunk: bytes = field(repr=False)
    page: bytes = field(repr=False)
    manifest: bytes = field(repr=False)
    cipher: Cipher | None = None

    @classmethod
    def of(cls, secret: bytes, *, encrypted: bool) -> Keys:
        assert len(secret) == KEY_SIZE
        chunk, page, manifest = (
            blake3(secret, derive_key_context=f"stillpoint repository 2 {use}").digest()
            for use in ("chunk ids", "page ids", "manifests")
        )
        return cls(secret, chunk, page, manifest, _cipher(secret) if encrypted else None)

    def session(self) -> bytes:
        return self.cipher.session if self.cipher is not None else _NO_SESSION


def _cipher(master: bytes) -> Cipher:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise ConfigError(
            "an encrypted repository needs the package `cryptography`; install stillpoint[encryption]"
        ) from None
    return Cipher(master)


def new_secret() -> bytes:
    return secrets.token_bytes(KEY_SIZE)


def wrap(master: bytes, secret: Secret) -> dict[str, str]:
    """The master key as an entry of the file `repository`. Raises ConfigError for a secret that is too short."""
    salt = secrets.token_bytes(16)
    kind = "passphrase" if secret.passphrase is not None else "key_file"
    wrapping = _wrapping_key(kind, secret, salt)
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = secrets.token_bytes(12)
    wrapped = AESGCM(wrapping).encrypt(nonce, master, kind.encode())
    return {"kind": kind, "salt": salt.hex(), "nonce": nonce.hex(), "wrapped": wrapped.hex()}


def unwrap(entries: list[dict[str, str]], secret: Secret) -> bytes:
    """The master key. Raises Refused when no entry opens with the secret."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    if secret.recovery is not None:
        return from_recovery_form(secret.recovery)
    for entry in entries:
        kind = entry["kind"]
        if (secret.passphrase if kind == "passphrase" else secret.key_file) is None:
            continue
        wrapping = _wrapping_key(kind, secret, bytes.fromhex(entry["salt"]))
        try:
            return AESGCM(wrapping).decrypt(
                bytes.fromhex(entry["nonce"]), bytes.fromhex(entry["wrapped"]), kind.encode()
            )
        except InvalidTag:
            continue
    raise Refused("the passphrase or key file does not open it")


def recovery_form(master: bytes) -> str:
    """To be printed and locked away: whoever has it reads the repository, with every passphrase lost."""
    text = base64.b32encode(master + zlib.crc32(master).to_bytes(4, "big")).decode().rstrip("=")
    return "-".join(text[start : start + 6] for start in range(0, len(text), 6))


def from_recovery_form(text: str) -> bytes:
    """Raises Refused for a typing error."""
    plain = "".join(text.split()).replace("-", "").upper()
    try:
        data = base64.b32decode(plain + "=" * (-len(plain) % 8))
    except ValueError:
        data = b""
    master, check = data[:KEY_SIZE], data[KEY_SIZE:]
    if len(master) != KEY_SIZE or zlib.crc32(master).to_bytes(4, "big") != check:
        raise Refused("the recovery form has a typing error")
    return master


def _wrapping_key(kind: str, secret: Secret, salt: bytes) -> bytes:
    if kind == "passphrase":
        assert secret.passphrase is not None
        if not secret.passphrase:
            raise ConfigError("the passphrase of the repository is empty")
        return hashlib.scrypt(
            secret.passphrase, salt=salt, n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P, maxmem=_SCRYPT_MEMORY_MAX, dklen=32
        )
    assert secret.key_file is not None
    if len(secret.key_file) < _KEY_FILE_SIZE_MIN:
        raise ConfigError(f"the key file of the repository has fewer than {_KEY_FILE_SIZE_MIN} bytes")
    return _hkdf(hashlib.sha256(secret.key_file).digest(), salt, b"stillpoint key file")


def _hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), length=32, salt=salt, info=info).derive(key)


def _nonce(counter: int) -> bytes:
    return counter.to_bytes(12, "big")
