"""The file `repository`: what must be known before anything else can be read. Format: README.md, "Sealed file"."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from stillpoint.errors import AlreadyExists, DataCorrupt, NotFound, Refused

from .folder import FORMAT_FILE
from .keys import KEY_SIZE, Keys, Secret, new_secret, unwrap, wrap
from .sealed import SealedKind, seal, unseal
from .storage import Storage

CHUNK_SIZE: Final = 256 << 10
CHUNK_SIZE_MIN: Final = 4 << 10
CHUNK_SIZE_MAX: Final = 4 << 20

# A feature stops every program that does not know it from what would go wrong: reading, writing, or collecting.
_OPERATIONS: Final = ("read", "write", "collect")
_KNOWN_FEATURES: Final = frozenset({"encryption"})


@dataclass(frozen=True, slots=True)
class Format:
    uuid: str
    chunk_size: int
    keys: Keys


def make_format(storage: Storage, *, chunk_size: int, secret: Secret | None, clock: Callable[[], int]) -> None:
    """Write the file of a new repository; one that another process has just written stays. Raises DeviceError."""
    assert CHUNK_SIZE_MIN <= chunk_size <= CHUNK_SIZE_MAX and chunk_size.bit_count() == 1
    master = new_secret()
    features = [] if secret is None else ["encryption"]
    document: dict[str, Any] = {
        "chunk_size": chunk_size,
        "created_ns": clock(),
        "uuid": str(uuid.uuid4()),
        "features": dict.fromkeys(_OPERATIONS, features),
    }
    if secret is None:
        document["secret"] = master.hex()
    else:
        document["wrapped_keys"] = [wrap(master, secret)]
    with contextlib.suppress(AlreadyExists):
        storage.create(FORMAT_FILE, seal(SealedKind.REPOSITORY, document, None))


def read_format(storage: Storage, secret: Secret | None) -> Format:
    """Raises NotFound, DataCorrupt, and Refused for another format, unknown features or a secret that does not fit."""
    try:
        document = unseal(SealedKind.REPOSITORY, storage.read(FORMAT_FILE), None)
        _check_features(document["features"])
        encrypted = "wrapped_keys" in document
        if encrypted and secret is None:
            raise Refused("is of an encrypted repository; name its passphrase file or key file")
        if not encrypted and secret is not None:
            raise Refused("is of a repository that is not encrypted, and a key is configured")
        master = unwrap(document["wrapped_keys"], secret) if secret is not None else bytes.fromhex(document["secret"])
        chunk_size = int(document["chunk_size"])
        # What is read into memory and what positions are made of follows from these.
        if not CHUNK_SIZE_MIN <= chunk_size <= CHUNK_SIZE_MAX or chunk_size.bit_count() != 1:
            raise ValueError(f"chunk_size {chunk_size}")
        if len(master) != KEY_SIZE:
            raise ValueError("the secret's size")
        return Format(str(document["uuid"]), chunk_size, Keys.of(master, encrypted=encrypted))
    except NotFound:
        raise NotFound(f"{storage.description} is not a repository") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataCorrupt(
            f"the repository {storage.description} has a file 'repository' of no sense: {error!r}"
        ) from None
    except (DataCorrupt, Refused) as error:
        raise type(error)(
            f"the repository {storage.description} cannot be used: its file {FORMAT_FILE!r}: {error}"
        ) from None


def _check_features(features: dict[str, list[str]]) -> None:
    unknown = sorted({each for operation in _OPERATIONS for each in features[operation]} - _KNOWN_FEATURES)
    if unknown:
        raise Refused(f"needs features that this program does not know: {', '.join(unknown)}")
