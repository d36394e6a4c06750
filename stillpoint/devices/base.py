"""The promise every block device keeps, whatever lies under it.

A device is an array of `size` bytes, addressed at any byte. Its calls are plain synchronous calls: the loop makes the
ones that finish from memory, and hands the ones that may wait for a disk (`read_into` after `try_read_into` said no,
and every `flush`) to a thread. So `read_into`, `try_read_into` and `flush` may run in several threads at once.

Every implementation passes `tests/conformance/test_devices.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias

from ..extents import MappedExtent

Buffer: TypeAlias = bytes | bytearray | memoryview


class BlockDevice(Protocol):
    """An array of bytes that can be read, written and flushed.

    Errors: OutOfRange when the range leaves the device (nothing was done); DeviceError with the errno when the
    system refuses. After a failed write the bytes of that range are undefined; after a failed flush nothing written
    since the last good flush is known to be durable, and every later flush fails too (an I/O error is never retried
    into success).
    """

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def read_only(self) -> bool: ...

    @property
    def description(self) -> str:
        """What an operator calls it: its path or paths."""
        ...

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` if that needs no wait for a disk. False: `buffer` holds anything; use `read_into`."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the writable `buffer` with the bytes at `offset`. May wait for a disk."""
        ...

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write the buffers one after the other from `offset` on. Visible to reads on return, durable at `flush`."""
        ...

    def trim(self, offset: int, length: int) -> None:
        """Give the range back. It reads as zeroes afterwards, on every kind of device."""
        ...

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        """Make the range read as zeroes. With `may_trim=False` its space stays allocated where the device can do so."""
        ...

    def flush(self) -> None:
        """Make every write, trim and zeroing that returned before this call durable. Waits for the disk."""
        ...

    def extents(self, offset: int, length: int) -> Iterator[MappedExtent]:
        """The range as data and holes, in order and without gaps. A device that cannot tell says data."""
        ...

    def resize(self, size: int) -> None:
        """Grow to `size` bytes; new bytes read as zeroes. Raises Refused where the device has a fixed size."""
        ...

    def close(self) -> None:
        """Release it. Flushes nothing. A second call does nothing."""
        ...
