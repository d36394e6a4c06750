"""The manifests and notes of a repository as sets: which backups there are, and how one goes for good."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Final

from stillpoint.errors import DataCorrupt, InvalidRequest, NotFound, Refused

from .backup_id import BackupId, parse_backup_id
from .interface import Listing
from .keys import Keys
from .manifest import Manifest
from .notes import Note, Notes
from .storage import Storage

logger = logging.getLogger(__name__)

MANIFESTS: Final = "manifests"


def manifest_ids(storage: Storage) -> Iterator[BackupId]:
    for name in storage.names(MANIFESTS):
        with contextlib.suppress(InvalidRequest):
            yield parse_backup_id(name)


def read_manifest(storage: Storage, backup: BackupId, keys: Keys) -> Manifest:
    """Raises NotFound, DataCorrupt, Refused, DeviceError."""
    try:
        data = storage.read(f"{MANIFESTS}/{parse_backup_id(backup)}")
    except NotFound:
        raise NotFound(f"there is no backup {backup}") from None
    try:
        return Manifest.decode(data, backup=backup, key=keys.manifest, cipher=keys.cipher)
    except (DataCorrupt, Refused) as error:
        raise type(error)(f"backup {backup} is damaged: its manifest: {error}") from None


def list_manifests(storage: Storage, read: Callable[[BackupId], Manifest]) -> Listing:
    """Oldest first; a damaged one hides no other."""
    backups, damaged = [], []
    for backup in manifest_ids(storage):
        try:
            backups.append(read(backup).record)
        except NotFound:
            continue  # deleted meanwhile
        except (DataCorrupt, Refused) as error:
            logger.warning("%s", error)
            damaged.append(backup)
    return Listing(sorted(backups, key=lambda record: (record.origin.snapshot_ns, record.id)), damaged)


def end_deletion(storage: Storage, notes: Notes, backup: BackupId) -> None:
    """Once it has been noted. Raises DeviceError."""
    with contextlib.suppress(NotFound):
        storage.delete(f"{MANIFESTS}/{backup}")
    notes.delete(backup)


def agree_notes(storage: Storage, notes: Notes) -> None:
    """After a crash: end deletions, and note the backups that have no note. Raises DeviceError."""
    noted = notes.backups()
    for backup in noted:
        if notes.get(backup).deleting:
            logger.info("ending the deletion of backup %s", backup)
            end_deletion(storage, notes, backup)
    for backup in set(manifest_ids(storage)).difference(noted):
        notes.put(backup, Note())
