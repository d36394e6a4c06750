"""Copies what is dirty to the standby, in the same ordered stream as live writes.

Each piece is read and sent in one turn of the loop, or read in a thread and read again if a write touched it meanwhile;
so what arrives is always the newest content, and no lock is held against the clients. Holes travel as holes.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from stillpoint.buffers import uninitialised
from stillpoint.devices import BlockDevice
from stillpoint.extents import Extent, MappedExtent, split
from stillpoint.link.frames import RESYNC

from .dirty_map import CHUNK_SIZE, DirtyMap
from .mirrored_device import MirroredDevice
from .sender import Sender
from .throttle import Throttle

# A run of dirty chunks looked at in one go; a hole of this size is one frame.
_RUN_SIZE = 1 << 30
_PIECE_SIZE = 1 << 20
# Sent and not acknowledged, at most: a lot while no client waits, and just enough to keep moving while one does, since
# a client's write waits on the standby behind all of it.
_WINDOW_BYTES = 8 << 20
_WINDOW_BUSY_BYTES = 1 << 20
# The rate that status shows is that of the last ten seconds.
_RATE_SAMPLE_S = 0.5
_RATE_SAMPLES = 20


class Progress:
    """How far a resync is, for status."""

    def __init__(self, total_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self._clock = clock
        self._samples = deque([(clock(), 0)], maxlen=_RATE_SAMPLES)  # when, and how much was done by then

    def advance(self, size: int) -> None:
        """`size` bytes more are on their way."""
        self.done_bytes += size
        now = self._clock()
        if now - self._samples[-1][0] >= _RATE_SAMPLE_S:
            self._samples.append((now, self.done_bytes))

    @property
    def rate(self) -> int:
        """Bytes a second, of late."""
        since, done = self._samples[0]
        return int((self.done_bytes - done) / max(self._clock() - since, 1e-3))


async def resync(
    device: BlockDevice,
    dirty: DirtyMap,
    volume: MirroredDevice,
    sender: Sender,
    executor: Executor,
    progress: Progress,
    throttles: Sequence[Throttle] = (),
) -> None:
    """Until nothing is dirty. Raises PeerUnavailable when the link ends; what was not sent stays dirty.

    throttles: each of them limits what is read and sent; holes are free.
    """
    offset = 0
    while dirty.dirty_count:
        run = dirty.next_dirty(offset, limit=_RUN_SIZE)
        if run is None:
            offset = 0  # a range was made dirty again behind us
            continue
        for mapped in list(_pieces(device, run)):
            if not mapped.hole:
                for throttle in throttles:
                    await throttle.take(mapped.length)
            await sender.room(_WINDOW_BUSY_BYTES if volume.waiting_count else _WINDOW_BYTES)
            await _send(device, mapped, dirty, volume, sender, executor)
            progress.advance(mapped.length)
            await asyncio.sleep(0)
        offset = run.end


def _pieces(device: BlockDevice, run: Extent) -> list[MappedExtent]:
    """The run as whole-chunk pieces, each of holes only, or at most 1 MiB that may hold data."""
    pieces: list[MappedExtent] = []
    at = run.offset
    for mapped in device.extents(run.offset, run.length):
        if not mapped.hole:
            continue
        # Only whole chunks are holes to us: a chunk is clean or dirty as a whole.
        start = -(-mapped.offset // CHUNK_SIZE) * CHUNK_SIZE
        end = mapped.end if mapped.end == run.end else mapped.end // CHUNK_SIZE * CHUNK_SIZE
        if end <= start:
            continue
        pieces += _data_pieces(at, start)
        pieces.append(MappedExtent(start, end - start, hole=True))
        at = end
    return pieces + _data_pieces(at, run.end)


def _data_pieces(start: int, end: int) -> list[MappedExtent]:
    if start >= end:
        return []
    return [
        MappedExtent(piece.offset, piece.length, hole=False)
        for piece in split(Extent(start, end - start), limit=_PIECE_SIZE)
    ]


async def _send(
    device: BlockDevice,
    piece: MappedExtent,
    dirty: DirtyMap,
    volume: MirroredDevice,
    sender: Sender,
    executor: Executor,
) -> None:
    extent = Extent(piece.offset, piece.length)
    if piece.hole and _still_hole(device, extent):
        sender.zero(extent.offset, extent.length, may_trim=True, flags=RESYNC)
    elif piece.hole:
        for part in split(extent, limit=_PIECE_SIZE):  # written to since we looked
            await _send(device, MappedExtent(part.offset, part.length, hole=False), dirty, volume, sender, executor)
        return
    else:
        content = await read_settled(device, extent, volume, executor)
        sender.write(extent.offset, content, owned=True, flags=RESYNC)
    dirty.sent(extent)
    sender.push()


def _still_hole(device: BlockDevice, extent: Extent) -> bool:
    return all(mapped.hole for mapped in device.extents(extent.offset, extent.length))


async def read_settled(device: BlockDevice, extent: Extent, volume: MirroredDevice, executor: Executor) -> memoryview:
    """The newest content, as of the turn of the loop in which this returns."""
    content = uninitialised(extent.length)
    if device.try_read_into(extent.offset, content):
        return content
    loop = asyncio.get_running_loop()
    while True:
        with volume.watching(extent) as reading:
            await loop.run_in_executor(executor, device.read_into, extent.offset, content)
        if not reading.disturbed:
            return content
