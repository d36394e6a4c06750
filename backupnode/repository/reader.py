"""Reads one backup. The chain of trust: manifest, root, page, chunk; each names the keyed hash of the next."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

import numpy as np

from stillpoint.errors import DataCorrupt

from .blobs import ID_SIZE, ZERO_ID, BlobKind, ChunkId
from .index import is_missing
from .interface import BackupRecord
from .manifest import Manifest
from .packs import DamagedBlob, Packs
from .tree import IDS_PER_PAGE, check_page, load_ids, page_count

# Lowest pages of the index kept in memory, 32 KiB each.
_PAGES_CACHED: Final = 8
# Pages whose ids are looked up together; a few at once take as long as one.
_PAGES_AT_ONCE: Final = 64


class PackReader:
    """A BackupReader. `found_damage` is told of every blob that is there but wrong."""

    def __init__(self, manifest: Manifest, packs: Packs, found_damage: Callable[[DamagedBlob], None]) -> None:
        """Raises DataCorrupt when the upper pages of the index are missing or damaged, and DeviceError."""
        self._manifest = manifest
        self._packs = packs
        self._found_damage = found_damage
        self._lock = threading.Lock()
        self._pages: OrderedDict[int, bytes] = OrderedDict()
        self.chunk_count = -(-manifest.record.origin.size // manifest.chunk_size)
        self.upper_ids: list[ChunkId] = []  # of the pages above the lowest
        self._page_ids = load_ids(manifest.root, count=page_count(self.chunk_count), load=self._load_upper)

    @property
    def record(self) -> BackupRecord:
        return self._manifest.record

    @property
    def chunk_size(self) -> int:
        return self._manifest.chunk_size

    @property
    def page_ids(self) -> bytearray:
        """The ids of the lowest pages. The caller leaves them as they are."""
        return self._page_ids

    def data_chunks(self, first: int = 0) -> Iterator[int]:
        for page_index in self._data_pages():
            if (page_index + 1) * IDS_PER_PAGE <= first:
                continue
            rows = np.frombuffer(self.page(page_index), np.uint8).reshape(-1, ID_SIZE)
            for slot in np.flatnonzero(rows.any(axis=1)).tolist():
                index = page_index * IDS_PER_PAGE + slot
                if index >= first:
                    yield index

    def chunk_id(self, index: int) -> ChunkId:
        page_index, slot = divmod(index, IDS_PER_PAGE)
        if self._page_id(page_index) == ZERO_ID:
            return ZERO_ID
        return ChunkId(self.page(page_index)[slot * ID_SIZE : (slot + 1) * ID_SIZE])

    def read_chunk(self, index: int) -> bytes | None:
        assert 0 <= index < self.chunk_count
        chunk = self.chunk_id(index)
        if chunk == ZERO_ID:
            return None
        return self._checked(index, self._read(chunk, BlobKind.CHUNK, f"chunk {index}"))

    def read_chunks(self, indices: range) -> list[bytes | None]:
        chunks = [self.chunk_id(index) for index in indices]
        wanted = [chunk for chunk in chunks if chunk != ZERO_ID]
        try:
            found = iter(self._packs.read_many(wanted, BlobKind.CHUNK))
        except DataCorrupt:
            # One by one, to tell which it is.
            return [self.read_chunk(index) for index in indices]
        return [
            None if chunk == ZERO_ID else self._checked(index, next(found))
            for index, chunk in zip(indices, chunks, strict=True)
        ]

    def _checked(self, index: int, data: bytes) -> bytes:
        if len(data) != min(self.chunk_size, self.record.origin.size - index * self.chunk_size):
            raise self._corrupt(f"chunk {index}", "has an impossible length")
        return data

    def missing_chunks(self) -> Iterator[int]:
        """The indices of chunks that are not in the repository. Raises DataCorrupt for a page that cannot be read."""
        pages = self._data_pages()
        while some := list(islice(pages, _PAGES_AT_ONCE)):
            # Only the last page of all may be shorter than the others.
            ids = b"".join(map(self.page, some))
            rows = np.frombuffer(ids, np.uint8).reshape(-1, ID_SIZE)
            gone = is_missing(self._packs.index.find_all(ids)) & rows.any(axis=1)
            for position in np.flatnonzero(gone).tolist():
                yield some[position // IDS_PER_PAGE] * IDS_PER_PAGE + position % IDS_PER_PAGE

    def check_frame(self) -> None:
        for index in self.missing_chunks():
            raise self._corrupt(f"chunk {index}", "is missing")

    def close(self) -> None:
        """Nothing is held."""

    def page(self, page_index: int) -> bytes:
        """The ids of one lowest page. Raises DataCorrupt."""
        with self._lock:
            page = self._pages.get(page_index)
            if page is not None:
                self._pages.move_to_end(page_index)
                return page
        count = min(IDS_PER_PAGE, self.chunk_count - page_index * IDS_PER_PAGE)
        chunk = self._page_id(page_index)
        page = bytes(count * ID_SIZE) if chunk == ZERO_ID else self._load_page(chunk)
        try:
            check_page(page, count=count)
        except DataCorrupt as error:
            raise self._corrupt(f"page {page_index} of the index", str(error)) from None
        with self._lock:
            self._pages[page_index] = page
            if len(self._pages) > _PAGES_CACHED:
                self._pages.popitem(last=False)
        return page

    def _data_pages(self) -> Iterator[int]:
        for page_index in range(page_count(self.chunk_count)):
            if self._page_id(page_index) != ZERO_ID:
                yield page_index

    def _page_id(self, page_index: int) -> ChunkId:
        return ChunkId(bytes(self._page_ids[page_index * ID_SIZE : (page_index + 1) * ID_SIZE]))

    def _load_upper(self, chunk: ChunkId) -> bytes:
        self.upper_ids.append(chunk)
        return self._load_page(chunk)

    def _load_page(self, chunk: ChunkId) -> bytes:
        return self._read(chunk, BlobKind.PAGE, "a page of the index")

    def _read(self, chunk: ChunkId, kind: BlobKind, what: str) -> bytes:
        try:
            return self._packs.read(chunk, kind)
        except DamagedBlob as error:
            self._found_damage(error)
            raise self._corrupt(what, str(error)) from None
        except DataCorrupt as error:
            raise self._corrupt(what, str(error)) from None

    def _corrupt(self, what: str, detail: str) -> DataCorrupt:
        return DataCorrupt(f"backup {self.record.id} is damaged: {what}: {detail}")
