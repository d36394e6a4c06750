"""Appends records to a backup's data file: chunks, index pages between them, the root at the end.

Invariants:
- Chunks come in ascending order of index, so a page is complete, and written, when the first chunk of a later page
  comes. Memory holds one page and 48 bytes for each page before it (a page covers 256 MiB of the volume by default).
- The file is locked from its creation to `close`, so nobody sweeps it away as a leftover.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from .chunking import Piece
from .codec import EncodedRecord, encode_raw
from .folder import create_locked, fsync_folder, system_errors
from .records import ENTRIES_PER_PAGE, RECORD_HEADER_SIZE, Entry, RecordType, encode_entries, encode_file_header

_IOV_MAX: Final = 1024


class DataFile:
    """Plain calls that wait for the disk and raise DeviceError. The caller makes one at a time; `length` is bytes."""

    def __init__(self, path: Path, *, chunk_size: int, volume_size: int) -> None:
        """Make the file. Raises FileExistsError when the name is taken."""
        self.path = path
        self.length = 0
        self.data_bytes = 0  # plain length of the chunks so far
        self._page_index = 0
        self._page: list[Entry] = []
        self._root: list[Entry] = []
        self._descriptor = create_locked(path)
        try:
            self._append([encode_file_header(chunk_size=chunk_size, volume_size=volume_size)])
        except BaseException:
            self.remove()
            raise

    def append_chunks(self, records: Sequence[EncodedRecord]) -> None:
        buffers: list[Piece] = []
        position = self.length
        for record in records:
            page_index, slot = divmod(record.header.number, ENTRIES_PER_PAGE)
            if page_index != self._page_index:
                self._append(buffers)
                buffers = []
                self._finish_page()
                self._page_index = page_index
                position = self.length
            buffers += (record.header.encode(), record.stored)
            self._page.append(Entry(slot, len(record.stored), position, record.header.digest))
            position += RECORD_HEADER_SIZE + len(record.stored)
            self.data_bytes += record.header.plain_length
        self._append(buffers)

    def finish(self) -> Entry:
        """Write what is left of the index and make everything durable. Returns where the root is."""
        self._finish_page()
        root = self._append_index(RecordType.ROOT, 0, self._root)
        with system_errors("making it durable", self.path):
            os.fsync(self._descriptor)
            fsync_folder(self.path.parent)
        return root

    def write_back(self) -> None:
        """Make what was appended so far durable. May run beside the other calls."""
        with system_errors("writing it to the disk", self.path):
            # Of its own, so that it stays valid when the file is closed meanwhile.
            descriptor = os.dup(self._descriptor)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)

    def remove(self) -> None:
        """Remove the file, then close it, so that it is held as long as it has a name."""
        try:
            self.path.unlink(missing_ok=True)
        finally:
            self.close()

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _finish_page(self) -> None:
        if self._page:
            self._root.append(self._append_index(RecordType.PAGE, self._page_index, self._page))
            self._page = []

    def _append_index(self, type_: RecordType, number: int, entries: Sequence[Entry]) -> Entry:
        record = encode_raw(type_, number, encode_entries(entries))
        position = self.length
        self._append([record.header.encode(), record.stored])
        return Entry(number, len(record.stored), position, record.header.digest)

    def _append(self, buffers: Sequence[Piece]) -> None:
        rest = [memoryview(buffer) for buffer in buffers if len(buffer)]
        with system_errors("writing to it", self.path):
            while rest:
                count = os.pwritev(self._descriptor, rest[:_IOV_MAX], self.length)
                self.length += count
                while rest and count >= rest[0].nbytes:
                    count -= rest.pop(0).nbytes
                if rest:
                    rest[0] = rest[0][count:]
