"""Packs: files of 32 MiB and a little more, full of blobs, named by their own hash. Format: README.md, "Pack".

Invariants:
- All writers share the pack in the making, so two backups that run at once never store a chunk twice.
- What `add` said is stored is durable once the pack it lies in is sealed; `seal` waits for that. A manifest is made
  after it (`writer.py`).
- A pack that cannot be written takes everything it holds out of the index, and every writer that relied on it fails.
- All changes are made in the one thread of `thread`.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from blake3 import blake3

from stillpoint.errors import DataCorrupt, NotFound, StillpointError

from .blobs import BLOB_HEADER_SIZE, BLOB_MAGIC, Blob, BlobHeader, BlobKind, ChunkId, decode, decode_header
from .chunking import Piece
from .index import ChunkIndex, Location
from .keys import Keys
from .storage import Storage, Upload

logger = logging.getLogger(__name__)

FOLDER: Final = "packs"
PACK_SIZE: Final = 32 << 20
_HEAD: Final = struct.Struct("<4sIQ")
_CRC: Final = struct.Struct("<I")
_MAGIC: Final = b"SPPK"
VERSION: Final = 2
PACK_HEADER_SIZE: Final = _HEAD.size + _CRC.size
PACK_HEADER: Final = _HEAD.pack(_MAGIC, VERSION, 0) + _CRC.pack(zlib.crc32(_HEAD.pack(_MAGIC, VERSION, 0)))
# Packs being made durable while the next one fills.
_SEALING_MAX: Final = 2
_THREAD_NAME: Final = "packs"


class OpenPack:
    """A pack in the making. `sealed` is done when it is durable, or with the error that ended it."""

    def __init__(self, number: int, upload: Upload) -> None:
        self.number = number
        self.sealed: Future[None] = Future()
        self.ids: list[ChunkId] = []
        self.size = PACK_HEADER_SIZE
        self._upload = upload
        self._hash = blake3(PACK_HEADER)
        upload.append([PACK_HEADER])

    def append(self, blobs: Sequence[Blob]) -> None:
        buffers: list[Piece] = []
        for blob in blobs:
            buffers += (blob.header, blob.stored)
            self._hash.update(blob.header)
            self._hash.update(blob.stored)
            self.size += blob.size
            self.ids.append(blob.id)
        self._upload.append(buffers)

    def finish(self) -> str:
        name: str = self._hash.hexdigest()
        self._upload.finish(f"{FOLDER}/{name}")
        return name

    def abort(self) -> None:
        self._upload.abort()

    async def durable(self) -> None:
        """Wait until it is. Raises DeviceError."""
        # Shielded: whoever gives up waiting must not cancel `sealed`, which other writers wait for and the sealer sets.
        await asyncio.shield(asyncio.wrap_future(self.sealed))


class Packs:
    """The blobs of a repository, by id."""

    def __init__(self, storage: Storage, index: ChunkIndex, keys: Keys, *, pack_size: int = PACK_SIZE) -> None:
        self.index = index
        self.keys = keys
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=_THREAD_NAME)
        # Locations whose blob was found damaged: (name of the pack, offset).
        self.quarantined: set[tuple[str, int]] = set()
        self.quarantine_changed: Callable[[], None] = lambda: None  # makes it durable
        # Whether something that backups name may be missing: then a base is looked through before it is built on.
        self.may_miss = False
        # Numbers of packs that are about to be deleted: what lies there is stored anew when it is wanted again.
        self.condemned: frozenset[int] = frozenset()
        self._storage = storage
        self._pack_size = pack_size
        self._open: OpenPack | None = None
        self._unsealed: dict[int, OpenPack] = {}
        self._sealer = ThreadPoolExecutor(1, thread_name_prefix="seal")
        self.sealed_count = 0

    def has(self, chunk: ChunkId) -> bool:
        """Whether a writer need not store it."""
        location = self.index.find(chunk)
        return location is not None and location.pack not in self.condemned

    def read(self, chunk: ChunkId, kind: BlobKind) -> bytes:
        """Any thread. Raises DataCorrupt when it is missing or damaged, and DeviceError."""
        for attempt in (0, 1):
            location = self.index.find(chunk)
            if location is None:
                raise DataCorrupt(f"{kind.name.lower()} {chunk.hex()[:16]} is missing")
            self._wait_until_sealed(location.pack)
            name = self.index.pack_name(location.pack)
            try:
                data = self._storage.read(f"{FOLDER}/{name}", offset=location.offset, length=location.size)
            except NotFound:
                # A collection may have moved it between the two calls.
                if attempt:
                    raise DamagedBlob(
                        f"{kind.name.lower()} {chunk.hex()[:16]}: pack {name[:16]} is missing",
                        chunk=chunk,
                        pack=name,
                        offset=location.offset,
                    ) from None
                continue
            try:
                return decode(data, kind, chunk, self.keys)
            except DataCorrupt as error:
                raise DamagedBlob(
                    f"{kind.name.lower()} {chunk.hex()[:16]}: {error}", chunk=chunk, pack=name, offset=location.offset
                ) from None
        raise AssertionError("unreachable")

    def read_many(self, chunks: Sequence[ChunkId], kind: BlobKind) -> list[bytes]:
        """`read` of each of them. Neighbours in a pack are read at once, as backups read in order mostly are."""
        result: list[bytes] = []
        for run in _neighbours([self.index.find(chunk) for chunk in chunks]):
            wanted = chunks[len(result) : len(result) + len(run)]
            try:
                result += self._read_run(run, wanted, kind)
            except (DataCorrupt, NotFound):
                # One by one, to tell which is wrong and to give back the others.
                result += [self.read(chunk, kind) for chunk in wanted]
        return result

    def _read_run(self, run: Sequence[Location | None], chunks: Sequence[ChunkId], kind: BlobKind) -> list[bytes]:
        first, last = run[0], run[-1]
        if first is None or last is None or first.pack in self._unsealed:
            raise NotFound("not in a sealed pack")
        name = self.index.pack_name(first.pack)
        length = last.offset + last.size - first.offset
        data = memoryview(self._storage.read(f"{FOLDER}/{name}", offset=first.offset, length=length))
        return [
            decode(data[place.offset - first.offset :], kind, chunk, self.keys)
            for place, chunk in zip(run, chunks, strict=True)
            if place is not None
        ]

    def _wait_until_sealed(self, number: int) -> None:
        pack = self._unsealed.get(number)
        if pack is not None:
            if threading.current_thread().name.startswith(_THREAD_NAME):
                self.seal()
            else:
                self.thread.submit(self.seal)
            pack.sealed.exception()

    # What follows runs in `thread`.

    def add(self, blobs: Sequence[Blob]) -> tuple[int, set[OpenPack]]:
        """Store what is not stored yet. Returns the bytes added, and the packs that must be sealed before a commit.

        Raises DeviceError.
        """
        added = 0
        relied: set[OpenPack] = set()
        run: list[Blob] = []
        for blob in blobs:
            location = self.index.find(blob.id)
            if location is not None and location.pack not in self.condemned:
                if location.pack in self._unsealed:
                    relied.add(self._unsealed[location.pack])
                continue
            pack = self._open if self._open is not None else self._begin()
            offset = pack.size + sum(each.size for each in run)
            self.index.add(blob.id, Location(pack.number, offset, blob.size))
            relied.add(pack)
            run.append(blob)
            added += blob.size
            if offset + blob.size >= self._pack_size:
                self._append(pack, run)
                run = []
                self._seal_open()
        if run:
            assert self._open is not None
            self._append(self._open, run)
        return added, relied

    def relies_on(self, chunks: Sequence[ChunkId]) -> set[OpenPack]:
        """The packs in the making in which some of these lie."""
        locations = (self.index.find(chunk) for chunk in chunks) if self._unsealed else ()
        return {self._unsealed[each.pack] for each in locations if each is not None and each.pack in self._unsealed}

    def seal(self) -> None:
        """Begin to make durable what was added so far; the packs' `sealed` tell the end of it."""
        if self._open is not None:
            self._seal_open()

    def quarantine(self, damaged: DamagedBlob) -> None:
        """From now on it counts as missing, so that the next backup stores it anew."""
        location = self.index.find(damaged.chunk)
        self.may_miss = True
        self.quarantined.add((damaged.pack, damaged.offset))
        if location is not None and self.index.pack_name(location.pack) == damaged.pack:
            self.index.remove(damaged.chunk)

    def lose(self, name: str, right: Mapping[int, BlobHeader]) -> int:
        """Of a damaged pack only these blobs, by their offsets, are there. Returns how many others count as missing."""
        number = self.index.pack_number(name)
        known = self.index.remove_at(number, frozenset())
        for offset, header in right.items():
            # Whole blobs may have changed places.
            if self.index.find(header.id) is None:
                self.index.add(header.id, Location(number, offset, header.blob_size))
        lost = set(known).difference(right)
        self.may_miss = True
        self.quarantined |= {(name, offset) for offset in lost}
        return len(lost)

    def lose_gone(self) -> dict[str, int]:
        """What lay in packs that are no longer there counts as missing. How many blobs those are, of each pack."""
        # In this order, and in this thread, every pack that is known was there when the folder was listed.
        known = self.index.pack_names - {self.index.pack_name(number) for number in self._unsealed}
        gone = known - set(self._storage.names(FOLDER))
        lost = {name: len(self.index.remove_at(self.index.pack_number(name), frozenset())) for name in sorted(gone)}
        self.index.remove_packs([self.index.pack_number(name) for name in gone])
        self.may_miss |= any(lost.values())
        return lost

    def close(self) -> None:
        self.thread.shutdown(wait=True)
        self._sealer.shutdown(wait=True)
        if self._open is not None:
            self._open.abort()
            for chunk in self._open.ids:
                self.index.remove(chunk)
            self.index.remove_packs([self._open.number])
            self._open = None

    def _begin(self) -> OpenPack:
        waiting = [pack.sealed for pack in self._unsealed.values()]
        while len(waiting) >= _SEALING_MAX:
            # A disk slower than the stream is waited for here, rather than in one long fsync at the end.
            waiting.pop(0).exception()
        upload = self._storage.upload(FOLDER)
        try:
            pack = OpenPack(self.index.pack_number(f"open {id(upload)}"), upload)
        except BaseException:
            upload.abort()
            raise
        self._open = self._unsealed[pack.number] = pack
        return pack

    def _append(self, pack: OpenPack, blobs: Sequence[Blob]) -> None:
        try:
            pack.append(blobs)
        except StillpointError as error:
            pack.ids += [blob.id for blob in blobs]
            self._failed(pack, error)
            raise

    def _seal_open(self) -> None:
        pack, self._open = self._open, None
        assert pack is not None

        def work() -> None:
            try:
                name = pack.finish()
            except StillpointError as error:
                # First, as the thread that may change the index may be waiting for just this.
                pack.sealed.set_exception(error)
                self._hand_over(lambda error=error: self._failed(pack, error))  # type: ignore[misc]
                return
            self.index.rename_pack(pack.number, name)
            healed = {each for each in self.quarantined if each[0] == name}
            if healed:
                # The same blobs in the same order, in the place of a pack that was damaged.
                self.quarantined -= healed
                self.quarantine_changed()
            self.sealed_count += 1
            self._unsealed.pop(pack.number, None)
            pack.sealed.set_result(None)

        self._sealer.submit(work)

    def _hand_over(self, call: Callable[[], None]) -> None:
        try:
            self.thread.submit(call)
        except RuntimeError:
            call()  # it is closing

    def _failed(self, pack: OpenPack, error: StillpointError) -> None:
        pack.abort()
        if self._open is pack:
            self._open = None
        self._unsealed.pop(pack.number, None)
        self.index.remove_packs([pack.number])
        if not pack.sealed.done():
            pack.sealed.set_exception(error)


def _neighbours(places: Sequence[Location | None]) -> Iterator[list[Location | None]]:
    """Runs of places that follow each other in one pack; each missing one alone."""
    run: list[Location | None] = []
    for place in places:
        last = run[-1] if run else None
        # Sizes are rounded up to a KiB.
        near = place and last and place.pack == last.pack and 0 <= last.offset + last.size - place.offset < 1024
        if run and not near:
            yield run
            run = []
        run.append(place)
    if run:
        yield run


class DamagedBlob(DataCorrupt):
    """A blob that is wrong, or gone with its pack."""

    def __init__(self, message: str, *, chunk: ChunkId, pack: str, offset: int) -> None:
        super().__init__(message)
        self.chunk = chunk
        self.pack = pack
        self.offset = offset


def scan(storage: Storage, name: str) -> Iterator[tuple[int, BlobHeader]]:
    """(offset, header) of every blob of a pack, read from the headers alone. After damage it goes on at the next one.

    Raises DeviceError.
    """
    path = f"{FOLDER}/{name}"
    if storage.requests_are_dear:
        whole = memoryview(storage.read(path))
        yield from scan_blobs(name, len(whole), lambda offset, length: whole[offset : offset + length])
    else:
        yield from scan_blobs(
            name, storage.size(path), lambda offset, length: storage.read(path, offset=offset, length=length)
        )


def scan_blobs(name: str, size: int, read: Callable[[int, int], Piece]) -> Iterator[tuple[int, BlobHeader]]:
    """`scan` of a pack of `size` bytes. read: bytes from an offset on, so many."""
    offset = PACK_HEADER_SIZE
    while offset < size:
        try:
            header = decode_header(read(offset, BLOB_HEADER_SIZE))
        except DataCorrupt:
            logger.warning("pack %s is damaged at byte %d; looking for the next blob", name, offset)
            rest = bytes(read(offset + 1, size - offset - 1))
            found = rest.find(BLOB_MAGIC)
            offset += 1 + (found if found >= 0 else len(rest))
            continue
        if offset + header.blob_size <= size:
            yield offset, header
        offset += header.blob_size


def reconcile(storage: Storage, index: ChunkIndex, quarantined: set[tuple[str, int]]) -> tuple[int, int]:
    """Make the index agree with the packs that are there. Returns how many of them had to be read, and were gone.

    quarantined: (pack, offset) of what counts as missing, also when an old cache knows it.

    Raises DeviceError.
    """
    index.merge()
    present = set(storage.names(FOLDER))
    gone = index.pack_names - present
    if gone:
        index.remove_packs([index.pack_number(name) for name in gone])
    index.remove_places(quarantined)
    unknown = sorted(present - index.pack_names)
    for name in unknown:
        number = index.pack_number(name)
        for offset, header in scan(storage, name):
            if (name, offset) not in quarantined and index.find(header.id) is None:
                index.add(header.id, Location(number, offset, header.blob_size))
    index.merge()
    return len(unknown), len(gone)
