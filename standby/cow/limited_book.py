"""Keeping the snapshots of a volume within its limits (`limits.py`), and changing these.

Limits on room are kept by whoever commits (`write_stream.py`), as nothing else needs room.
"""

from __future__ import annotations

from collections.abc import Sequence

from stillpoint.errors import Refused

from .catalog import Event
from .limits import Limits, OwnLimits
from .snapshot_book import SnapshotBook
from .values import SnapshotState


class LimitedBook(SnapshotBook):
    @property
    def limits(self) -> Limits:
        """In force."""
        return self._limits

    @property
    def own_limits(self) -> OwnLimits:
        """Those of them that were set for this volume."""
        return self._volume.own_limits

    @property
    def preserved_size(self) -> int:
        """Bytes in stores, counted by `limits.preserved_size_max`."""
        return self._volume.preserved_size

    async def set_limits(self, own: OwnLimits) -> None:
        """Let the volume have these limits of its own, and for all others those of the node. Durable on return.

        Raises InvalidRequest, DeviceError; Refused for a limit that is exceeded already, as it would cost snapshots.
        """
        volume = self._volume
        async with self._lock:
            limits = self._default_limits.with_own(own)
            if 0 < limits.count_max < len(volume.snapshots):
                raise Refused(
                    f"volume {self.name}: has {len(volume.snapshots)} snapshots, more than {limits.count_max};"
                    " delete some first"
                )
            if 0 < limits.preserved_size_max < volume.preserved_size:
                raise Refused(
                    f"volume {self.name}: its snapshots hold {volume.preserved_size} bytes, more than"
                    f" {limits.preserved_size_max}; delete some first"
                )
            await self._run(lambda: volume.catalog.append(Event.LIMITS, **own))
            volume.own_limits = own
            self._limits = limits

    async def expire_surplus(self) -> None:
        """Delete the oldest snapshots that are not protected until there are no more than may be, if they expire."""
        await self._uninterrupted(self._expire_surplus())

    async def _expire_surplus(self) -> None:
        async with self._ending, self._lock:
            # Asked again each time: while one goes, another may be protected.
            while (surplus := self._surplus()) and await self._expire(surplus[0]):
                pass

    def _surplus(self, more: int = 0) -> Sequence[int]:
        """What would have to go, oldest first, if there were `more` snapshots; nothing unless they expire."""
        count = len(self._volume.snapshots) + more - self._limits.count_max
        if not (self._limits.expires and self._limits.count_max):
            return ()
        return [
            snapshot.generation
            for snapshot in self.snapshots()
            if snapshot.state in (SnapshotState.ACTIVE, SnapshotState.INVALID) and not snapshot.protected
        ][: max(count, 0)]
