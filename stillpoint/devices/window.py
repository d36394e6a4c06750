"""A range of a device as a device of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..errors import Refused
from ..extents import MappedExtent, check_range
from .base import BlockDevice, Buffer


class WindowDevice:
    """`length` bytes of `device` from `start` on. It owns `device`, and closes it, unless `keep_open`."""

    def __init__(self, device: BlockDevice, *, start: int, length: int, keep_open: bool = False) -> None:
        check_range(offset=start, length=length, size=device.size)
        self._device = device
        self._start = start
        self._size = length
        self._keep_open = keep_open

    @property
    def size(self) -> int:
        return self._size

    @property
    def read_only(self) -> bool:
        return self._device.read_only

    @property
    def description(self) -> str:
        return f"{self._device.description}[{self._start}+{self._size}]"

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        check_range(offset=offset, length=len(buffer), size=self._size)
        return self._device.try_read_into(self._start + offset, buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        check_range(offset=offset, length=len(buffer), size=self._size)
        self._device.read_into(self._start + offset, buffer)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        check_range(offset=offset, length=sum(map(len, buffers)), size=self._size)
        self._device.write(self._start + offset, buffers)

    def trim(self, offset: int, length: int) -> None:
        check_range(offset=offset, length=length, size=self._size)
        self._device.trim(self._start + offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        check_range(offset=offset, length=length, size=self._size)
        self._device.write_zeroes(self._start + offset, length, may_trim=may_trim)

    def flush(self) -> None:
        self._device.flush()

    def extents(self, offset: int, length: int) -> Iterator[MappedExtent]:
        check_range(offset=offset, length=length, size=self._size)
        inner = self._device.extents(self._start + offset, length)
        return (MappedExtent(extent.offset - self._start, extent.length, extent.hole) for extent in inner)

    def resize(self, size: int) -> None:
        """Show more of the device, growing it where it must; what is newly shown is zeroed first.

        Refused when the window does not own its device: the bytes behind it may belong to a neighbour.
        """
        if size < self._size:
            raise Refused(f"{self.description}: cannot shrink from {self._size} to {size} bytes")
        if self._keep_open:
            raise Refused(f"{self.description}: is part of a shared device and cannot grow")
        hidden = self._device.size - self._start - self._size
        if size - self._size > hidden:
            self._device.resize(self._start + size)
        self._device.write_zeroes(self._start + self._size, min(hidden, size - self._size))
        self._size = size

    def close(self) -> None:
        if not self._keep_open:
            self._device.close()
