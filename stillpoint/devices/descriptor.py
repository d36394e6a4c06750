"""Block I/O on an open file descriptor: what a file, a disk and a piece of memory have in common.

Invariants:
- The descriptor's position is never used: every read and write names its offset, so threads may share it.
- A flush that failed stays failed. The kernel reports a lost write-back once and calls the pages clean afterwards,
  so asking again would answer "durable" about bytes that are gone.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Final

from ..errors import DeviceError, PermissionRefused, Refused
from ..extents import MappedExtent, check_range
from . import linux
from .base import Buffer

_IOV_MAX: Final = 1024
_ZEROES: Final = memoryview(bytes(1 << 20))


class DescriptorDevice:
    """A BlockDevice on `descriptor`, which it owns.

    alignment: trims and zeroings are handed to the system in multiples of it, and the rest is written as zeroes.
    """

    def __init__(
        self, descriptor: int, *, size: int, description: str, read_only: bool = False, alignment: int = 1
    ) -> None:
        self._descriptor = descriptor
        self._size = size
        self._description = description
        self._read_only = read_only
        self._alignment = alignment
        self._can_ask_for_cached_only = True
        self._is_memory = False
        self._flush_lock = threading.Lock()
        self._flush_count = 0
        self._failed_flush: DeviceError | None = None

    @property
    def size(self) -> int:
        return self._size

    @property
    def read_only(self) -> bool:
        return self._read_only

    @property
    def description(self) -> str:
        return self._description

    def fileno(self) -> int:
        """The descriptor, still owned by the device; -1 once closed."""
        return self._descriptor

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        length = len(buffer)
        if offset < 0 or length > self._size - offset:
            check_range(offset=offset, length=length, size=self._size)
        if self._can_ask_for_cached_only:
            try:
                return os.preadv(self._descriptor, (buffer,), offset, os.RWF_NOWAIT) == length
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno == errno.EIO:
                    return False  # the slower way finds out, and its caller may know where else to read
                if error.errno not in linux.UNSUPPORTED:
                    raise self._error("read", offset, length, error) from error
                self._can_ask_for_cached_only = False
                # tmpfs knows no RWF_NOWAIT, and needs none.
                self._is_memory = linux.is_tmpfs(self._descriptor)
        if not self._is_memory:
            return False
        try:
            return os.preadv(self._descriptor, (buffer,), offset) == length
        except OSError as error:
            raise self._error("read", offset, length, error) from error

    def read_into(self, offset: int, buffer: memoryview) -> None:
        length = len(buffer)
        check_range(offset=offset, length=length, size=self._size)
        done = 0
        while done < length:
            try:
                count = os.preadv(self._descriptor, (buffer[done:],), offset + done)
            except OSError as error:
                raise self._error("read", offset, length, error) from error
            if count == 0:
                raise DeviceError(f"{self._description}: ends before byte {offset + length}; was it cut?", errno.EIO)
            done += count

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        single = len(buffers) == 1
        length = len(buffers[0]) if single else sum(map(len, buffers))
        if self._read_only or offset < 0 or length > self._size - offset:
            self._check_writable(offset, length)
        if not length:
            return
        try:
            if single:  # the hot path, and the cheaper call
                done = os.pwrite(self._descriptor, buffers[0], offset)
            else:
                done = os.pwritev(self._descriptor, buffers[:_IOV_MAX], offset)
            if done < length:
                self._write_rest(offset, buffers, done=done)
        except OSError as error:
            raise self._error("write", offset, length, error) from error

    def _write_rest(self, offset: int, buffers: Sequence[Buffer], *, done: int) -> None:
        rest = [memoryview(buffer) for buffer in buffers]
        count = done
        while True:
            offset += count
            while rest and count >= len(rest[0]):
                count -= len(rest.pop(0))
            if not rest:
                return
            rest[0] = rest[0][count:]
            count = os.pwritev(self._descriptor, rest[:_IOV_MAX], offset)
            if count == 0:
                raise OSError(errno.EIO, "the system wrote nothing")

    def trim(self, offset: int, length: int) -> None:
        self._clear(offset, length, (linux.PUNCH_HOLE | linux.KEEP_SIZE,))

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        in_place = linux.ZERO_RANGE | linux.KEEP_SIZE
        punch = linux.PUNCH_HOLE | linux.KEEP_SIZE
        self._clear(offset, length, (punch, in_place) if may_trim else (in_place,))

    def _clear(self, offset: int, length: int, modes: tuple[int, ...]) -> None:
        self._check_writable(offset, length)
        end = offset + length
        inner_start = -(-offset // self._alignment) * self._alignment
        inner_end = end // self._alignment * self._alignment
        try:
            if inner_start >= inner_end:
                self._write_zeroes_plainly(offset, end)
                return
            self._write_zeroes_plainly(offset, inner_start)
            if not self._fallocate(modes, inner_start, inner_end):
                self._write_zeroes_plainly(inner_start, inner_end)
            self._write_zeroes_plainly(inner_end, end)
        except OSError as error:
            raise self._error("zeroing", offset, length, error) from error

    def _fallocate(self, modes: tuple[int, ...], start: int, end: int) -> bool:
        for mode in modes:
            try:
                linux.fallocate(self._descriptor, mode, start, end - start)
            except OSError as error:
                if error.errno not in linux.UNSUPPORTED:
                    raise
            else:
                return True
        return False

    def _write_zeroes_plainly(self, start: int, end: int) -> None:
        while start < end:
            start += os.pwrite(self._descriptor, _ZEROES[: end - start], start)

    def flush(self) -> None:
        if self._read_only:
            return
        # A flush that begins after this line covers everything the caller wrote, so callers that wait share one.
        enough = self._flush_count + 1
        with self._flush_lock:
            if self._failed_flush is not None:
                raise DeviceError(str(self._failed_flush), self._failed_flush.errno)
            if self._flush_count >= enough:
                return
            self._flush_count += 1
            try:
                self._synchronize()
            except OSError as error:
                self._failed_flush = DeviceError(
                    f"{self._description}: flush failed: {error.strerror}; what was written since the last flush may"
                    " be lost",
                    error.errno or errno.EIO,
                )
                raise self._failed_flush from error

    def _synchronize(self) -> None:
        os.fdatasync(self._descriptor)

    def extents(self, offset: int, length: int) -> Iterator[MappedExtent]:
        check_range(offset=offset, length=length, size=self._size)
        return self._extents(offset, offset + length)

    def _extents(self, position: int, end: int) -> Iterator[MappedExtent]:
        while position < end:
            data = min(self._seek(position, os.SEEK_DATA, at_end=end), end)
            if data > position:
                yield MappedExtent(position, data - position, hole=True)
            # What was data just now may have been punched since, and the hole then starts at once: one byte is data.
            # Then it need not be asked for, which saves much: the system may have to walk to the end of a full file.
            hole = end
            if data + 1 < end:
                hole = min(max(self._seek(data, os.SEEK_HOLE, at_end=end), data + 1), end)
            if hole > data:
                yield MappedExtent(data, hole - data, hole=False)
            position = hole

    def _seek(self, position: int, whence: int, *, at_end: int) -> int:
        try:
            return os.lseek(self._descriptor, position, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return at_end
            if error.errno in linux.UNSUPPORTED:
                return position if whence == os.SEEK_DATA else at_end
            raise self._error("reading the allocation map", position, at_end - position, error) from error

    def resize(self, size: int) -> None:
        if self._read_only:
            raise PermissionRefused(f"{self._description}: is open read-only and cannot grow")
        if size < self._size:
            raise Refused(f"{self._description}: cannot shrink from {self._size} to {size} bytes")
        try:
            self._grow(size)
        except OSError as error:
            raise DeviceError(
                f"{self._description}: growing to {size} bytes failed: {error.strerror}", error.errno or errno.EIO
            ) from error
        self._size = size

    def _grow(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _check_writable(self, offset: int, length: int) -> None:
        if self._read_only:
            raise PermissionRefused(f"{self._description}: is open read-only")
        check_range(offset=offset, length=length, size=self._size)

    def _error(self, what: str, offset: int, length: int, error: OSError) -> DeviceError:
        return DeviceError(
            f"{self._description}: {what} of {length} bytes at {offset} failed: {error.strerror}",
            error.errno or errno.EIO,
        )
