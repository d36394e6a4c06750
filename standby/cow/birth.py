"""The birth map: in which generation each block was last written.

One u32 per block, in a file mapped shared: 4 bytes a block, 64 MiB for a TiB of 64 KiB blocks, allocated when the
volume is made, so that no later store into it can fail.

Invariants:
- A birth is stored before the block is overwritten in place, so the map may say "newer" about a block that was not
  written, and never "older" about one that was (R2).
- `synchronize` at snapshot creation makes every birth up to that snapshot durable. Later births are proven by the
  PRESERVE records or, if there are none, count as "now" after a power loss (`distrust_above`).
- After a process was killed the page cache still holds every store: the map is exact.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from stillpoint.errors import DeviceError

from .mapped_file import MappedFile, rounded_to_pages

Generations: TypeAlias = npt.NDArray[np.uint32]
Blocks: TypeAlias = npt.NDArray[np.int64]

_ENTRY_SIZE = 4
# What is worked on at once where a map is gone through as a whole: that of a large volume is larger than memory may be.
PIECE_BLOCKS: Final = 1 << 20


class BirthMap:
    """`scalars[block]` is the cheap way to one birth, `array[first:end]` the cheap way to many; both are the map."""

    def __init__(self, file: MappedFile, block_count: int) -> None:
        self._file = file
        self._failed: OSError | None = None
        self.block_count = block_count
        self.scalars = file.view.cast("I")
        self.array: Generations = np.frombuffer(file.view, dtype="<u4", count=block_count)

    @classmethod
    def create(cls, path: Path, block_count: int) -> BirthMap:
        """All blocks as never written. Durable on return but for its name. Raises OSError when there is no room."""
        file = MappedFile.create(path, rounded_to_pages(block_count * _ENTRY_SIZE))
        try:
            file.reserve(0, file.size)
            file.synchronize()
        except OSError:
            file.close()
            path.unlink()
            raise
        return cls(file, block_count)

    @classmethod
    def open(cls, path: Path, block_count: int, *, writable: bool) -> BirthMap:
        """Raises OSError; ValueError when the file is too short for that many blocks."""
        size = rounded_to_pages(block_count * _ENTRY_SIZE)
        return cls(MappedFile.open(path, writable=writable, size=size), block_count)

    @staticmethod
    def extend(path: Path, *, old_count: int, new_count: int, generation: int) -> BirthMap:
        """The map of a grown volume, whose new blocks count as written in `generation`. Raises OSError, undone then."""
        size = rounded_to_pages(new_count * _ENTRY_SIZE)
        old_size = rounded_to_pages(old_count * _ENTRY_SIZE)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError:
            os.ftruncate(descriptor, old_size)
            raise
        finally:
            os.close(descriptor)
        births = BirthMap.open(path, new_count, writable=True)
        births.array[old_count:] = generation
        births.synchronize()
        return births

    def newest(self) -> int:
        return int(self.array.max())

    def distrust_above(self, proven: int, *, current: int) -> None:
        """Let every birth newer than `proven` be `current`: it may be older than the truth, and that must not stay."""
        for first in range(0, self.block_count, PIECE_BLOCKS):
            births = self.array[first : first + PIECE_BLOCKS]
            births[births > proven if proven >= 0 else slice(None)] = current

    def raise_to(self, blocks: Blocks, generations: Generations) -> None:
        """Births of `blocks` become at least `generations`. A block may come more than once."""
        np.maximum.at(self.array, blocks, generations)

    def synchronize(self) -> None:
        """Make every birth stored so far durable. Raises DeviceError, and for ever after: a lost write stays lost."""
        if self._failed is None:
            try:
                self._file.synchronize()
            except OSError as error:
                self._failed = error
        if self._failed is not None:
            raise DeviceError(
                f"flushing the birth map failed: {self._failed.strerror}", self._failed.errno or errno.EIO
            ) from self._failed

    def close(self) -> None:
        self.scalars = memoryview(b"").cast("I")
        self.array = np.empty(0, dtype="<u4")
        self._file.close()
