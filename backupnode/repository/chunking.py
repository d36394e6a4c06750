"""Cuts a stream of bytes and holes into aligned chunks. Pure: no I/O, no hashing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from stillpoint.extents import Extent, split

Piece: TypeAlias = bytes | bytearray | memoryview


class Chunker:
    """Yields (chunk index, its bytes) for every chunk of a volume of `size` bytes that got data, in order.

    A chunk that lies wholly within holes is not yielded; a hole inside a chunk that has data becomes zeroes in it. A
    chunk that arrives in one piece is yielded as a view of that piece, without a copy.
    """

    def __init__(self, *, size: int, chunk_size: int) -> None:
        self._size = size
        self._chunk_size = chunk_size
        self.position = 0  # the byte expected next
        # From the start of the chunk around `position` up to `position`; None when that is all holes so far.
        self._partial: bytearray | None = None

    def data(self, data: Piece) -> Iterator[tuple[int, Piece]]:
        """Take the next bytes."""
        view = memoryview(data)
        start = self.position
        assert view.nbytes <= self._size - start, "more data than the volume has bytes"
        for extent in split(Extent(start, view.nbytes), limit=self._chunk_size):
            piece = view[extent.offset - start : extent.end - start]
            self.position = extent.end
            if extent.offset % self._chunk_size == 0 and self._at_chunk_end():
                yield extent.offset // self._chunk_size, piece
                continue
            if self._partial is None:
                self._partial = bytearray(extent.offset % self._chunk_size)
            self._partial += piece
            yield from self._take_complete()

    def hole(self, length: int) -> Iterator[tuple[int, Piece]]:
        """Take the next `length` bytes as zeroes. Yields at most one chunk, whatever the length."""
        end = self.position + length
        assert length >= 0 and end <= self._size, "more data than the volume has bytes"
        if self._partial is not None:
            inside = min(end, self.position + self._chunk_size - len(self._partial))
            self._partial += bytes(inside - self.position)
            self.position = inside
            yield from self._take_complete()
        self.position = end

    def _at_chunk_end(self) -> bool:
        return self.position % self._chunk_size == 0 or self.position == self._size

    def _take_complete(self) -> Iterator[tuple[int, bytearray]]:
        if self._partial is None or not self._at_chunk_end():
            return
        whole, self._partial = self._partial, None
        yield (self.position - 1) // self._chunk_size, whole
