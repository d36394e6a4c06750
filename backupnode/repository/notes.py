"""What is known about backups beside their manifests, which never change: verified, protected, and that they exist.

Invariants:
- Every backup has a note from just after its commit on, so that a manifest which vanishes is missed. One that a crash
  came in between gets its note when the repository is opened.
- A deletion is noted before the manifest goes, and the note goes last: an interrupted one is ended at the next opening.
- A lost note only loses the knowledge. A damaged one counts as protected: nobody knows that it was not.
Format: README.md, "Sealed file".
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from stillpoint.errors import DataCorrupt, InvalidRequest, NotFound, Refused

from .backup_id import BackupId, parse_backup_id
from .keys import Keys
from .sealed import SealedKind, seal, unseal
from .storage import Storage

logger = logging.getLogger(__name__)

FOLDER: Final = "notes"
_QUARANTINE: Final = "quarantine"
_PASSES: Final = {False: "check-quick", True: "check-deep"}


@dataclass(frozen=True, slots=True)
class Note:
    """deleting: its manifest is about to go, or gone."""

    verified_ns: int = 0
    protected: bool = False
    deleting: bool = False
    tested_ns: int = 0
    test_error: str = ""


@dataclass(frozen=True, slots=True)
class Pass:
    """How far checks of limited time have come: to the pack `after`; `ended`: to the last one."""

    started_ns: int
    after: str = ""
    ended: bool = False


class Notes:
    def __init__(self, storage: Storage, keys: Keys) -> None:
        self._storage = storage
        self._keys = keys

    def get(self, backup: BackupId) -> Note:
        return self.find(backup) or Note()

    def find(self, backup: BackupId) -> Note | None:
        """None: there is none."""
        try:
            document = self._read(backup)
            if document.pop("id", None) != backup:
                raise DataCorrupt("it is of another backup")
            return Note(**document)
        except NotFound:
            return None
        except (DataCorrupt, Refused, TypeError) as error:
            logger.warning("the note of backup %s is damaged, so it counts as protected: %s", backup, error)
            return Note(protected=True)

    def put(self, backup: BackupId, note: Note) -> None:
        """Durable on return."""
        self._write(backup, {"id": backup, **asdict(note)})

    def delete(self, backup: BackupId) -> None:
        with contextlib.suppress(NotFound):
            self._storage.delete(f"{FOLDER}/{backup}")

    def backups(self) -> list[BackupId]:
        """That have a note."""
        found = []
        for name in self._storage.names(FOLDER):
            with contextlib.suppress(InvalidRequest):
                found.append(parse_backup_id(name))
        return found

    def damaged(self) -> list[str]:
        """The names of notes that cannot be read."""
        found = []
        for name in self._storage.names(FOLDER):
            try:
                document = self._read(name)
                # Others, such as of partial backups, have no names of backups.
                with contextlib.suppress(InvalidRequest):
                    if document.get("id") != parse_backup_id(name):
                        found.append(name)
            except NotFound:
                continue
            except (DataCorrupt, Refused):
                found.append(name)
        return found

    def quarantined(self) -> set[tuple[str, int]]:
        """(pack, offset) of the blobs that were found damaged."""
        document = self._read_if_possible(_QUARANTINE)
        return {(pack, offset) for pack, offset in document.get("blobs", [])}

    def put_quarantined(self, blobs: Iterable[tuple[str, int]]) -> None:
        # A file that would not hold more has long been too much damage to be named blob by blob.
        self._write(_QUARANTINE, {"blobs": sorted(blobs)[:10_000]})

    def open_pass(self, *, deep: bool) -> Pass | None:
        """One that has begun and not ended."""
        try:
            found = Pass(**self._read_if_possible(_PASSES[deep]))
        except TypeError:
            return None
        return None if found.ended else found

    def put_pass(self, under_way: Pass, *, deep: bool) -> None:
        self._write(_PASSES[deep], asdict(under_way))

    def _read_if_possible(self, name: str) -> dict[str, Any]:
        try:
            return self._read(name)
        except (NotFound, DataCorrupt, Refused):
            return {}

    def _read(self, name: str) -> dict[str, Any]:
        data = self._storage.read(f"{FOLDER}/{name}")
        return unseal(SealedKind.NOTE, data, self._keys.manifest, self._keys.cipher)

    def _write(self, name: str, document: dict[str, Any]) -> None:
        data = seal(SealedKind.NOTE, document, self._keys.manifest, self._keys.cipher)
        self._storage.replace(f"{FOLDER}/{name}", data)
