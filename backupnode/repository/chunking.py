"""Cuts a stream of bytes, holes and unchanged ranges into aligned chunks. Pure: no I/O, no hashing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple, TypeAlias

from stillpoint.extents import Extent, split

Piece: TypeAlias = bytes | bytearray | memoryview


class _Unchanged(Enum):
    """Bytes that are what the base backup has at their place."""

    UNCHANGED = 0


UNCHANGED: Final = _Unchanged.UNCHANGED
# Data, zeroes (None), or what the base has.
Content: TypeAlias = Piece | _Unchanged | None


class Part(NamedTuple):
    """`length` bytes of a chunk from `start` on."""

    start: int
    length: int
    content: Content


@dataclass(frozen=True, slots=True)
class Zeroes:
    """`count` whole chunks of zeroes."""

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk that got data, or only a part of which is zeroes. Its parts are gapless."""

    index: int
    length: int
    parts: tuple[Part, ...]

    @property
    def needs_base(self) -> bool:
        return any(part.content is UNCHANGED for part in self.parts)

    def compose(self, base: bytes | None) -> Piece:
        """Its bytes; a view of what was given when it came in one piece. base: the base's chunk; None: zeroes."""
        first = self.parts[0].content
        if len(self.parts) == 1 and first is not None and first is not UNCHANGED:
            return first
        whole = bytearray(self.length)
        for start, length, content in self.parts:
            if content is UNCHANGED:
                if base is not None:
                    whole[start : start + length] = memoryview(base)[start : start + length]
            elif content is not None:
                whole[start : start + length] = content
        return whole


class Chunker:
    """Yields what becomes of the chunks of a volume of `size` bytes, in order. Unchanged chunks are not spoken of."""

    def __init__(self, *, size: int, chunk_size: int) -> None:
        self._size = size
        self._chunk_size = chunk_size
        self.position = 0  # the byte expected next
        self._parts: list[Part] = []  # of the chunk around `position`

    @property
    def boundary(self) -> int:
        """Every chunk before this byte has been given whole."""
        return self.position // self._chunk_size * self._chunk_size if self._parts else self.position

    def data(self, data: Piece) -> Iterator[Chunk | Zeroes]:
        """Take the next bytes."""
        view = memoryview(data)
        start = self.position
        assert view.nbytes <= self._size - start, "more data than the volume has bytes"
        for extent in split(Extent(start, view.nbytes), limit=self._chunk_size):
            yield from self._part(extent.length, view[extent.offset - start : extent.end - start])

    def other(self, length: int, content: _Unchanged | None) -> Iterator[Chunk | Zeroes]:
        """Take the next `length` bytes as zeroes or unchanged. Yields at most three things, whatever the length."""
        end = self.position + length
        assert length >= 0 and end <= self._size, "more data than the volume has bytes"
        if self._parts and length:
            to_chunk_end = self._chunk_end() - self.position
            yield from self._part(min(length, to_chunk_end), content)
        whole_end = end if end == self._size else end // self._chunk_size * self._chunk_size
        if whole_end > self.position:
            first = self.position // self._chunk_size
            if content is None:
                yield Zeroes(first, -(-whole_end // self._chunk_size) - first)
            self.position = whole_end
        if end > self.position:
            yield from self._part(end - self.position, content)

    def _chunk_end(self) -> int:
        return min(self._size, (self.position // self._chunk_size + 1) * self._chunk_size)

    def _part(self, length: int, content: Content) -> Iterator[Chunk | Zeroes]:
        end = self._chunk_end()
        index, start = divmod(self.position, self._chunk_size)
        self._parts.append(Part(start, length, content))
        self.position += length
        if self.position < end:
            return
        parts, self._parts = tuple(self._parts), []
        if all(part.content is None for part in parts):
            yield Zeroes(index, 1)
        elif any(part.content is not UNCHANGED for part in parts):
            yield Chunk(index, end - index * self._chunk_size, parts)
