"""What is known about a backup beside its manifest, which never changes: verified, protected, tested.

A lost or damaged note only loses the knowledge. Format: README.md, "Sealed file".
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from typing import Any, Final

from stillpoint.errors import DataCorrupt, NotFound, Refused

from .backup_id import BackupId
from .sealed import SealedKind, seal, unseal
from .storage import Storage

_FOLDER: Final = "notes"
_QUARANTINE: Final = f"{_FOLDER}/quarantine"


@dataclass(frozen=True, slots=True)
class Note:
    verified_ns: int = 0
    protected: bool = False


class Notes:
    def __init__(self, storage: Storage, key: bytes) -> None:
        self._storage = storage
        self._key = key

    def get(self, backup: BackupId) -> Note:
        document = self._read(f"{_FOLDER}/{backup}")
        if document.pop("id", None) != backup:
            return Note()
        return Note(**document)

    def put(self, backup: BackupId, note: Note) -> None:
        """Durable on return."""
        document = {"id": backup, **asdict(note)}
        self._storage.replace(f"{_FOLDER}/{backup}", seal(SealedKind.NOTE, document, self._key))

    def delete(self, backup: BackupId) -> None:
        with contextlib.suppress(NotFound):
            self._storage.delete(f"{_FOLDER}/{backup}")

    def quarantined(self) -> set[tuple[str, int]]:
        """(pack, offset) of the blobs that were found damaged."""
        return {(pack, offset) for pack, offset in self._read(_QUARANTINE).get("blobs", [])}

    def put_quarantined(self, blobs: set[tuple[str, int]]) -> None:
        # A file that would not hold more has long been too much damage to be named blob by blob.
        document = {"blobs": sorted(blobs)[:10_000]}
        self._storage.replace(_QUARANTINE, seal(SealedKind.NOTE, document, self._key))

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return unseal(SealedKind.NOTE, self._storage.read(name), self._key)
        except (NotFound, DataCorrupt, Refused):
            return {}
