"""A backup as one ordered, gapless stream of data and holes, read ahead by worker threads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Executor, Future
from itertools import islice
from typing import Final, NamedTuple

from .repository import BackupReader

# Read by one call in a thread, and the most data of one piece.
_PIECE_BYTES: Final = 1 << 20
# Pieces being read, or read and not yet taken.
_READ_AHEAD: Final = 6
# Pieces planned at once, so that index pages are read in a thread too.
_PLAN_AHEAD: Final = 64


class Piece(NamedTuple):
    """`length` bytes of the volume. `data` is None where they are zeroes."""

    offset: int
    length: int
    data: bytes | None


async def stream(reader: BackupReader, executor: Executor) -> AsyncGenerator[Piece, None]:
    """The whole volume in order. Iterate it within `contextlib.aclosing`, and close the reader after that: no thread
    reads any more then.

    Raises DataCorrupt or DeviceError at the piece that cannot be read.
    """
    loop = asyncio.get_running_loop()
    plan = _runs(reader.data_chunks(), count_max=max(1, _PIECE_BYTES // reader.chunk_size))
    planned: deque[range] = deque()
    reading: deque[Future[Piece]] = deque()
    position = 0
    more = True
    try:
        while True:
            if more and not planned:
                planned.extend(await loop.run_in_executor(executor, lambda: list(islice(plan, _PLAN_AHEAD))))
                more = bool(planned)
            while planned and len(reading) < _READ_AHEAD:
                reading.append(executor.submit(_read, reader, planned.popleft()))
            if not reading:
                break
            piece = await asyncio.wrap_future(reading[0])
            reading.popleft()
            if piece.offset > position:
                yield Piece(position, piece.offset - position, None)
            position = piece.offset + piece.length
            yield piece
        if position < reader.record.origin.size:
            yield Piece(position, reader.record.origin.size - position, None)
    finally:
        running = [asyncio.wrap_future(future) for future in reading if not future.cancel()]
        await asyncio.gather(*running, return_exceptions=True)


def _read(reader: BackupReader, run: range) -> Piece:
    parts: list[bytes] = []
    for part in reader.read_chunks(run):
        assert part is not None, "a chunk that has data reads as a hole"
        parts.append(part)
    data = b"".join(parts) if len(parts) > 1 else parts[0]
    return Piece(run.start * reader.chunk_size, len(data), data)


def _runs(indices: Iterator[int], *, count_max: int) -> Iterator[range]:
    """Neighbouring indices together, at most `count_max` of them."""
    start = end = -1
    for index in indices:
        if index == end and end - start < count_max:
            end += 1
            continue
        if end > start:
            yield range(start, end)
        start, end = index, index + 1
    if end > start:
        yield range(start, end)
