"""An image on a block device or NBD export that exists already."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

from ..config import format_size
from ..devices import Buffer, FileDevice
from ..errors import DataCorrupt, Refused
from ..extents import Extent, split
from .differences import all_zero
from .threads import in_thread

# Held back until the rest is durable.
_HEAD_SIZE: Final = 1 << 20
# Zeroed by one call, so that a cancelled restore does not wait for a whole disk.
_ZEROES_MAX: Final = 256 << 20
# How a disk is looked at: its first and last MiB, and so many samples between.
_SAMPLE_COUNT: Final = 64
_SAMPLE_SIZE: Final = 64 << 10


class Disk(Protocol):
    """What DiskTarget needs of a device or export. Ranges lie within `size`; errors are StillpointErrors."""

    @property
    def description(self) -> str: ...

    @property
    def size(self) -> int: ...

    async def read(self, offset: int, length: int) -> Buffer: ...

    async def write(self, offset: int, data: Buffer) -> None: ...

    async def zeroes(self, offset: int, length: int) -> None: ...

    async def flush(self) -> None: ...

    async def close(self) -> None:
        """Raises nothing."""
        ...


class DiskTarget:
    """A device or export that exists already and may be larger than the image; what lies beyond is left alone.

    Whether it is empty is judged by its first and last MiB and 64 samples between them, so one that passes may still
    hold data elsewhere.
    """

    starts_as_zeroes = False

    def __init__(self, disk: Disk, size: int) -> None:
        self._disk = disk
        self.written_bytes = 0
        self._head = bytearray(min(size, _HEAD_SIZE))

    @classmethod
    async def open(cls, disk: Disk, *, size: int, force: bool) -> DiskTarget:
        """Takes `disk` over, and closes it when it is refused."""
        try:
            if disk.size < size:
                raise Refused(
                    f"{disk.description}: holds {format_size(disk.size)}, too small for an image of {format_size(size)}"
                    f" ({disk.size} < {size} bytes)"
                )
            if not force:
                await _check_empty(disk)
            target = cls(disk, size)
            await disk.zeroes(0, len(target._head))
            await disk.flush()
        except BaseException:
            await disk.close()
            raise
        return target

    @property
    def description(self) -> str:
        return self._disk.description

    async def read(self, offset: int, length: int) -> Buffer:
        in_head = max(0, min(length, len(self._head) - offset))
        if not in_head:
            return await self._disk.read(offset, length)
        rest = await self._disk.read(offset + in_head, length - in_head) if in_head < length else b""
        return bytes(self._head[offset : offset + in_head]) + bytes(rest)

    async def flush(self) -> None:
        await self._disk.flush()

    async def write(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        self.written_bytes += len(view)
        in_head = max(0, min(len(view), len(self._head) - offset))
        self._head[offset : offset + in_head] = view[:in_head]
        if in_head < len(view):
            await self._disk.write(offset + in_head, view[in_head:])

    async def zeroes(self, offset: int, length: int) -> None:
        in_head = max(0, min(length, len(self._head) - offset))
        self._head[offset : offset + in_head] = bytes(in_head)
        for extent in split(Extent(offset + in_head, length - in_head), limit=_ZEROES_MAX):
            await self._disk.zeroes(extent.offset, extent.length)

    async def finish(self) -> None:
        await self._disk.flush()
        if any(self._head):
            await self._disk.write(0, self._head)
            await self._disk.flush()
            if memoryview(await self._disk.read(0, len(self._head))) != memoryview(self._head):
                raise DataCorrupt(f"{self.description}: the first MiB does not read back as it was written")
        await self._disk.close()

    async def abort(self) -> None:
        await self._disk.close()


class FileDisk:
    """A block device as a Disk; `thread` makes all its calls, one after the other, so that closing comes last."""

    def __init__(self, device: FileDevice, thread: ThreadPoolExecutor) -> None:
        self._device = device
        self._thread = thread

    @property
    def description(self) -> str:
        return self._device.description

    @property
    def size(self) -> int:
        return self._device.size

    async def read(self, offset: int, length: int) -> Buffer:
        buffer = bytearray(length)
        await in_thread(self._thread, lambda: self._device.read_into(offset, memoryview(buffer)))
        return buffer

    async def write(self, offset: int, data: Buffer) -> None:
        await in_thread(self._thread, lambda: self._device.write(offset, [data]))

    async def zeroes(self, offset: int, length: int) -> None:
        await in_thread(self._thread, lambda: self._device.write_zeroes(offset, length))

    async def flush(self) -> None:
        await in_thread(self._thread, self._device.flush)

    async def close(self) -> None:
        try:
            await asyncio.shield(in_thread(self._thread, self._device.close))
        finally:
            self._thread.shutdown(wait=False)


async def _check_empty(disk: Disk) -> None:
    for extent in _samples(disk.size):
        if not all_zero(await disk.read(extent.offset, extent.length)):
            raise Refused(f"{disk.description}: is not empty; use --force to overwrite it")


def _samples(size: int) -> Iterator[Extent]:
    if size <= 2 * _HEAD_SIZE + _SAMPLE_COUNT * _SAMPLE_SIZE:
        yield from split(Extent(0, size), limit=_HEAD_SIZE)
        return
    yield Extent(0, _HEAD_SIZE)
    yield Extent(size - _HEAD_SIZE, _HEAD_SIZE)
    for index in range(1, _SAMPLE_COUNT + 1):
        yield Extent(size * index // (_SAMPLE_COUNT + 1) // _SAMPLE_SIZE * _SAMPLE_SIZE, _SAMPLE_SIZE)
