"""Does not trust what the standby says of changes: compares a sample of what it calls unchanged with the repository."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Final

from stillpoint.errors import DataCorrupt
from stillpoint.extents import Extent

from .repository import BackupReader
from .source import Source, without

# Compared in each run, each of so many bytes: small beside the changes of most runs, and it adds up over the runs.
_SAMPLE_COUNT: Final = 16
_SAMPLE_BYTES: Final = 64 << 10


class AuditMiss(DataCorrupt):
    """Bytes that were called unchanged are others than in the base."""


async def audit(source: Source, base: BackupReader, changed: Sequence[Extent], *, seed: int | None = None) -> None:
    """changed: in order, joined. Raises AuditMiss, DataCorrupt when the base is damaged, and what reading raises."""
    for place in _places(without(Extent(0, base.record.origin.size), changed), random.Random(seed)):
        now = await source.read(place)
        then = await asyncio.to_thread(_read, base, place)
        if now != then:
            raise AuditMiss(
                f"bytes {place.offset}+{place.length} of {source.snapshot} differ from backup {base.record.id}, though"
                f" they were called unchanged"
            )


def _places(unchanged: Sequence[Extent], source: random.Random) -> list[Extent]:
    """Spread evenly over the bytes; the whole of it when that is no more."""
    total = sum(extent.length for extent in unchanged)
    if not total:
        return []
    starts = sorted(source.randrange(total) for _ in range(_SAMPLE_COUNT))
    places: list[Extent] = []
    before = 0
    for extent in unchanged:
        while starts and starts[0] < before + extent.length:
            offset = (extent.offset + starts.pop(0) - before) // _SAMPLE_BYTES * _SAMPLE_BYTES
            start = max(extent.offset, offset)
            places.append(Extent(start, min(extent.end, offset + _SAMPLE_BYTES) - start))
        before += extent.length
    return places


def _read(reader: BackupReader, place: Extent) -> bytes:
    parts = []
    size = reader.chunk_size
    for index in range(place.offset // size, -(-place.end // size)):
        start, end = max(place.offset, index * size), min(place.end, (index + 1) * size)
        chunk = reader.read_chunk(index)
        parts.append(bytes(end - start) if chunk is None else chunk[start - index * size : end - index * size])
    return b"".join(parts)
