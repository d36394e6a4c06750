"""The way of a backup into the repository: chunked here, hashed and compressed in worker threads, packed in order.

Invariants:
- The manifest is made last, when every pack that holds something of the backup is durable.
- The index starts as the base's. What was given is put in its place, in ascending order, so one page is held at a time.
- What is under way is bounded, whatever the volume's size.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Final, NamedTuple, TypeVar

from stillpoint.errors import Refused
from stillpoint.extents import Extent

from .backup_id import BackupId
from .blobs import ID_SIZE, ZERO_ID, Blob, BlobKind, ChunkId, encode, id_of
from .chunking import UNCHANGED, Chunk, Chunker, Zeroes
from .interface import BackupReader, BackupRecord, Origin, Region
from .manifest import Manifest
from .packs import OpenPack, Packs
from .reader import PackReader
from .tree import IDS_PER_PAGE, page_count, store_ids

# Chunks that are handed to a thread together: below this, the hand-over costs more than it brings.
_BATCH_BYTES: Final = 1 << 20
# Being hashed, compressed or written.
_IN_FLIGHT_BYTES: Final = 16 << 20
# Things to do in one batch, when they have few bytes or none.
_BATCH_COUNT: Final = 64

T = TypeVar("T")


class Encoded(NamedTuple):
    """A chunk's index and id, and its blob, unless the repository had it already."""

    number: int
    id: ChunkId
    length: int
    blob: Blob | None


class Base(NamedTuple):
    """What a backup begins with. missing: where its chunks are lost."""

    reader: PackReader | None
    regions: tuple[Region, ...]
    missing: Sequence[Extent]


class Session:
    """A writer as a collection sees it, from before it looks at its base."""

    def __init__(self) -> None:
        self.fenced = False  # its commit is refused. Changed in the pack thread, or by its own writer


class PackWriter:
    """A BackupWriter. `create` makes the manifest; `ended` is called once, whatever the end."""

    def __init__(
        self,
        backup: BackupId,
        origin: Origin,
        packs: Packs,
        session: Session,
        *,
        base: Base,
        create: Callable[[Manifest], None],
        note: Callable[[Manifest, tuple[Region, ...]], None],
        ended: Callable[[], None],
        chunk_size: int,
        level: int,
        executor: Executor,
        clock: Callable[[], int],
    ) -> None:
        self._id = backup
        self._origin = origin
        self._packs = packs
        self._session = session
        self._base = base.reader
        self._regions = base.regions
        self._missing = base.missing
        self._create = create
        self._note = note
        self._end = ended
        self._chunk_size = chunk_size
        self._level = level
        self._executor = executor
        self._clock = clock
        self._started_ns = time.monotonic_ns()
        self._chunker = Chunker(size=origin.size, chunk_size=chunk_size)
        self._batch: list[Chunk | Zeroes] = []
        self._batch_bytes = 0
        self._under_way: deque[tuple[int, asyncio.Future[list[Encoded | Zeroes]]]] = deque()
        self._under_way_bytes = 0
        self._relied: set[OpenPack] = set()
        self._stored_bytes = 0
        self._ended = False
        self._index = _IndexInTheMaking(-(-origin.size // chunk_size), base.reader)
        self._data_bytes = 0 if base.reader is None else base.reader.record.data_bytes

    @property
    def id(self) -> BackupId:
        return self._id

    @property
    def position(self) -> int:
        return self._chunker.position

    @property
    def stored_bytes(self) -> int:
        return self._stored_bytes

    @property
    def base(self) -> BackupReader | None:
        return self._base

    @property
    def regions(self) -> tuple[Region, ...]:
        return self._regions

    @property
    def missing(self) -> Sequence[Extent]:
        return self._missing

    async def write(self, data: bytes | memoryview) -> None:
        assert not self._ended
        for each in self._chunker.data(data):
            await self._add(each)

    async def hole(self, length: int) -> None:
        assert not self._ended
        for each in self._chunker.other(length, None):
            await self._add(each)

    async def unchanged(self, length: int) -> None:
        assert not self._ended and self._base is not None
        for each in self._chunker.other(length, UNCHANGED):
            await self._add(each)

    async def checkpoint(self) -> None:
        assert not self._ended
        position = self._chunker.boundary
        root = await self._settle(self._index_so_far)
        here = Region(position, self._origin.incarnation, self._origin.generation)
        regions = (here, *(region for region in self._regions if region.end > position))
        manifest = Manifest(self._record(received_bytes=0, alarm=""), self._chunk_size, root)
        # For the reason that the manifest is made there.
        await self._in_pack_thread(lambda: self._unless_fenced(partial(self._note, manifest, regions)))

    async def commit(self, *, received_bytes: int, alarm: str = "") -> BackupRecord:
        assert not self._ended
        assert self.position == self._origin.size, "a backup is committed before all of the volume was given"
        root = await self._settle(self._finish_index)
        record = self._record(received_bytes=received_bytes, alarm=alarm)
        manifest = Manifest(record, self._chunk_size, root)
        # In the thread that collections condemn packs in, so that none comes between the look at the fence and this.
        await self._in_pack_thread(lambda: self._unless_fenced(partial(self._create, manifest)))
        self._ended = True
        self._end()
        return record

    async def abort(self) -> None:
        """Leaves what was stored: the next backup finds it again, or a collection takes it away."""
        if self._ended:
            return
        self._ended = True
        self._session.fenced = True  # a commit that was cancelled may still be on its way to the pack thread
        for _, future in self._under_way:
            future.cancel()
        self._end()

    async def _settle(self, finish: Callable[[], ChunkId]) -> ChunkId:
        """Make all that was given durable. Returns what `finish` makes of the index."""
        self._encode_batch()
        while self._under_way:
            await self._take_oldest()
        root = await self._in_pack_thread(finish)
        await self._in_pack_thread(self._packs.seal)
        while self._relied:
            pack = next(iter(self._relied))
            await pack.durable()
            self._relied.discard(pack)
        return root

    def _record(self, *, received_bytes: int, alarm: str) -> BackupRecord:
        return BackupRecord(
            id=self._id,
            origin=self._origin,
            finished_ns=self._clock(),
            duration_ns=time.monotonic_ns() - self._started_ns,
            data_bytes=self._data_bytes,
            stored_bytes=self._stored_bytes,
            received_bytes=received_bytes,
            alarm=alarm,
        )

    def _unless_fenced(self, call: Callable[[], None]) -> None:
        if self._session.fenced:
            raise Refused(f"backup {self._id} was fenced by a collection, or given up; start it again")
        call()

    async def _add(self, each: Chunk | Zeroes) -> None:
        self._batch.append(each)
        self._batch_bytes += each.length if isinstance(each, Chunk) else 0
        if self._batch_bytes < _BATCH_BYTES and len(self._batch) < _BATCH_COUNT:
            return
        self._encode_batch()
        # In order, as soon as they are ready; waiting only when too much is under way.
        while self._under_way and (self._under_way_bytes > _IN_FLIGHT_BYTES or self._under_way[0][1].done()):
            await self._take_oldest()

    def _encode_batch(self) -> None:
        if not self._batch:
            return
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._executor, self._encode_all, self._batch)
        self._under_way.append((self._batch_bytes, future))
        self._under_way_bytes += self._batch_bytes
        self._batch, self._batch_bytes = [], 0

    def _encode_all(self, batch: Sequence[Chunk | Zeroes]) -> list[Encoded | Zeroes]:
        return [self._encode(each) if isinstance(each, Chunk) else each for each in batch]

    def _encode(self, chunk: Chunk) -> Encoded:
        base = None
        if chunk.needs_base:
            assert self._base is not None
            base = self._base.read_chunk(chunk.index)
        data = chunk.compose(base)
        identity = id_of(BlobKind.CHUNK, data, self._packs.keys)
        if identity == ZERO_ID or self._packs.has(identity):
            return Encoded(chunk.index, identity, len(data), None)
        blob = encode(BlobKind.CHUNK, identity, data, self._packs.keys, level=self._level)
        return Encoded(chunk.index, identity, len(data), blob)

    async def _take_oldest(self) -> None:
        size, future = self._under_way[0]
        encoded = await future
        await self._in_pack_thread(lambda: self._place(encoded))
        self._under_way.popleft()
        self._under_way_bytes -= size

    def _place(self, batch: Sequence[Encoded | Zeroes]) -> None:
        """In the pack thread."""
        self._store([each.blob for each in batch if isinstance(each, Encoded) and each.blob is not None])
        known = [each.id for each in batch if isinstance(each, Encoded) and each.blob is None and each.id != ZERO_ID]
        self._relied |= self._packs.relies_on(known)
        for each in batch:
            if isinstance(each, Zeroes):
                self._put_zeroes(each)
            else:
                self._put(each.number, each.id, each.length)

    def _put_zeroes(self, zeroes: Zeroes) -> None:
        for index in self._index.data_chunks(zeroes.first, zeroes.first + zeroes.count):
            self._put(index, ZERO_ID, 0)

    def _put(self, index: int, identity: ChunkId, length: int) -> None:
        page_index, slot = divmod(index, IDS_PER_PAGE)
        if page_index != self._index.page_index:
            self._finish_page()
            self._index.open_page(page_index)
        before = self._index.put(slot, identity)
        if before != ZERO_ID:
            self._data_bytes -= min(self._chunk_size, self._origin.size - index * self._chunk_size)
        self._data_bytes += length if identity != ZERO_ID else 0

    def _finish_page(self) -> None:
        self._index.close_page(self._store_page)

    def _store_page(self, page: bytes) -> ChunkId:
        identity = id_of(BlobKind.PAGE, page, self._packs.keys)
        if identity != ZERO_ID:
            if self._packs.has(identity):
                self._relied |= self._packs.relies_on([identity])
            else:
                self._store([encode(BlobKind.PAGE, identity, page, self._packs.keys, level=self._level)])
        return identity

    def _store(self, blobs: Sequence[Blob]) -> None:
        if blobs:
            added, relied = self._packs.add(blobs)
            self._stored_bytes += added
            self._relied |= relied

    def _index_so_far(self) -> ChunkId:
        return store_ids(self._index.ids_so_far(self._store_page), self._store_page)

    def _finish_index(self) -> ChunkId:
        self._finish_page()
        return store_ids(self._index.page_ids, self._store_page)

    async def _in_pack_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._packs.thread, call)


class _IndexInTheMaking:
    """The lowest pages: their ids, and the one page that is being changed."""

    def __init__(self, chunk_count: int, base: PackReader | None) -> None:
        self._chunk_count = chunk_count
        self._base = base
        self.page_ids = bytearray(page_count(chunk_count) * ID_SIZE)
        self.page_index = -1
        self._page = bytearray()
        if base is not None:
            assert base.chunk_count == chunk_count, "a base of another size"
            self.page_ids[:] = base.page_ids

    def open_page(self, page_index: int) -> None:
        self.page_index = page_index
        self._page = self._load(page_index)

    def put(self, slot: int, identity: ChunkId) -> ChunkId:
        """Returns what was there."""
        start = slot * ID_SIZE
        before = ChunkId(bytes(self._page[start : start + ID_SIZE]))
        self._page[start : start + ID_SIZE] = identity
        return before

    def close_page(self, store: Callable[[bytes], ChunkId]) -> None:
        if self.page_index >= 0:
            start = self.page_index * ID_SIZE
            self.page_ids[start : start + ID_SIZE] = store(bytes(self._page))
            self.page_index = -1

    def ids_so_far(self, store: Callable[[bytes], ChunkId]) -> bytearray:
        """Of the lowest pages, the one that is being changed as it is now."""
        ids = bytearray(self.page_ids)
        if self.page_index >= 0:
            start = self.page_index * ID_SIZE
            ids[start : start + ID_SIZE] = store(bytes(self._page))
        return ids

    def data_chunks(self, first: int, end: int) -> list[int]:
        """The chunks from `first` to before `end` that are not zeroes in the base. Quick over pages of zeroes."""
        found: list[int] = []
        for page_index in range(first // IDS_PER_PAGE, page_count(end)):
            start = page_index * ID_SIZE
            open_ = page_index == self.page_index
            if not open_ and not any(self.page_ids[start : start + ID_SIZE]):
                continue
            page = self._page if open_ else self._load(page_index)
            low, high = max(first, page_index * IDS_PER_PAGE), min(end, (page_index + 1) * IDS_PER_PAGE)
            for index in range(low, high):
                at = index % IDS_PER_PAGE * ID_SIZE
                if any(page[at : at + ID_SIZE]):
                    found.append(index)
        return found

    def _load(self, page_index: int) -> bytearray:
        count = min(IDS_PER_PAGE, self._chunk_count - page_index * IDS_PER_PAGE)
        return bytearray(count * ID_SIZE) if self._base is None else bytearray(self._base.page(page_index))
