"""A target that holds an older state of the image already: only what differs is written."""

from __future__ import annotations

from typing import Final

from ..devices import Buffer
from ..extents import Extent, split
from .interface import Target

# What is compared, and written, as a whole.
_BLOCK_SIZE: Final = 64 << 10
# Read at once where zeroes are due.
_READ_SIZE: Final = 1 << 20
_ZEROES: Final = memoryview(bytes(_READ_SIZE))


class DifferencesTarget:
    """Reads before it writes. `written_bytes` tells how much differed."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.starts_as_zeroes = target.starts_as_zeroes

    @property
    def description(self) -> str:
        return self._target.description

    @property
    def written_bytes(self) -> int:
        return self._target.written_bytes

    async def read(self, offset: int, length: int) -> Buffer:
        return await self._target.read(offset, length)

    async def flush(self) -> None:
        await self._target.flush()

    async def write(self, offset: int, data: Buffer) -> None:
        wanted = memoryview(data)
        there = memoryview(await self._target.read(offset, len(wanted)))
        if there == wanted:
            return
        for start, end in differing(there, wanted):
            await self._target.write(offset + start, wanted[start:end])

    async def zeroes(self, offset: int, length: int) -> None:
        if self.starts_as_zeroes:
            await self._target.zeroes(offset, length)
            return
        for extent in split(Extent(offset, length), limit=_READ_SIZE):
            if not all_zero(await self._target.read(extent.offset, extent.length)):
                await self._target.zeroes(extent.offset, extent.length)

    async def finish(self) -> None:
        await self._target.finish()

    async def abort(self) -> None:
        await self._target.abort()


def differing(one: memoryview, other: memoryview) -> list[tuple[int, int]]:
    """Where two of the same length differ, in blocks; neighbours in one."""
    runs: list[tuple[int, int]] = []
    for start in range(0, len(one), _BLOCK_SIZE):
        end = min(start + _BLOCK_SIZE, len(one))
        if one[start:end] != other[start:end]:
            runs.append((runs.pop()[0] if runs and runs[-1][1] == start else start, end))
    return runs


def all_zero(data: Buffer) -> bool:
    """Of at most a MiB."""
    view = memoryview(data)
    return view == _ZEROES[: len(view)]
