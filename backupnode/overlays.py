"""What was written to exported backups: a file for each backup that is writable, named by it.

A backup whose overlay file exists is writable over NBD. The backup itself never changes: restores, verification and
incrementals do not see what is written here (`stillpoint/devices/overlay.py`).
"""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from stillpoint.devices import BlockDevice, FileDevice, open_device
from stillpoint.devices.overlay import OverlayDevice, storage_size
from stillpoint.errors import DeviceError, Refused

from .repository import BackupId, BackupRecord

logger = logging.getLogger(__name__)

_SUFFIX: Final = ".overlay"
_BLOCK_SIZE_MAX: Final = 64 << 10
_BLOCK_SIZE_MIN: Final = 512
# Makes a uuid of a backup's id, which an overlay keeps to know its own base.
_NAMESPACE: Final = uuid.UUID("5f0c8f0e-6a3f-4b0e-9a52-3c0f4f1d7a11")


class Overlays:
    """folder: made when first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def exists(self, backup: BackupId) -> bool:
        return self._path(backup).exists()

    def create(self, record: BackupRecord) -> None:
        """Nothing is written to it yet. Durable on return. One that exists stays. Raises Refused, DeviceError."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DeviceError(f"{self._folder}: {error.strerror}", error.errno or 0) from error
        if not self.exists(record.id):
            size = record.origin.size
            FileDevice.create(self._path(record.id), storage_size(size, _block_size(size))).close()

    def over(self, base: BlockDevice, record: BackupRecord) -> OverlayDevice:
        """The backup as it was written to. Owns `base`. Raises DeviceError, DataCorrupt."""
        storage = open_device([self._path(record.id)])
        try:
            return OverlayDevice(
                base,
                storage,
                base_uuid=str(uuid.uuid5(_NAMESPACE, record.id)),
                block_size=_block_size(record.origin.size),
            )
        except BaseException:
            storage.close()
            raise

    def delete(self, backup: BackupId) -> None:
        """With everything that was written. Raises DeviceError."""
        try:
            self._path(backup).unlink(missing_ok=True)
        except OSError as error:
            raise DeviceError(f"{self._path(backup)}: {error.strerror}", error.errno or 0) from error

    def keep_only(self, backups: Iterable[BackupId]) -> None:
        """Delete those of backups that are no more."""
        known = {self._path(backup) for backup in backups}
        for path in self._folder.glob(f"*{_SUFFIX}"):
            if path not in known:
                logger.info("deleting what was written to a backup that is no more", extra={"path": str(path)})
                path.unlink()

    def _path(self, backup: BackupId) -> Path:
        return self._folder / f"{backup}{_SUFFIX}"


def _block_size(size: int) -> int:
    """The largest that divides the volume: a power of two. Raises Refused when that is less than a sector."""
    block_size = math.gcd(size, _BLOCK_SIZE_MAX)
    if block_size < _BLOCK_SIZE_MIN:
        raise Refused(f"a backup of {size} bytes cannot be written to: that is not a multiple of {_BLOCK_SIZE_MIN}")
    return block_size
