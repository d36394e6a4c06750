"""An image on a pipe: its bytes in order, or an archive of it (`stillpoint.archive`)."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, Final

from ..archive import ArchiveWriter
from ..devices import Buffer
from ..errors import InvalidRequest
from ..extents import Extent, split
from .threads import device_error, in_thread

_ZEROES: Final = bytes(1 << 20)


class StreamTarget:
    """Takes every byte, in order. It cannot be taken back: whoever reads it heeds our exit code, or uses an archive."""

    starts_as_zeroes = False

    def __init__(self, output: BinaryIO) -> None:
        self.description = "the output"
        self.written_bytes = 0
        self._output = output
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="target")

    async def read(self, offset: int, length: int) -> Buffer:
        raise InvalidRequest("what was written to a stream cannot be read back")

    async def flush(self) -> None:
        await self._call(self._output.flush)

    async def write(self, offset: int, data: Buffer) -> None:
        await self._call(lambda: self._output.write(data))
        self.written_bytes += len(memoryview(data))

    async def zeroes(self, offset: int, length: int) -> None:
        for extent in split(Extent(offset, length), limit=len(_ZEROES)):
            await self._call(lambda extent=extent: self._output.write(_ZEROES[: extent.length]))

    async def finish(self) -> None:
        await self.flush()
        self._thread.shutdown(wait=False)

    async def abort(self) -> None:
        self._thread.shutdown(wait=False)

    async def _call(self, call: Any) -> None:
        try:
            await in_thread(self._thread, call)
        except OSError as error:
            raise device_error(f"{self.description}: writing to it failed", error) from error


class ArchiveTarget(StreamTarget):
    """Holes take no room, and an archive that ends early is told from a whole one."""

    def __init__(self, output: BinaryIO, description: Mapping[str, Any], *, size: int) -> None:
        """description: of the image, for whoever reads the archive."""
        super().__init__(output)
        self._writer = ArchiveWriter(description, size=size)
        self._begun = False

    async def write(self, offset: int, data: Buffer) -> None:
        await self._put(lambda: self._writer.data(offset, data))
        self.written_bytes += len(memoryview(data))

    async def zeroes(self, offset: int, length: int) -> None:
        await self._put(lambda: self._writer.zeroes(offset, length))

    async def finish(self) -> None:
        await self._put(self._writer.end)
        await super().finish()

    async def _put(self, make: Any) -> None:
        if not self._begun:
            self._begun = True
            await self._call(lambda: self._output.write(self._writer.begin()))
        await self._call(lambda: self._output.write(make()))
