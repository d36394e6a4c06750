"""Several devices, one after the other, as one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain

from ..errors import InvalidRequest
from ..extents import MappedExtent, check_range, coalesce
from .base import BlockDevice, Buffer


class ConcatDevice:
    """The devices end to end: byte 0 is the first's first, and the last one may grow. Closing it closes them all.

    A write across a border is one write on each side, so a crash may keep one and not the other, as between any two
    sectors of a disk.
    """

    def __init__(self, devices: Sequence[BlockDevice]) -> None:
        if not devices:
            raise InvalidRequest("a concatenation needs at least one device")
        self._devices = tuple(devices)
        self._starts = [0, *accumulate(device.size for device in devices[:-1])]

    @property
    def size(self) -> int:
        return self._starts[-1] + self._devices[-1].size

    @property
    def read_only(self) -> bool:
        return any(device.read_only for device in self._devices)

    @property
    def description(self) -> str:
        return " + ".join(device.description for device in self._devices)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, BlockDevice, int, int]]:
        """(index of the device, the device, offset in it, length) for each device the range touches."""
        index = bisect_right(self._starts, offset) - 1
        while length:
            device = self._devices[index]
            inner = offset - self._starts[index]
            piece = min(length, device.size - inner)
            if piece:
                yield index, device, inner, piece
            offset += piece
            length -= piece
            index += 1

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        check_range(offset=offset, length=len(buffer), size=self.size)
        position = 0
        for _, device, inner, length in self._pieces(offset, len(buffer)):
            if not device.try_read_into(inner, buffer[position : position + length]):
                return False
            position += length
        return True

    def read_into(self, offset: int, buffer: memoryview) -> None:
        check_range(offset=offset, length=len(buffer), size=self.size)
        position = 0
        for _, device, inner, length in self._pieces(offset, len(buffer)):
            device.read_into(inner, buffer[position : position + length])
            position += length

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        length = sum(map(len, buffers))
        check_range(offset=offset, length=length, size=self.size)
        rest = [memoryview(buffer) for buffer in buffers]
        for _, device, inner, piece in self._pieces(offset, length):
            device.write(inner, _take(rest, piece))

    def trim(self, offset: int, length: int) -> None:
        check_range(offset=offset, length=length, size=self.size)
        for _, device, inner, piece in self._pieces(offset, length):
            device.trim(inner, piece)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        check_range(offset=offset, length=length, size=self.size)
        for _, device, inner, piece in self._pieces(offset, length):
            device.write_zeroes(inner, piece, may_trim=may_trim)

    def flush(self) -> None:
        # One that fails ends it: that one fails every later flush too, so nothing is ever called durable by mistake.
        for device in self._devices:
            device.flush()

    def extents(self, offset: int, length: int) -> Iterator[MappedExtent]:
        check_range(offset=offset, length=length, size=self.size)
        return coalesce(
            chain.from_iterable(
                self._shifted(index, device.extents(inner, piece))
                for index, device, inner, piece in self._pieces(offset, length)
            )
        )

    def _shifted(self, index: int, extents: Iterator[MappedExtent]) -> Iterator[MappedExtent]:
        start = self._starts[index]
        return (MappedExtent(start + extent.offset, extent.length, extent.hole) for extent in extents)

    def resize(self, size: int) -> None:
        self._devices[-1].resize(size - self._starts[-1])

    def close(self) -> None:
        for device in self._devices:
            device.close()


def _take(rest: list[memoryview], length: int) -> list[memoryview]:
    """Remove `length` bytes from the front of `rest` and return them, without copying."""
    taken = []
    while length:
        first = rest[0]
        if len(first) <= length:
            taken.append(rest.pop(0))
        else:
            taken.append(first[:length])
            rest[0] = first[length:]
        length -= len(taken[-1])
    return taken
