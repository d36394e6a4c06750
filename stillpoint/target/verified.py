"""A target that is read back before it counts as complete.

A digest of each piece is kept meanwhile: 100 bytes or so for each MiB of data.
"""

from __future__ import annotations

from typing import Final

from blake3 import blake3

from ..devices import Buffer
from ..errors import DataCorrupt
from ..extents import Extent, split
from .differences import all_zero
from .interface import Target

_READ_SIZE: Final = 1 << 20


class VerifiedTarget:
    def __init__(self, target: Target) -> None:
        self._target = target
        self.starts_as_zeroes = target.starts_as_zeroes
        self._written: list[tuple[int, int, bytes]] = []
        self._zeroes: list[Extent] = []

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
        self._written.append((offset, len(memoryview(data)), blake3(data).digest()))
        await self._target.write(offset, data)

    async def zeroes(self, offset: int, length: int) -> None:
        if not self.starts_as_zeroes:
            self._zeroes.append(Extent(offset, length))
        await self._target.zeroes(offset, length)

    async def finish(self) -> None:
        """Raises DataCorrupt too, when something else is read than was written."""
        await self._target.flush()
        for offset, length, digest in self._written:
            if blake3(await self._target.read(offset, length)).digest() != digest:
                raise self._differs(offset, length)
        for zeroes in self._zeroes:
            for extent in split(zeroes, limit=_READ_SIZE):
                if not all_zero(await self._target.read(extent.offset, extent.length)):
                    raise self._differs(extent.offset, extent.length)
        await self._target.finish()

    async def abort(self) -> None:
        await self._target.abort()

    def _differs(self, offset: int, length: int) -> DataCorrupt:
        return DataCorrupt(f"{self.description}: bytes {offset}+{length} do not read back as they were written")
