"""Compares a volume with its mirror while both are in use.

Each piece is read here in one turn of the loop, and its digest is sent in the same turn: so it stands for the content
after exactly those writes that were sent before it, and the standby compares at that point of the stream. A difference
is therefore real, never a write that was on its way. A piece that was written to while the standby had to read it from
its disk comes back undecided and is asked for again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from dataclasses import dataclass, field

from stillpoint.devices import BlockDevice
from stillpoint.digest import digest
from stillpoint.errors import PeerUnavailable
from stillpoint.extents import Extent, split
from stillpoint.link.frames import Verdict

from .dirty_map import CHUNK_SIZE, DirtyMap
from .mirrored_device import MirroredDevice
from .resync import read_settled
from .sender import Sender
from .throttle import Throttle

_PIECE_SIZE = 256 * 1024
_HOLE_SIZE = 64 << 20
_IN_FLIGHT = 8
# A piece that clients write to all the time: given up, and said so.
_TRIES = 20


@dataclass(slots=True)
class Comparison:
    """How far it is, and what it found. `different` and `undecided` are in order, neighbours joined."""

    total_bytes: int
    done_bytes: int = 0
    different: list[Extent] = field(default_factory=list)
    undecided: list[Extent] = field(default_factory=list)


class Verifier:
    """One comparison over one session. `run` it once."""

    def __init__(
        self, device: BlockDevice, volume: MirroredDevice, sender: Sender, executor: Executor, *, rate: int
    ) -> None:
        """rate: bytes a second, at most; 0: unlimited."""
        self._device = device
        self._volume = volume
        self._sender = sender
        self._executor = executor
        self._throttle = Throttle(rate)
        self._waiting: dict[tuple[int, int], int] = {}  # range → times asked
        self._again: deque[tuple[Extent, int]] = deque()
        self._answered = asyncio.Event()
        self.comparison = Comparison(device.size)

    async def run(self) -> AsyncIterator[Comparison]:
        """Yields the state of things from time to time, and last when all is done.

        Raises PeerUnavailable when the session ends first.
        """
        self._sender.verdicts = self._verdict
        try:
            for piece, hole in self._pieces():
                await self._ask(piece, hole=hole, tries=1)
                while self._again:
                    extent, tries = self._again.popleft()
                    await self._ask(extent, hole=False, tries=tries)
                yield self.comparison
                await self._throttle.take(piece.length)
            while self._waiting or self._again:
                while self._again:
                    extent, tries = self._again.popleft()
                    await self._ask(extent, hole=False, tries=tries)
                await self._room(1)
            yield self.comparison
        finally:
            self._sender.verdicts = None

    def _pieces(self) -> list[tuple[Extent, bool]]:
        pieces = []
        for mapped in self._device.extents(0, self._device.size):
            limit = _HOLE_SIZE if mapped.hole else _PIECE_SIZE
            pieces += [(piece, mapped.hole) for piece in split(Extent(mapped.offset, mapped.length), limit=limit)]
        return pieces

    async def _ask(self, extent: Extent, *, hole: bool, tries: int) -> None:
        await self._room(_IN_FLIGHT)
        if hole and all(mapped.hole for mapped in self._device.extents(extent.offset, extent.length)):
            self._send(extent, b"", tries)
            return
        for piece in split(extent, limit=_PIECE_SIZE):
            await self._room(_IN_FLIGHT)
            content = await read_settled(self._device, piece, self._volume, self._executor)
            self._send(piece, digest(content), tries)

    def _send(self, extent: Extent, content_digest: bytes, tries: int) -> None:
        self._waiting[extent.offset, extent.length] = tries
        self._sender.verify(extent.offset, extent.length, content_digest)

    async def _room(self, limit: int) -> None:
        """Until fewer than `limit` questions are open."""
        while len(self._waiting) >= limit:
            if self._sender.ended:
                raise PeerUnavailable("the data link ended during the comparison")
            self._answered.clear()
            try:
                async with asyncio.timeout(1.0):
                    await self._answered.wait()
            except TimeoutError:
                continue  # look again whether the session has ended

    def _verdict(self, offset: int, length: int, verdict: Verdict) -> None:
        tries = self._waiting.pop((offset, length), None)
        if tries is None:
            return
        self._answered.set()
        extent = Extent(offset, length)
        if verdict is Verdict.UNKNOWN and tries < _TRIES:
            self._again.append((extent, tries + 1))
            return
        self.comparison.done_bytes += length
        if verdict is Verdict.DIFFERENT:
            _add(self.comparison.different, extent)
        elif verdict is Verdict.UNKNOWN:
            _add(self.comparison.undecided, extent)


async def keep_differences(verifier: Verifier, dirty: DirtyMap) -> None:
    """Of a map that calls everything dirty, keep what really differs: the rest need not be sent again.

    A range that was the same at its point of the stream stays so, as every later write is sent. Marks go when all has
    been compared; what is the same still has to be flushed there, like what was sent.
    Raises PeerUnavailable; the map is as it was then.
    """
    async for _ in verifier.run():
        pass
    at = 0
    for extent in sorted(verifier.comparison.different + verifier.comparison.undecided):
        start = extent.offset // CHUNK_SIZE * CHUNK_SIZE
        if start > at:
            dirty.sent(Extent(at, start - at))
        at = max(at, -(-extent.end // CHUNK_SIZE) * CHUNK_SIZE)
    if at < verifier.comparison.total_bytes:
        dirty.sent(Extent(at, verifier.comparison.total_bytes - at))


def _add(extents: list[Extent], extent: Extent) -> None:
    if extents and extents[-1].end == extent.offset:
        extents[-1] = Extent(extents[-1].offset, extents[-1].length + extent.length)
    else:
        extents.append(extent)
