"""The dirty maps of volumes that this node served before another one was promoted.

What such a map holds may be on this copy alone. The node that is primary now asks for it at the handshake, and this
copy forgets it when the resync that settles it has begun.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stillpoint.extents import Extent

from .dirty_map import DirtyMap
from .record import VolumeRecord
from .volume import open_map


class FormerVolumes:
    """Maps are opened when first asked for. Every method runs on the loop."""

    def __init__(self, folder: Path) -> None:
        """folder: of the volumes' records."""
        self._folder = folder
        self._open: dict[str, DirtyMap] = {}

    def _map(self, volume: str) -> DirtyMap | None:
        """None: the volume was never served here. Raises DeviceError, DataCorrupt."""
        if volume not in self._open:
            if not (self._folder / volume / "volume.json").exists():
                return None
            self._open[volume] = open_map(VolumeRecord.load(self._folder / volume))
        return self._open[volume]

    def dirty_bytes(self, volume: str) -> int:
        found = self._map(volume)
        return found.dirty_bytes if found is not None else 0

    def extents(self, volume: str) -> Iterator[Extent]:
        """Ascending."""
        found = self._map(volume)
        return found.extents() if found is not None else iter(())

    def clear(self, volume: str) -> None:
        """Durable on return."""
        found = self._map(volume)
        if found is not None:
            found.clear()

    def close(self, volume: str) -> None:
        """It is served again, or deleted."""
        found = self._open.pop(volume, None)
        if found is not None:
            found.close(clean=True)

    def close_all(self) -> None:
        for volume in list(self._open):
            self.close(volume)
