"""What opens an encrypted repository: passphrases and key files, each with a wrapped copy of the one master key.

Changing them re-encrypts nothing and may be done while a node has the repository open. One change at a time: of two in
the same moment, one may be lost. A removed passphrase opens the repository no more, but whoever had it may have kept
the master key; only a new repository has another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillpoint.errors import NotFound, Refused

from .folder import FORMAT_FILE
from .format import read_format
from .keys import Secret, recovery_form, unwrap, wrap
from .sealed import SealedKind, seal, unseal
from .storage import Storage


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """kind: "passphrase" or "key_file"."""

    id: str
    kind: str


class Keyring:
    def __init__(self, storage: Storage, opener: Secret) -> None:
        """opener: what opens it now. Raises what `read_format` raises, Refused for one that is not encrypted too."""
        self._storage = storage
        self._master = read_format(storage, opener).keys.secret
        self._document: dict[str, Any] = unseal(SealedKind.REPOSITORY, storage.read(FORMAT_FILE), None)

    @property
    def entries(self) -> Sequence[KeyEntry]:
        return [_entry(each) for each in self._wrapped]

    @property
    def recovery_form(self) -> str:
        """To be printed and locked away: it opens the repository when all else, its file `repository` too, is lost."""
        return recovery_form(self._master)

    def add(self, new: Secret) -> KeyEntry:
        """Durable on return. Raises ConfigError for a secret that is too short, and DeviceError."""
        entry = wrap(self._master, new)
        assert unwrap([entry], new) == self._master
        self._replace([*self._wrapped, entry])
        return _entry(entry)

    def remove(self, identity: str) -> None:
        """Durable on return. Raises NotFound, Refused for the last one, and DeviceError."""
        left = [each for each in self._wrapped if _entry(each).id != identity]
        if len(left) == len(self._wrapped):
            raise NotFound(f"the repository {self._storage.description} has no key {identity}")
        if not left:
            raise Refused("the last key cannot be removed; add another one first")
        self._replace(left)

    @property
    def _wrapped(self) -> list[dict[str, str]]:
        wrapped: list[dict[str, str]] = self._document["wrapped_keys"]
        return wrapped

    def _replace(self, wrapped: list[dict[str, str]]) -> None:
        document = {**self._document, "wrapped_keys": wrapped}
        self._storage.replace(FORMAT_FILE, seal(SealedKind.REPOSITORY, document, None))
        self._document = document


def _entry(wrapped: dict[str, str]) -> KeyEntry:
    # The salt is random, and different in each.
    return KeyEntry(wrapped["salt"][:8], wrapped["kind"])
