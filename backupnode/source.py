"""One snapshot of the standby, read in order: all of it as one stream, or some extents of it, many at once.

What arrives is gapless over what was asked for and matches its checksums, or it is asked for again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from stillpoint.errors import InvalidRequest, PeerUnavailable, ProtocolError, Refused, StillpointError
from stillpoint.extents import Extent
from stillpoint.wire.chunks import DecodedChunk

from .progress import Progress, Report
from .repository import BackupWriter
from .standby_client import DamagedInTransit, SnapshotDescription, SnapshotName, StandbyClient
from .throttle import Pace, Throttle

logger = logging.getLogger(__name__)

# Extents up to this, together, are fetched as a whole by one call, ahead of their turn; a larger one is streamed.
_FETCH_BYTES_MAX: Final = 2 << 20
# As many at most, so that several calls share the work of small ones too.
_FETCH_COUNT_MAX: Final = 16
# Calls whose bytes are there, or on their way, ahead of their turn.
_FETCHES: Final = 12


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a broken stream is taken up again.

    attempts: in a row without a byte gained, after delays that double from `first_delay_s` to `delay_s_max`.
    interruptions_max: of one backup in all.
    """

    attempts: int = 8
    first_delay_s: float = 0.2
    delay_s_max: float = 5.0
    interruptions_max: int = 100

    def delay_s(self, attempt: int) -> float:
        return min(self.delay_s_max, self.first_delay_s * 2.0**attempt)


class Source:
    """`describe` comes first. `received_bytes`: of data, so far."""

    def __init__(
        self,
        standby: StandbyClient,
        snapshot: SnapshotName,
        retry: RetryPolicy,
        *,
        rate_bytes_s: int = 0,
        throttle: Throttle | None = None,
    ) -> None:
        """rate_bytes_s: of this one; 0: no limit. throttle: of all that read from this standby."""
        self.snapshot = snapshot
        self.received_bytes = 0
        self._standby = standby
        self._retry = retry
        self._pace = Pace(rate_bytes_s)
        self._throttle = throttle or Throttle()
        self._description: SnapshotDescription | None = None
        self._interruptions = 0
        self._checkpoint_s = math.inf
        self._noted_s = 0.0

    async def describe(self) -> SnapshotDescription:
        """Raises NotFound, or PeerUnavailable when the export process stays away."""
        attempt = 0
        while True:
            try:
                description = await self._standby.describe_snapshot(self.snapshot)
                break
            except PeerUnavailable:
                attempt += 1
                if attempt >= self._retry.attempts:
                    raise
                await asyncio.sleep(self._retry.delay_s(attempt - 1))
        if description.size <= 0:
            raise InvalidRequest(f"snapshot {self.snapshot} has no bytes")
        self._description = description
        return description

    async def changed_since(self, incarnation: str, generation: int) -> Sequence[Extent] | None:
        """In order, joined. None when the standby cannot tell. Raises ProtocolError for extents that make no sense."""
        try:
            extents = await self._standby.changed_extents(self.snapshot, incarnation=incarnation, generation=generation)
        except StillpointError as error:
            # Of an older release, or in trouble that reading will show.
            logger.warning("the standby cannot tell what changed: %s", error)
            return None
        if extents is None:
            return None
        end = 0
        for extent in extents:
            if extent.offset < end or extent.length <= 0 or extent.end > self._size:
                raise ProtocolError(f"the standby named changes of {self.snapshot} that are out of order or range")
            end = extent.end
        return joined(extents)

    async def read(self, extent: Extent) -> bytes:
        """A small extent as a whole."""
        data = bytearray(extent.length)
        for chunk in await self._fetch([extent]):
            start = chunk.offset - extent.offset
            data[start : start + len(chunk.data)] = chunk.data
        return bytes(data)

    async def copy(
        self,
        writer: BackupWriter,
        report: Report,
        *,
        only: Sequence[Extent] | None = None,
        checkpoint_s: float = math.inf,
    ) -> None:
        """Give the writer all of the snapshot, or these extents, in order, and the rest as unchanged.

        checkpoint_s: how often it notes what it was given.
        """
        wanted = [Extent(0, self._size)] if only is None else only
        self._checkpoint_s, self._noted_s = checkpoint_s, time.monotonic()
        async with aclosing(self._in_turn(wanted)) as fetched:
            async for extent, chunks in fetched:
                if chunks is None:
                    if extent.offset > writer.position:
                        await writer.unchanged(extent.offset - writer.position)
                    await self._stream(writer, extent.end, report)
                else:
                    await self._give(writer, chunks)
                    await self._checkpoint(writer)
                report(Progress("read", writer.position, self._size, self.received_bytes))
        if self._size > writer.position:
            await writer.unchanged(self._size - writer.position)
        report(Progress("read", writer.position, self._size, self.received_bytes))

    @property
    def _size(self) -> int:
        assert self._description is not None
        return self._description.size

    async def _in_turn(
        self, wanted: Iterable[Extent]
    ) -> AsyncGenerator[tuple[Extent, Sequence[DecodedChunk] | None], None]:
        """The bytes of some extents, in order, with the first of them; or an extent without bytes, to be streamed."""
        ahead: deque[tuple[Extent, asyncio.Task[Sequence[DecodedChunk]] | None]] = deque()
        calls = batches(wanted)
        try:
            while True:
                while len(ahead) < _FETCHES and (call := next(calls, None)) is not None:
                    small = call[0].length <= _FETCH_BYTES_MAX
                    ahead.append((call[0], asyncio.create_task(self._fetch(call)) if small else None))
                if not ahead:
                    return
                extent, task = ahead[0]
                chunks = await task if task is not None else None
                ahead.popleft()
                yield extent, chunks
        finally:
            tasks = [task for _, task in ahead if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch(self, extents: Sequence[Extent]) -> Sequence[DecodedChunk]:
        attempt = 0
        while True:
            try:
                if attempt:
                    await self._check_it_is_the_same()
                return [chunk async for chunk in self._messages(extents)]
            except (PeerUnavailable, DamagedInTransit) as error:
                attempt += 1
                self._interrupted(error, attempt, extents[0].offset)
            await asyncio.sleep(self._retry.delay_s(attempt - 1))

    async def _stream(self, writer: BackupWriter, end: int, report: Report) -> None:
        attempt = 0
        while True:
            start = writer.position
            try:
                if self._interruptions:
                    await self._check_it_is_the_same()
                async with aclosing(self._messages([Extent(start, end - start)])) as messages:
                    async for chunk in messages:
                        await self._give(writer, [chunk])
                        await self._checkpoint(writer)
                        report(Progress("read", writer.position, self._size, self.received_bytes))
                return
            except (PeerUnavailable, DamagedInTransit) as error:
                attempt = 1 if writer.position > start else attempt + 1
                self._interrupted(error, attempt, writer.position)
            await asyncio.sleep(self._retry.delay_s(attempt - 1))

    async def _give(self, writer: BackupWriter, chunks: Sequence[DecodedChunk]) -> None:
        for chunk in chunks:
            if chunk.offset > writer.position:
                await writer.unchanged(chunk.offset - writer.position)
            if chunk.hole_length:
                await writer.hole(chunk.hole_length)
            else:
                await writer.write(chunk.data)

    async def _checkpoint(self, writer: BackupWriter) -> None:
        if time.monotonic() - self._noted_s >= self._checkpoint_s:
            await writer.checkpoint()
            self._noted_s = time.monotonic()

    async def _messages(self, extents: Sequence[Extent]) -> AsyncGenerator[DecodedChunk, None]:
        """Gapless over the extents. Raises PeerUnavailable when the stream ends early."""
        left = deque(extents)
        position = left[0].offset
        async with aclosing(self._standby.read_snapshot(self.snapshot, extents)) as messages:
            async for chunk in messages:
                if not left or chunk.offset != position or not 0 < chunk.length <= left[0].end - position:
                    raise ProtocolError(
                        f"the standby sent bytes {chunk.offset}+{chunk.length} of {self.snapshot}"
                        f" ({self._size} bytes) where {position} is due"
                    )
                position += chunk.length
                if position == left[0].end:
                    left.popleft()
                    position = left[0].offset if left else position
                self.received_bytes += len(chunk.data)
                await self._wait_for_turn(len(chunk.data))
                yield chunk
        if left:
            raise PeerUnavailable(f"the standby ended the stream at byte {position} of {extents[-1].end}")

    async def _wait_for_turn(self, size: int) -> None:
        early_s = self._pace.take(size)
        if early_s > 0.01:
            await asyncio.sleep(early_s)
        await self._throttle.taken(size)

    def _interrupted(self, error: StillpointError, attempt: int, offset: int) -> None:
        """Raises it, with what was being done, when that was once too often."""
        self._interruptions += 1
        if attempt >= self._retry.attempts or self._interruptions >= self._retry.interruptions_max:
            raise type(error)(
                f"backup of {self.snapshot} given up at byte {offset} after {self._interruptions}"
                f" interruptions: {error}"
            ) from None
        logger.warning(
            "the stream broke; taking it up again",
            extra={"snapshot": str(self.snapshot), "offset": offset, "reason": str(error)},
        )

    async def _check_it_is_the_same(self) -> None:
        description = await self._standby.describe_snapshot(self.snapshot)
        if description != self._description:
            raise Refused(f"snapshot {self.snapshot} was replaced by another while it was backed up; start again")


def batches(extents: Iterable[Extent]) -> Iterator[list[Extent]]:
    """What one call fetches: one large extent, or a few that are small together."""
    batch: list[Extent] = []
    size = 0
    for extent in extents:
        if batch and (size + extent.length > _FETCH_BYTES_MAX or len(batch) == _FETCH_COUNT_MAX):
            yield batch
            batch, size = [], 0
        batch.append(extent)
        size += extent.length
    if batch:
        yield batch


def joined(extents: Iterable[Extent]) -> list[Extent]:
    """The same bytes in order, each once, neighbours in one extent."""
    result: list[Extent] = []
    for extent in sorted(extents):
        if result and extent.offset <= result[-1].end:
            last = result.pop()
            extent = Extent(last.offset, max(last.end, extent.end) - last.offset)
        result.append(extent)
    return result


def without(whole: Extent, extents: Sequence[Extent]) -> list[Extent]:
    """What of `whole` lies in none of the extents, which are in order and joined."""
    return list(_gaps(whole, extents))


def _gaps(whole: Extent, extents: Sequence[Extent]) -> Iterator[Extent]:
    position = whole.offset
    for extent in extents:
        if extent.offset > position:
            yield Extent(position, extent.offset - position)
        position = max(position, extent.end)
    if whole.end > position:
        yield Extent(position, whole.end - position)
