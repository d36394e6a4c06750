"""A stage: changes of the mirror that wait in memory until what they overwrite has been preserved durably.

Invariants:
- A stage belongs to one generation: a snapshot is cut between stages, never inside one.
- Stages are applied in the order they were opened, and the changes of one in the order they came.
- While a block is marked, every change that touches it is staged too, so nothing overtakes a staged change.
- The mark of a block is the number of the newest stage that touches it. Once that one is applied nothing of the block
  is waiting any more, because older stages were applied before it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from stillpoint.devices import BlockDevice, Buffer

from .birth import Blocks

MARK_MAX: Final = 255
STAGES_MAX: Final = 200  # fewer than there are marks, so that a mark in use is never given again
CHANGE_OVERHEAD: Final = 128  # bytes of memory a change takes beside its payload, about
_FEW_BLOCKS: Final = 16
_MAP_NORESERVE: Final = 0x4000  # Linux; Python 3.11 has no name for it
_PRIVATE_UNRESERVED: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


class Change(NamedTuple):
    """A write (`data`), or a trim or zeroing (`data` is None) of `length` bytes at `offset`."""

    offset: int
    length: int
    data: Buffer | None
    is_trim: bool
    may_trim: bool

    def apply(self, device: BlockDevice) -> None:
        if self.data is not None:
            device.write(self.offset, (self.data,))
        elif self.is_trim:
            device.trim(self.offset, self.length)
        else:
            device.write_zeroes(self.offset, self.length, may_trim=self.may_trim)


class Marks:
    """One byte a block, of which only the pages in use take memory: 0, or the number of a stage."""

    def __init__(self, block_count: int) -> None:
        self._mapping = mmap.mmap(-1, max(block_count, 1), _PRIVATE_UNRESERVED)
        self.scalars = memoryview(self._mapping)
        self._array: npt.NDArray[np.uint8] = np.frombuffer(self.scalars, dtype=np.uint8)

    def any(self, first: int, last: int) -> bool:
        if last - first < _FEW_BLOCKS:
            return any(self.scalars[first : last + 1])
        return bool(self._array[first : last + 1].any())

    def set(self, first: int, last: int, mark: int) -> None:
        if first == last:
            self.scalars[first] = mark
        else:
            self._array[first : last + 1] = mark

    def clear(self, first: int, last: int, mark: int) -> None:
        """Unmark the blocks whose mark is this one."""
        if first == last:
            if self.scalars[first] == mark:
                self.scalars[first] = 0
            return
        blocks = self._array[first : last + 1]
        blocks[blocks == mark] = 0

    def copy_from(self, other: Marks) -> None:
        self._array[: len(other._array)] = other._array


class Stage:
    """Changes of one generation, in order. `size` is the memory they hold."""

    def __init__(self, *, epoch: int, mark: int) -> None:
        self.epoch = epoch
        self.mark = mark
        self.changes: list[Change] = []
        self.size = 0

    def add(self, change: Change) -> None:
        self.changes.append(change)
        self.size += CHANGE_OVERHEAD + (len(change.data) if change.data is not None else 0)

    def blocks(self, shift: int) -> Blocks:
        """The blocks the changes touch, ascending, each once."""
        count = len(self.changes)
        first: Blocks = np.fromiter((change.offset >> shift for change in self.changes), dtype=np.int64, count=count)
        last: Blocks = np.fromiter(
            ((change.offset + change.length - 1) >> shift for change in self.changes), dtype=np.int64, count=count
        )
        return ranges(first, last - first + 1)

    def overlay(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Show the changes on top of the bytes at `offset`."""
        for change in self.changes:
            start = max(offset, change.offset)
            end = min(offset + len(buffer), change.offset + change.length)
            if start < end:
                piece = memoryview(change.data)[start - change.offset : end - change.offset] if change.data else None
                buffer[start - offset : end - offset] = bytes(end - start) if piece is None else piece


def ranges(firsts: Blocks, counts: Blocks) -> Blocks:
    """The numbers of all the ranges, ascending, each once."""
    starts = np.cumsum(counts) - counts
    every = np.repeat(firsts - starts, counts) + np.arange(int(counts.sum()), dtype=np.int64)
    return np.unique(every)


def overlay(stages: Iterable[Stage], offset: int, buffer: bytearray | memoryview) -> None:
    for stage in stages:
        stage.overlay(offset, buffer)
