"""The overlays of one volume's writable snapshots: one file each, named by the snapshot's uuid.

A snapshot whose overlay file exists is writable. The file is made by this process and filled by the export process
(stillpoint/devices/overlay.py); what is written there never reaches the mirror, a store or another snapshot.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from stillpoint.devices import FileDevice
from stillpoint.devices.overlay import storage_size
from stillpoint.errors import DeviceError

from .cow import Snapshot

logger = logging.getLogger(__name__)


class Overlays:
    def __init__(self, folder: Path, snapshots: Iterable[Snapshot]) -> None:
        """folder: made when first needed. Overlays of snapshots that are no more are removed."""
        self._folder = folder
        known = {self._path(snapshot) for snapshot in snapshots}
        for path in folder.glob("*.overlay"):
            if path not in known:
                path.unlink()

    def path(self, snapshot: Snapshot) -> Path | None:
        """Of the snapshot's overlay; None: it is read-only."""
        path = self._path(snapshot)
        return path if path.exists() else None

    def create(self, snapshot: Snapshot, *, block_size: int) -> None:
        """Make the snapshot writable; durable on return. One that is writable stays as it is. Raises DeviceError."""
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise DeviceError(f"{self._folder}: {error.strerror}", error.errno or 0) from error
        if self.path(snapshot) is None:
            FileDevice.create(self._path(snapshot), storage_size(snapshot.size, block_size)).close()

    def delete(self, snapshot: Snapshot) -> None:
        """With everything that was written to it. A read-only snapshot has none.

        A file that cannot be removed is logged, and removed at the next start.
        """
        try:
            self._path(snapshot).unlink(missing_ok=True)
        except OSError as error:
            logger.error("overlay not removed: %s", error.strerror, extra={"file": self._path(snapshot)})

    def _path(self, snapshot: Snapshot) -> Path:
        return self._folder / f"{snapshot.uuid}.overlay"
