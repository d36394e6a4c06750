"""A file mapped into memory, shared between the engine, which writes, and its readers in other processes.

Invariants:
- Nobody touches a page by the mapping whose space has not been reserved (`posix_fallocate`) before: a full disk is an
  OSError at `reserve`, never a SIGBUS at a store. Reserving costs a system call once per piece of the file.
- The mapping never grows or moves; a file that has to be longer is mapped again.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

PAGE_SIZE = 4096


class MappedFile:
    """`view` is the file's bytes. Closing drops the mapping once the last view of it is gone."""

    def __init__(self, descriptor: int, size: int, *, writable: bool) -> None:
        self._descriptor = descriptor
        self.size = size
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.view = memoryview(mmap.mmap(descriptor, size, mmap.MAP_SHARED, protection))
        if not writable:
            # The mapping has its own hold on the file. A reader may drop a map while another thread looks at it, and
            # then nothing but the last reference ends it.
            os.close(descriptor)
            self._descriptor = -1

    @classmethod
    def create(cls, path: Path, size: int) -> MappedFile:
        """A new sparse file that reads as zeroes, replacing one of that name. Not durable, nothing reserved."""
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, size)
            return cls(descriptor, size, writable=True)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def open(cls, path: Path, *, writable: bool, size: int | None = None) -> MappedFile:
        """Map the whole file, or its first `size` bytes. Raises OSError; ValueError when it is empty or shorter."""
        descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            return cls(descriptor, os.fstat(descriptor).st_size if size is None else size, writable=writable)
        except BaseException:
            os.close(descriptor)
            raise

    def reserve(self, offset: int, length: int) -> None:
        """Make sure the range has space, so that storing into it cannot fail. Raises OSError (ENOSPC)."""
        os.posix_fallocate(self._descriptor, offset, length)

    def synchronize(self) -> None:
        """Make all stores so far durable. Costs what was changed, not what is mapped. Raises OSError."""
        # fdatasync also writes pages that were dirtied by a mapping: on Linux both are one page cache.
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
            self.view = memoryview(b"")


def rounded_to_pages(size: int) -> int:
    return -(-size // PAGE_SIZE) * PAGE_SIZE
