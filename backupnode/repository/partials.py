"""How far a backup got that was interrupted, so that the next one of its volume need not read that again.

Invariants:
- A partial backup is a note, never a manifest: it is listed nowhere and cannot be restored. Losing it costs time.
- It is written when everything it names is durable, in the thread that collections condemn packs in; collections keep
  what it names. One that is damaged names nothing, and is no base.
- Each volume has one at most. A committed backup of the volume ends it.

Format: README.md, "Sealed file", kind note: `manifest`, as in a manifest, and `regions`, a list of [end, incarnation,
generation].
"""

from __future__ import annotations

import logging
from typing import Final

from stillpoint.errors import DataCorrupt, NotFound, Refused

from .interface import Partial, Region
from .manifest import Manifest
from .packs import Packs
from .reader import PackReader
from .sealed import SealedKind, seal, unseal
from .storage import Storage

logger = logging.getLogger(__name__)

_FOLDER: Final = "notes"
_PREFIX: Final = "partial-"


class Partials:
    """Plain calls that may wait for the storage."""

    def __init__(self, storage: Storage, packs: Packs) -> None:
        self._storage = storage
        self._packs = packs

    def get(self, volume: str) -> Partial | None:
        found = self._load(volume)
        return None if found is None else Partial(found[0].record, found[1])

    def put(self, manifest: Manifest, regions: tuple[Region, ...]) -> None:
        """Durable on return, instead of what there was. Raises DeviceError."""
        document = {"manifest": manifest.document(), "regions": [list(region) for region in regions]}
        name = _name(manifest.record.origin.volume)
        keys = self._packs.keys
        self._storage.replace(name, seal(SealedKind.NOTE, document, keys.manifest, keys.cipher))

    def delete(self, volume: str) -> None:
        try:
            self._storage.delete(_name(volume))
        except NotFound:
            return

    def open(self, volume: str) -> tuple[PackReader, tuple[Region, ...]]:
        """Raises NotFound, DataCorrupt, DeviceError."""
        found = self._load(volume)
        if found is None:
            raise NotFound(f"there is no partial backup of volume {volume}")
        manifest, regions = found
        return PackReader(manifest, self._packs, lambda damaged: None), regions

    def volumes(self) -> list[str]:
        return [name.removeprefix(_PREFIX) for name in self._storage.names(_FOLDER) if name.startswith(_PREFIX)]

    def _load(self, volume: str) -> tuple[Manifest, tuple[Region, ...]] | None:
        try:
            keys = self._packs.keys
            document = unseal(SealedKind.NOTE, self._storage.read(_name(volume)), keys.manifest, keys.cipher)
            manifest = Manifest.from_document(document["manifest"])
            regions = tuple(Region(int(end), str(life), int(number)) for end, life, number in document["regions"])
        except (NotFound, DataCorrupt, Refused):
            return None
        except (KeyError, TypeError, ValueError) as error:
            logger.warning("the note of a partial backup of volume %s makes no sense: %r", volume, error)
            return None
        return (manifest, regions) if manifest.record.origin.volume == volume else None


def _name(volume: str) -> str:
    return f"{_FOLDER}/{_PREFIX}{volume}"
