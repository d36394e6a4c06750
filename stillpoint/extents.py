"""Byte ranges of a volume, and arithmetic on them.

Pure values; nothing here does I/O. Offsets and lengths are bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .errors import OutOfRange


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """`length` bytes that start at `offset`."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class MappedExtent:
    """A range of a device that is all data, or all a hole (reads as zeroes and occupies no space)."""

    offset: int
    length: int
    hole: bool

    @property
    def end(self) -> int:
        return self.offset + self.length


def check_range(*, offset: int, length: int, size: int) -> None:
    """Raise OutOfRange unless the extent lies within `size`. Written so that no sum can overflow a fixed-width peer."""
    if offset < 0 or length < 0 or offset > size or length > size - offset:
        raise OutOfRange(f"bytes {offset}+{length} are outside a device of {size} bytes")


def split(extent: Extent, *, limit: int) -> Iterator[Extent]:
    """The extent in pieces of at most `limit` bytes; every piece but the first starts at a multiple of `limit`."""
    offset = extent.offset
    while offset < extent.end:
        piece_end = min(extent.end, (offset // limit + 1) * limit)
        yield Extent(offset, piece_end - offset)
        offset = piece_end


def coalesce(mapped: Iterable[MappedExtent]) -> Iterator[MappedExtent]:
    """Join neighbours of one kind; the input is ordered and gapless, and so is the output. Empty extents vanish."""
    pending: MappedExtent | None = None
    for extent in mapped:
        if not extent.length:
            continue
        if pending is not None and pending.hole == extent.hole and pending.end == extent.offset:
            pending = MappedExtent(pending.offset, pending.length + extent.length, extent.hole)
            continue
        if pending is not None:
            yield pending
        pending = extent
    if pending is not None:
        yield pending
