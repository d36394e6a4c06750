"""An NBD export as the disk that an image is written to (`target.Disk`)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any, Final, Self

from ..devices import Buffer
from ..errors import PermissionRefused
from ..extents import Extent, split
from ..nbd.client import NbdClient
from ..nbd.constants import ExportFlag

# Requests under way; what one of them brings home late is raised by a later call, at the latest by `flush`.
_REQUESTS_MAX: Final = 8
_ZEROES: Final = bytes(1 << 20)


class NbdDisk:
    """Writes behind: `write` and `zeroes` return before the server has answered. `flush` waits for everything."""

    def __init__(self, client: NbdClient) -> None:
        self._client = client
        self._can_zero = client.export.can(ExportFlag.SEND_WRITE_ZEROES)
        self._under_way: deque[asyncio.Task[None]] = deque()

    @classmethod
    async def connect(cls, uri: str) -> Self:
        """Raises what NbdClient.connect raises, and PermissionRefused for a read-only export."""
        client = await NbdClient.connect(uri)
        if client.read_only:
            await client.close()
            raise PermissionRefused(f"{uri}: is read-only")
        return cls(client)

    @property
    def description(self) -> str:
        return self._client.description

    @property
    def size(self) -> int:
        return self._client.size

    async def read(self, offset: int, length: int) -> Buffer:
        return await self._client.read(offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        await self._start(self._client.write(offset, data))

    async def zeroes(self, offset: int, length: int) -> None:
        if self._can_zero:
            await self._start(self._client.write_zeroes(offset, length))
            return
        for extent in split(Extent(offset, length), limit=len(_ZEROES)):
            await self.write(extent.offset, memoryview(_ZEROES)[: extent.length])

    async def flush(self) -> None:
        while self._under_way:
            await self._await_oldest()
        await self._client.flush()

    async def close(self) -> None:
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        await self._client.close()

    async def _start(self, request: Coroutine[Any, Any, None]) -> None:
        self._under_way.append(asyncio.create_task(request))
        while len(self._under_way) > _REQUESTS_MAX or self._under_way[0].done():
            await self._await_oldest()
            if not self._under_way:
                return

    async def _await_oldest(self) -> None:
        await self._under_way[0]
        self._under_way.popleft()
