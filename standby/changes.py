"""The instants of a volume that changes can be asked against, and what changed since one of them.

Invariant: an answer may name blocks that did not change, and never leaves out one that did. So an instant of another
life of the volume, or one after the snapshot, is "unknown", which means everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from stillpoint.devices import OverlayDevice

from .cow import VirtualDevice

_WINDOW_BLOCKS: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Instant:
    """Generations count up by one for each snapshot within one incarnation of a volume's block history."""

    incarnation: str
    generation: int


def instants(description: Mapping[str, Any]) -> dict[str, Instant]:
    """By name: the bookmarks and the snapshots of a volume, as its description tells them.

    A name may be both; it then means the older instant, or nothing known, so that nobody reads too little.
    """
    here = description["uuid"]
    found = {
        snapshot["name"]: Instant(here, snapshot["generation"])
        for snapshot in description["snapshots"]
        if snapshot["state"] != "creating"
    }
    for mark in description["bookmarks"]:
        instant = Instant(mark["incarnation"], mark["generation"])
        other = found.get(mark["name"])
        if other is None or instant.incarnation != here or instant.generation < other.generation:
            found[mark["name"]] = instant
    return found


class Changes:
    """What changed in a snapshot since `base`."""

    def __init__(
        self,
        device: VirtualDevice,
        base: Instant | None,
        *,
        incarnation: str,
        block_size: int,
        overlay: OverlayDevice | None = None,
    ) -> None:
        """base: None for an instant that nobody remembers. incarnation: of the snapshot's volume, now.

        overlay: what was written to it counts too.
        """
        self._device = device
        self._overlay = overlay
        self._block_size = block_size
        self._base = base.generation if base is not None else 0
        self.known = base is not None and base.incarnation == incarnation and base.generation <= device.generation
        """False: everything counts as changed."""

    def runs(self, offset: int, end: int) -> Iterator[list[tuple[int, int]]]:
        """(start, end) in bytes of the changed parts of a range, in order, one list for each window of blocks.

        A run may go on in the next list. Each window is computed when it is asked for and is bounded in memory.
        """
        if not self.known:
            yield [(offset, end)]
            return
        size = self._block_size
        for first in range(offset // size, -(-end // size), _WINDOW_BLOCKS):
            count = min(_WINDOW_BLOCKS, -(-end // size) - first)
            newer = np.zeros(count + 2, dtype=np.bool_)
            newer[1:-1] = self._device.births_as_of(first, count) > self._base
            if self._overlay is not None:
                newer[1:-1] |= self._overlay.written(first, count) != 0
            borders = (np.flatnonzero(newer[1:] != newer[:-1]) + first) * size
            yield [(max(start, offset), min(stop, end)) for start, stop in borders.reshape(-1, 2).tolist()]

    def parts(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """The range as parts (length, whether it changed), gapless; neighbours are never alike."""
        at, end = offset, offset + length
        dirty_from = offset
        for run in self.runs(offset, end):
            for start, stop in run:
                if start > at:
                    if at > dirty_from:
                        yield at - dirty_from, True
                    yield start - at, False
                    dirty_from = start
                at = stop
        if at > dirty_from:
            yield at - dirty_from, True
        if end > at:
            yield end - at, False
