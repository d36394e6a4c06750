"""The repository: manifests over packs. Format: README.md.

Invariants:
- A backup exists if and only if its manifest does. The manifest is made, if absent, when everything it speaks of is
  durable; it never changes. There is no other commit point and no database.
- One process at a time has it open, so what is in the making when it is opened is left over from a crash.
- The index is a cache: it is made to agree with the packs that are there whenever the repository is opened.
- Only names that pass `parse_backup_id` become names of manifests and notes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from typing import Final

from stillpoint.errors import (
    AlreadyExists,
    DataCorrupt,
    DeviceError,
    InvalidRequest,
    NotFound,
    Refused,
    StillpointError,
)
from stillpoint.extents import Extent

from .accounting import usage
from .backup_id import BackupId, new_backup_id, parse_backup_id
from .blobs import BlobHeader
from .check import check, check_pack
from .collection import Collection
from .folder import FORMAT_FILE
from .format import Format
from .interface import BackupRecord, CheckReport, CollectionReport, Listing, Origin, Partial, Region, Usage
from .keys import recovery_form
from .manifest import NOTED, Manifest
from .manifests import MANIFESTS, end_deletion, list_manifests, manifest_ids, read_manifest
from .notes import Note, Notes
from .packs import DamagedBlob, Packs
from .partials import Partials
from .reader import PackReader
from .storage import Storage
from .writer import Base, PackWriter, Session

logger = logging.getLogger(__name__)

CACHE: Final = "index-cache"
# Packs sealed before the cache is written again: what a crash costs is reading the headers of so many.
_CACHE_EVERY_PACKS: Final = 64
_CACHE_WRITE_BYTES: Final = 4 << 20


class PackRepository:
    """A Repository on a Storage. Made by `opening.py`."""

    def __init__(
        self,
        storage: Storage,
        format_: Format,
        packs: Packs,
        notes: Notes,
        *,
        level: int,
        threads: int,
        clock: Callable[[], int],
    ) -> None:
        self.storage = storage
        self.packs = packs
        self._format = format_
        self.notes = notes
        self._level = level
        self._clock = clock
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="repository")
        self.partials = Partials(storage, packs)
        self._in_the_making: set[BackupId] = set()
        self._collection = Collection(self)
        packs.quarantine_changed = self._note_quarantine
        self._cached_packs = packs.sealed_count

    @property
    def description(self) -> str:
        return self.storage.description

    @property
    def uuid(self) -> str:
        return self._format.uuid

    @property
    def recovery_form(self) -> str | None:
        """What opens it when every passphrase is lost; None when it is not encrypted."""
        keys = self._format.keys
        return recovery_form(keys.secret) if keys.cipher is not None else None

    async def begin(self, origin: Origin, *, resume: bool = False) -> PackWriter:
        if origin.size <= 0:
            raise InvalidRequest(f"volume {origin.volume} has {origin.size} bytes; there is nothing to back up")
        session = Session()
        self._collection.began(session)
        try:
            # After whatever quarantine is under way.
            await self._in_pack_thread(lambda: None)
            base = await asyncio.to_thread(self._open_base, origin, resume=resume)
        except BaseException:
            self._collection.ended(session)
            raise
        backup = await asyncio.to_thread(self._fresh_id, origin.volume)

        def ended() -> None:
            self._collection.ended(session)
            self._in_the_making.discard(backup)

        return PackWriter(
            backup,
            origin,
            self.packs,
            session,
            base=base,
            create=self._create_manifest,
            note=self.partials.put,
            ended=ended,
            chunk_size=self._format.chunk_size,
            level=self._level,
            executor=self._executor,
            clock=self._clock,
        )

    async def list(self, volume: str | None = None) -> Listing:
        return await asyncio.to_thread(self._list, volume)

    async def get(self, backup: BackupId) -> BackupRecord:
        return await asyncio.to_thread(lambda: self.manifest(backup).record)

    def open(self, backup: BackupId) -> PackReader:
        manifest = self.manifest(backup)
        try:
            return PackReader(manifest, self.packs, self.quarantine)
        except DataCorrupt:
            self.manifest(backup)  # NotFound when it was deleted meanwhile
            raise

    async def partial(self, volume: str) -> Partial | None:
        return await asyncio.to_thread(self.partials.get, volume)

    async def forget_partial(self, volume: str) -> None:
        await asyncio.to_thread(self.partials.delete, volume)

    async def partial_volumes(self) -> Sequence[str]:
        return await asyncio.to_thread(self.partials.volumes)

    async def delete(self, backup: BackupId) -> None:
        await asyncio.to_thread(self._delete, backup)

    async def record_verified(self, backup: BackupId, verified_ns: int) -> None:
        await asyncio.to_thread(self._change_note, backup, verified_ns=verified_ns)

    async def record_tested(self, backup: BackupId, tested_ns: int, error: str) -> None:
        await asyncio.to_thread(self._change_note, backup, tested_ns=tested_ns, test_error=error)

    async def protect(self, backup: BackupId, protected: bool) -> None:
        """A protected backup is not deleted, by hand or by a policy. Durable on return. Raises NotFound."""
        await asyncio.to_thread(self._change_note, backup, protected=protected)

    async def usage(self, backup: BackupId) -> Usage:
        return await asyncio.to_thread(usage, self, backup)

    async def collect(self, *, fence: bool = False, dry_run: bool = False) -> CollectionReport:
        """Give back the space of what no backup needs. See `collection.py`."""
        report = await self._collection.run(fence=fence, dry_run=dry_run)
        if not dry_run:
            await self._in_pack_thread(self._write_cache)
        return report

    async def check(
        self,
        executor: Executor,
        *,
        deep: bool,
        report: Callable[[int, int], None] = lambda done, total: None,
        budget_s: float | None = None,
    ) -> CheckReport:
        """Prove every pack and every index. See `check.py`."""
        return await check(self, executor, deep=deep, report=report, budget_s=budget_s, clock=self._clock)

    async def lose(self, pack: str, right: Mapping[int, BlobHeader]) -> int:
        """Of a damaged pack only these blobs are there. Returns how many others count as missing. Durable on return."""

        def work() -> int:
            lost = self.packs.lose(pack, right)
            if lost:
                self._note_quarantine()
            return lost

        return await asyncio.get_running_loop().run_in_executor(self.packs.thread, work)

    async def probe(self) -> None:
        await asyncio.to_thread(self.storage.read, FORMAT_FILE)

    @property
    def quarantined_count(self) -> int:
        return len(self.packs.quarantined)

    async def stored_bytes(self) -> int:
        return await asyncio.to_thread(self.storage.total_bytes)

    async def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._close)

    def gone(self) -> set[BackupId]:
        """Backups whose manifests have vanished although nobody deleted them."""
        # In this order, what is committed or deleted meanwhile is not taken for gone.
        noted = self.notes.backups()
        vanished = set(noted).difference(self.ids())
        return {each for each in vanished if (note := self.notes.find(each)) is not None and not note.deleting}

    def ids(self) -> Iterator[BackupId]:
        """Of all backups, those whose manifests are damaged included."""
        return manifest_ids(self.storage)

    def manifest(self, backup: BackupId) -> Manifest:
        """Raises NotFound, DataCorrupt, DeviceError."""
        manifest = read_manifest(self.storage, backup, self.packs.keys)
        note = self.notes.get(backup)
        record = replace(manifest.record, **{name: getattr(note, name) for name in NOTED})
        return replace(manifest, record=record)

    def quarantine(self, damaged: DamagedBlob) -> None:
        """Any thread. Durable when the pack thread has done it."""
        logger.error("a damaged blob counts as missing from now on: %s", damaged)

        def work() -> None:
            self.packs.quarantine(damaged)
            # Damage seldom comes alone, and what is not known to be damaged is deduplicated against.
            with contextlib.suppress(StillpointError):
                self.packs.lose_gone()
                right = check_pack(self, damaged.pack, deep=False)
                if right is not None:
                    self.packs.lose(damaged.pack, right)
            self._note_quarantine()

        with contextlib.suppress(RuntimeError):  # it is closing
            self.packs.thread.submit(work)

    def _note_quarantine(self) -> None:
        try:
            self.notes.put_quarantined(self.packs.quarantined)
        except StillpointError as error:
            logger.warning("the quarantine cannot be noted: %s", error)

    def _fresh_id(self, volume: str) -> BackupId:
        """That no backup has, nor another writer; they differ in a second and four digits only."""
        while True:
            backup = new_backup_id(volume, self._clock())
            if backup not in self._in_the_making and not self.storage.exists(f"{MANIFESTS}/{backup}"):
                self._in_the_making.add(backup)
                return backup

    def _open_base(self, origin: Origin, *, resume: bool) -> Base:
        if resume:
            base, regions = self.partials.open(origin.volume)
        elif origin.base is not None:
            base = self.open(origin.base)
            regions = (Region(origin.size, base.record.origin.incarnation, base.record.origin.generation),)
        else:
            return Base(None, (Region(origin.size, "", 0),), [])
        if base.record.origin.size != origin.size or base.chunk_size != self._format.chunk_size:
            raise DataCorrupt(f"backup {base.record.id} is of another size; it cannot be a base")
        if not self.packs.may_miss:
            return Base(base, regions, [])
        size = base.chunk_size
        missing = [Extent(index * size, min(size, origin.size - index * size)) for index in base.missing_chunks()]
        return Base(base, regions, missing)

    def _create_manifest(self, manifest: Manifest) -> None:
        """In the pack thread. Raises DeviceError."""
        name = f"{MANIFESTS}/{manifest.record.id}"
        try:
            self.storage.create(name, manifest.encode(self.packs.keys.manifest, self.packs.keys.cipher))
        except AlreadyExists:
            raise DeviceError(f"{name}: another backup has this id; start it again", 17) from None
        # The backup is there now; what fails from here on is made good when the repository is opened.
        with contextlib.suppress(StillpointError):
            self.notes.put(manifest.record.id, Note())
        with contextlib.suppress(StillpointError):  # it is older than the backup, so nobody begins with it
            self.partials.delete(manifest.record.origin.volume)
        if self.packs.sealed_count - self._cached_packs >= _CACHE_EVERY_PACKS:
            self._write_cache()

    def _list(self, volume: str | None) -> Listing:
        listing = list_manifests(self.storage, self.manifest)
        listing = replace(listing, damaged=[*listing.damaged, *sorted(self.gone())])
        return replace(listing, backups=[each for each in listing.backups if volume in (None, each.origin.volume)])

    def _delete(self, backup: BackupId) -> None:
        name = parse_backup_id(backup)
        note = self.notes.find(backup)
        if note is None and not self.storage.exists(f"{MANIFESTS}/{name}"):
            raise NotFound(f"there is no backup {backup}")
        note = note or Note()
        if note.protected:
            raise Refused(f"backup {backup} is protected; take the protection away first")
        self.notes.put(backup, replace(note, deleting=True))
        end_deletion(self.storage, self.notes, name)

    def _change_note(self, backup: BackupId, **change: int | bool | str) -> None:
        self.manifest(backup)
        self.notes.put(backup, replace(self.notes.get(backup), **change))  # type: ignore[arg-type]

    def _close(self) -> None:
        self.packs.close()
        if self.packs.sealed_count != self._cached_packs:
            self._write_cache()
        self.storage.close()

    def _write_cache(self) -> None:
        """In the pack thread, or when that has ended."""
        try:
            self.packs.index.merge()
            upload = self.storage.upload("", name=CACHE)
            try:
                parts: list[bytes] = []
                for part in self.packs.index.dump():
                    parts.append(part)
                    if sum(map(len, parts)) >= _CACHE_WRITE_BYTES:
                        upload.append(parts)
                        parts = []
                upload.append(parts)
                upload.finish(CACHE)
            finally:
                upload.abort()
            self._cached_packs = self.packs.sealed_count
        except StillpointError as error:
            logger.warning("the cache of the index cannot be written; it will be made anew: %s", error)

    async def _in_pack_thread(self, call: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self.packs.thread, call)
