"""The way of a backup into the directory repository: chunked here, encoded in worker threads, appended in order.

Invariants:
- The manifest is made last, when the data file and its name are durable. A data file without a manifest is a leftover.
- All calls on the data file are made in one thread, one after the other, so that the one that closes it comes after
  whatever a cancelled caller left running.
- What is under way is bounded, whatever the volume's size.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from .backup_id import BackupId
from .chunking import Chunker, Piece
from .codec import EncodedRecord, encode_chunk
from .data_file import DataFile
from .folder import create_whole
from .interface import BackupRecord, Origin
from .manifest import Manifest

# Chunks that are handed to a thread together: below this, the hand-over costs more than it brings.
_BATCH_BYTES: Final = 1 << 20
# Being hashed, compressed or written.
_IN_FLIGHT_BYTES: Final = 16 << 20
# Written back to the disk in the background each time so much was appended: the last fsync is then a short one, and a
# disk that fails says so early.
_WRITE_BACK_BYTES: Final = 64 << 20

T = TypeVar("T")


class DirectoryWriter:
    """A BackupWriter into `file`, which it owns. `executor` is for hashing and compressing only."""

    def __init__(
        self,
        backup: BackupId,
        origin: Origin,
        file: DataFile,
        *,
        manifest_path: Path,
        chunk_size: int,
        level: int,
        executor: Executor,
        clock: Callable[[], int],
    ) -> None:
        self._id = backup
        self._origin = origin
        self._file = file
        self._manifest_path = manifest_path
        self._level = level
        self._executor = executor
        self._clock = clock
        self._started_ns = time.monotonic_ns()
        self._file_thread = ThreadPoolExecutor(1, thread_name_prefix="backup-file")
        self._chunker = Chunker(size=origin.size, chunk_size=chunk_size)
        self._batch: list[tuple[int, Piece]] = []
        self._batch_bytes = 0
        self._encoding: deque[tuple[int, asyncio.Future[list[EncodedRecord]]]] = deque()
        self._encoding_bytes = 0
        self._write_back: asyncio.Future[None] | None = None
        self._written_back = 0
        self._ended = False

    @property
    def id(self) -> BackupId:
        return self._id

    @property
    def position(self) -> int:
        return self._chunker.position

    @property
    def stored_bytes(self) -> int:
        return self._file.length

    async def write(self, data: bytes | memoryview) -> None:
        assert not self._ended
        for index, chunk in self._chunker.data(data):
            await self._add(index, chunk)

    async def hole(self, length: int) -> None:
        assert not self._ended
        for index, chunk in self._chunker.hole(length):
            await self._add(index, chunk)

    async def commit(self, *, received_bytes: int) -> BackupRecord:
        assert not self._ended
        assert self.position == self._origin.size, "a backup is committed before all of the volume was given"
        self._encode_batch()
        while self._encoding:
            await self._append_oldest()
        if self._write_back is not None:
            await self._write_back
        root = await self._in_file_thread(self._file.finish)
        record = BackupRecord(
            id=self._id,
            origin=self._origin,
            finished_ns=self._clock(),
            duration_ns=time.monotonic_ns() - self._started_ns,
            data_bytes=self._file.data_bytes,
            stored_bytes=self._file.length,
            received_bytes=received_bytes,
        )
        contents = Manifest(record, root).encode()
        await self._in_file_thread(lambda: create_whole(self._manifest_path, contents))
        self._ended = True
        await self._in_file_thread(self._file.close)
        self._file_thread.shutdown(wait=False)
        return record

    async def abort(self) -> None:
        if self._ended:
            return
        self._ended = True
        for _, future in self._encoding:
            future.cancel()
        if self._write_back is not None:
            self._write_back.cancel()
        try:
            # Shielded: when the caller is cancelled again, the thread still removes what is there.
            await asyncio.shield(self._in_file_thread(self._remove))
        finally:
            self._file_thread.shutdown(wait=False)

    def _remove(self) -> None:
        # The manifest first: a commit that was cancelled may have made it.
        with contextlib.suppress(OSError):
            self._manifest_path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._file.remove()

    async def _add(self, index: int, chunk: Piece) -> None:
        self._batch.append((index, chunk))
        self._batch_bytes += len(chunk)
        if self._batch_bytes < _BATCH_BYTES:
            return
        self._encode_batch()
        # In order, as soon as they are ready; waiting only when too much is under way.
        while self._encoding and (self._encoding_bytes > _IN_FLIGHT_BYTES or self._encoding[0][1].done()):
            await self._append_oldest()

    def _encode_batch(self) -> None:
        if not self._batch:
            return
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._executor, _encode_all, self._batch, self._level)
        self._encoding.append((self._batch_bytes, future))
        self._encoding_bytes += self._batch_bytes
        self._batch, self._batch_bytes = [], 0

    async def _append_oldest(self) -> None:
        size, future = self._encoding[0]
        records = await future
        await self._in_file_thread(lambda: self._file.append_chunks(records))
        self._encoding.popleft()
        self._encoding_bytes -= size
        if self._file.length - self._written_back >= _WRITE_BACK_BYTES:
            # A disk slower than the stream is waited for here, rather than in one long fsync at the end.
            if self._write_back is not None:
                await self._write_back
            self._written_back = self._file.length
            self._write_back = asyncio.get_running_loop().run_in_executor(None, self._file.write_back)

    async def _in_file_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._file_thread, call)


def _encode_all(chunks: Sequence[tuple[int, Piece]], level: int) -> list[EncodedRecord]:
    encoded = (encode_chunk(index, data, level=level) for index, data in chunks)
    return [record for record in encoded if record is not None]
