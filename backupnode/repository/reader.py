"""Reads one backup of the directory repository. The chain of trust: manifest, root, page, chunk."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from stillpoint.errors import DataCorrupt

from .backup_id import BackupId
from .codec import decode
from .folder import system_errors
from .interface import BackupRecord
from .manifest import Manifest
from .records import (
    ENTRIES_PER_PAGE,
    ENTRY_SIZE,
    FILE_HEADER_SIZE,
    RECORD_HEADER_SIZE,
    Entry,
    RecordHeader,
    RecordType,
    decode_entries,
    decode_file_header,
)

# Index pages kept in memory, each of at most 1024 entries.
_PAGES_CACHED: Final = 8


class DirectoryReader:
    """A BackupReader on a data file. Goes on reading a backup that is deleted meanwhile."""

    def __init__(self, path: Path, manifest: Manifest, *, chunk_size: int) -> None:
        """Raises DataCorrupt when the file, its header or its root is missing or damaged, and DeviceError."""
        self._path = path
        self._manifest = manifest
        self._chunk_size = chunk_size
        self._lock = threading.Lock()
        self._pages: OrderedDict[int, dict[int, Entry]] = OrderedDict()
        size = manifest.record.origin.size
        self._chunk_count = -(-size // chunk_size)
        self._page_count = -(-self._chunk_count // ENTRIES_PER_PAGE)
        self._descriptor = self._open()
        try:
            self._check_file(volume_size=size)
            self._root = self._read_index(
                RecordType.ROOT, 0, manifest.root, length_max=self._page_count, number_limit=self._page_count
            )
        except BaseException:
            self.close()
            raise

    @property
    def record(self) -> BackupRecord:
        return self._manifest.record

    @property
    def chunk_size(self) -> int:
        return self._chunk_size

    def data_chunks(self, first: int = 0) -> Iterator[int]:
        for page_index in self._root:
            if (page_index + 1) * ENTRIES_PER_PAGE <= first:
                continue
            for slot in self._page(page_index):
                index = page_index * ENTRIES_PER_PAGE + slot
                if index >= first:
                    yield index

    def read_chunk(self, index: int) -> bytes | None:
        assert 0 <= index < self._chunk_count
        page_index, slot = divmod(index, ENTRIES_PER_PAGE)
        if page_index not in self._root:
            return None
        entry = self._page(page_index).get(slot)
        if entry is None:
            return None
        plain_length = min(self._chunk_size, self.record.origin.size - index * self._chunk_size)
        if entry.stored_length > plain_length:
            raise self._corrupt(f"chunk {index}", "the index gives it an impossible length")
        return self._read_record(RecordType.CHUNK, index, entry, plain_length=plain_length)

    def check_frame(self) -> None:
        """Every byte of the file belongs to the header, a chunk, a page or the root, each of which reading checks."""
        position = FILE_HEADER_SIZE
        for page_index, page_entry in self._root.items():
            for slot, entry in self._page(page_index).items():
                position = self._next_position(f"chunk {page_index * ENTRIES_PER_PAGE + slot}", entry, position)
            position = self._next_position(f"page {page_index}", page_entry, position)
        self._next_position("the root", self._manifest.root, position)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _open(self) -> int:
        try:
            with system_errors("opening it", self._path):
                return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except Exception as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise self._corrupt("the data file", "it is missing") from None
            raise

    def _check_file(self, *, volume_size: int) -> None:
        length = os.fstat(self._descriptor).st_size
        root = self._manifest.root
        if length != root.position + RECORD_HEADER_SIZE + root.stored_length:
            raise self._corrupt("the data file", f"has {length} bytes, which is not its length")
        try:
            claims = decode_file_header(self._pread(FILE_HEADER_SIZE, 0))
        except DataCorrupt as error:
            raise self._corrupt("the data file", str(error)) from None
        if claims != (self._chunk_size, volume_size):
            raise self._corrupt("the data file", "belongs to another backup")

    def _page(self, page_index: int) -> dict[int, Entry]:
        with self._lock:
            page = self._pages.get(page_index)
            if page is None:
                chunks_left = self._chunk_count - page_index * ENTRIES_PER_PAGE
                limit = min(ENTRIES_PER_PAGE, chunks_left)
                page = self._read_index(
                    RecordType.PAGE, page_index, self._root[page_index], length_max=limit, number_limit=limit
                )
                self._pages[page_index] = page
                if len(self._pages) > _PAGES_CACHED:
                    self._pages.popitem(last=False)
            else:
                self._pages.move_to_end(page_index)
            return page

    def _read_index(
        self, type_: RecordType, number: int, entry: Entry, *, length_max: int, number_limit: int
    ) -> dict[int, Entry]:
        what = f"{type_.name.lower()} {number} of the index"
        if entry.stored_length > length_max * ENTRY_SIZE:
            raise self._corrupt(what, "has an impossible length")
        payload = self._read_record(type_, number, entry, plain_length=entry.stored_length)
        try:
            return decode_entries(payload, number_limit=number_limit)
        except DataCorrupt as error:
            raise self._corrupt(what, str(error)) from None

    def _read_record(self, type_: RecordType, number: int, entry: Entry, *, plain_length: int) -> bytes:
        what = f"{type_.name.lower()} {number}"
        try:
            data = memoryview(self._pread(RECORD_HEADER_SIZE + entry.stored_length, entry.position))
            header = RecordHeader.decode(data[:RECORD_HEADER_SIZE])
            expected = (type_, number, entry.stored_length, plain_length, entry.digest)
            if (header.type, header.number, header.stored_length, header.plain_length, header.digest) != expected:
                raise DataCorrupt("another record stands in its place")
            return decode(header, data[RECORD_HEADER_SIZE:])
        except DataCorrupt as error:
            raise self._corrupt(what, str(error)) from None

    def _pread(self, length: int, position: int) -> bytes:
        with system_errors(f"reading {length} bytes at {position}", self._path):
            data = os.pread(self._descriptor, length, position)
        if len(data) != length:
            raise DataCorrupt("it is cut short")
        return data

    def _next_position(self, what: str, entry: Entry, position: int) -> int:
        if entry.position != position:
            raise self._corrupt(what, f"lies at {entry.position} instead of {position}")
        return position + RECORD_HEADER_SIZE + entry.stored_length

    def _corrupt(self, what: str, detail: str) -> DataCorrupt:
        return _corrupt(self._manifest.record.id, what, detail)


def _corrupt(backup: BackupId, what: str, detail: str) -> DataCorrupt:
    return DataCorrupt(f"backup {backup} is damaged: {what}: {detail}")
