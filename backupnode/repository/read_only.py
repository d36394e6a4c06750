"""A repository read with nothing running and nothing written."""

from __future__ import annotations

import logging

from stillpoint.errors import DataCorrupt, NotFound

from .backup_id import BackupId
from .format import CHUNK_SIZE, Format, read_format
from .index import ChunkIndex
from .interface import Listing
from .keys import Keys, Secret, from_recovery_form
from .manifest import Manifest
from .manifests import list_manifests, read_manifest
from .packs import Packs, reconcile
from .reader import PackReader
from .storage import Storage

logger = logging.getLogger(__name__)


class ReadOnlyRepository:
    """A repository to which nothing is written and which need not be lockable. Plain calls.

    The index is made from the packs alone, so damage to anything but the file `repository`, the manifests and the packs
    does not matter.
    """

    def __init__(self, storage: Storage, secret: Secret | None = None) -> None:
        """Raises NotFound when there is none, and what `read_format` raises."""
        self._storage = storage
        self._format = _format_or_recovered(storage, secret)
        index = ChunkIndex()
        reconcile(self._storage, index, set())
        self._packs = Packs(self._storage, index, self._format.keys)

    def list(self) -> Listing:
        return list_manifests(self._storage, self._manifest)

    def open(self, backup: BackupId) -> PackReader:
        """Raises NotFound, DataCorrupt, DeviceError."""
        return PackReader(self._manifest(backup), self._packs, lambda damaged: None)

    def _manifest(self, backup: BackupId) -> Manifest:
        return read_manifest(self._storage, backup, self._format.keys)


def _format_or_recovered(storage: Storage, secret: Secret | None) -> Format:
    """With the recovery form, an encrypted repository can be read without its file `repository`."""
    try:
        return read_format(storage, secret)
    except (NotFound, DataCorrupt) as error:
        if secret is None or secret.recovery is None:
            raise
        logger.warning("reading by the recovery form alone: %s", error)
        return Format("", CHUNK_SIZE, Keys.of(from_recovery_form(secret.recovery), encrypted=True))
