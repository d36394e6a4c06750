"""Reads that the local disk fails: served from a standby that has the range, and written back here.

Invariants
- What is served holds every write that was answered before the read began: a standby is asked only about chunks that
  its map does not call dirty, in the one ordered stream of writes.
- What is written back is not older than what is here: not if a client wrote into the range meanwhile.
- A range that no standby has fails with the disk's own error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from stillpoint.devices import BlockDevice
from stillpoint.errors import DeviceError, PeerUnavailable, StillpointError
from stillpoint.extents import Extent, split
from stillpoint.link.frames import MAX_PAYLOAD_SIZE

from .attached import AttachedStandby

logger = logging.getLogger(__name__)

# A disk fails whole sectors; what is written back has to cover them, or the system would read the rest first.
_SECTOR_SIZE = 4096


class Watched:
    """A range that is read elsewhere; `disturbed` when it was written to meanwhile."""

    __slots__ = ("disturbed", "end", "offset")

    def __init__(self, extent: Extent) -> None:
        self.offset, self.end = extent.offset, extent.end
        self.disturbed = False


class ReadRescue:
    """`read_into` runs in threads, everything else on the loop that this was made on."""

    def __init__(
        self,
        name: str,
        device: BlockDevice,
        standbys: Callable[[], Sequence[AttachedStandby]],
        watching: Callable[[Extent], AbstractContextManager[Watched]],
    ) -> None:
        """name: of the volume. `watching`: notes writes into a range while it lasts."""
        self.failure_count = 0  # reads that the disk failed
        self.repaired_bytes = 0
        self._name = name
        self._device = device
        self._standbys = standbys
        self._watching = watching
        self._loop = asyncio.get_running_loop()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from the disk, or else from a standby. Raises DeviceError."""
        try:
            self._device.read_into(offset, buffer)
        except DeviceError as error:
            for piece in split(Extent(offset, len(buffer)), limit=MAX_PAYLOAD_SIZE - 2 * _SECTOR_SIZE):
                fetching = asyncio.run_coroutine_threadsafe(self._fetch(piece, error), self._loop)
                at = piece.offset - offset
                buffer[at : at + piece.length] = fetching.result()

    async def _fetch(self, piece: Extent, error: DeviceError) -> memoryview:
        self.failure_count += 1
        logger.error("a read failed: %s", error, extra={"volume": self._name, "offset": piece.offset})
        start = piece.offset // _SECTOR_SIZE * _SECTOR_SIZE
        end = min(-(-piece.end // _SECTOR_SIZE) * _SECTOR_SIZE, self._device.size)
        extent = Extent(start, end - start)
        for standby in self._standbys():
            if not standby.dirty.is_sent(extent):
                continue
            with self._watching(extent) as watched, contextlib.suppress(DeviceError, PeerUnavailable):
                content = await standby.sender.read(extent.offset, extent.length)
                if not watched.disturbed:
                    self._write_back(extent, content)
                return memoryview(content)[piece.offset - start : piece.end - start]
        raise error

    def _write_back(self, extent: Extent, content: bytes) -> None:
        try:
            self._device.write(extent.offset, (content,))
        except StillpointError as error:
            logger.error("what a standby has cannot be written back: %s", error, extra={"volume": self._name})
            return
        self.repaired_bytes += extent.length
        logger.warning(
            "repaired from a standby", extra={"volume": self._name, "offset": extent.offset, "length": extent.length}
        )
