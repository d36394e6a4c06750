"""Gives back the space of what no backup needs, while backups run. No clock decides anything.

The steps, and why a crash or a sleeping writer between any two of them loses nothing:
1. Mark: what every manifest names is live; all other packs, of those sealed so far, are condemned. From now on a writer
   that finds a chunk in a condemned pack stores it anew. A crash forgets the condemnation, and nothing was deleted.
2. Pack again: the live blobs of packs that are mostly dead are copied into a new pack, which is made durable; the old
   ones are condemned. A crash leaves both copies.
3. Wait: writers that began before the condemnation may rely on condemned chunks. While one of them is open, however
   long it sleeps, nothing is deleted: what is condemned is left for the next collection. `fence` instead ends them:
   their commit is refused, in the same thread that condemns, so it is either before or never.
4. Mark again: a backup that was committed meanwhile takes its packs out of the condemned.
5. Delete what is still condemned and not live. A crash leaves some of it, which the next collection takes.
Creating backups never waits for any of this.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from stillpoint.errors import DataCorrupt, NotFound

from .blobs import BLOB_HEADER_SIZE, Blob, check_stored
from .interface import CollectionReport
from .marks import Marks, named_ids
from .packs import FOLDER, OpenPack, scan
from .writer import Session

if TYPE_CHECKING:
    from .repository import PackRepository

logger = logging.getLogger(__name__)

# A pack of which less than this is live is packed again.
_LIVE_SHARE_MIN: Final = 0.5

T = TypeVar("T")


class Collection:
    """Of one repository. `began` and `ended` keep the account of the writers."""

    def __init__(self, repository: PackRepository) -> None:
        self._repository = repository
        self._packs = repository.packs
        self._sessions: dict[Session, int] = {}
        self._epoch = 0
        self._turn = asyncio.Lock()

    def began(self, session: Session) -> None:
        self._sessions[session] = self._epoch

    def ended(self, session: Session) -> None:
        self._sessions.pop(session, None)

    async def run(self, *, fence: bool, dry_run: bool) -> CollectionReport:
        """Raises DataCorrupt, with nothing deleted, when the index of a backup cannot be read, and DeviceError."""
        async with self._turn:
            return await self._run(fence=fence, dry_run=dry_run)

    async def _run(self, *, fence: bool, dry_run: bool) -> CollectionReport:
        sealed = await self._in_pack_thread(self._sealed_packs)
        live = (await self._mark()).bytes_by_pack()
        unreferenced = sum(size for number, size in sealed.items() if number not in live)
        if dry_run:
            return CollectionReport(unreferenced_bytes=unreferenced)
        # Those who begin from now on see what is condemned.
        condemned = {number for number, size in sealed.items() if live.get(number, 0) < size * _LIVE_SHARE_MIN}
        self._packs.condemned = frozenset(condemned)
        self._epoch += 1
        older = [session for session, epoch in self._sessions.items() if epoch < self._epoch]
        repacked = await self._repack([number for number in condemned if number in live])
        if older and fence:
            await self._in_pack_thread(lambda: _fence(older))
            older = []
        if older:
            # `condemned` stays, so that nobody comes to rely on it any more.
            size = sum(sealed[number] for number in condemned)
            return CollectionReport(
                repacked_bytes=repacked,
                pending_packs=len(condemned),
                pending_bytes=size,
                unreferenced_bytes=unreferenced,
            )
        still_live = (await self._mark()).bytes_by_pack()
        gone = [number for number in condemned if number not in still_live]
        await self._in_pack_thread(lambda: self._delete(gone))
        return CollectionReport(
            deleted_packs=len(gone),
            deleted_bytes=sum(sealed[number] for number in gone),
            repacked_bytes=repacked,
            unreferenced_bytes=unreferenced,
        )

    def _sealed_packs(self) -> dict[int, int]:
        """Number and size of the packs there are. In the pack thread."""
        index, storage = self._packs.index, self._repository.storage
        index.merge()
        return {index.pack_number(name): size for name, size in storage.sizes(FOLDER).items()}

    async def _mark(self) -> Marks:
        """What the backups of the repository name, of all that is stored now."""
        marks = Marks(await self._in_pack_thread(self._packs.index.snapshot))
        await asyncio.to_thread(self._mark_all, marks)
        return marks

    def _mark_all(self, marks: Marks) -> None:
        visited: set[bytes] = set()
        for backup in list(self._repository.ids()):
            try:
                reader = self._repository.open(backup)
            except NotFound:
                continue  # deleted meanwhile
            for ids in named_ids(reader, visited):
                marks.add(ids)
        partials = self._repository.partials
        for volume in partials.volumes():
            try:
                for ids in named_ids(partials.open(volume)[0], visited):
                    marks.add(ids)
            except NotFound:
                continue
            except DataCorrupt as error:
                logger.warning("an interrupted backup of volume %s cannot be taken up again: %s", volume, error)
                partials.delete(volume)

    async def _repack(self, numbers: list[int]) -> int:
        """Copy what is live in these packs to a new one, durable on return."""
        if not numbers:
            return 0
        live = (await self._mark()).offsets_in(numbers)
        total, relied = 0, set[OpenPack]()
        for number, offsets in live.items():
            added, packs = await self._in_pack_thread(partial(self._copy, number, offsets))
            total += added
            relied |= packs
        await self._in_pack_thread(self._packs.seal)
        for pack in relied:
            await pack.durable()
        return total

    def _copy(self, number: int, offsets: set[int]) -> tuple[int, set[OpenPack]]:
        name = self._packs.index.pack_name(number)
        blobs = []
        for offset, header in scan(self._repository.storage, name):
            if offset not in offsets:
                continue
            data = self._repository.storage.read(f"{FOLDER}/{name}", offset=offset, length=header.blob_size)
            stored = memoryview(data)[BLOB_HEADER_SIZE:]
            check_stored(header, stored)
            blobs.append(Blob(header.id, data[:BLOB_HEADER_SIZE], stored, header.plain_length))
        return self._packs.add(blobs)

    def _delete(self, numbers: list[int]) -> None:
        index = self._packs.index
        names = [index.pack_name(number) for number in numbers]
        # First, so that nobody finds something there any more.
        index.remove_packs(numbers)
        self._packs.condemned = frozenset()
        for name in names:
            self._repository.storage.delete(f"{FOLDER}/{name}")
        if names:
            logger.info("collected", extra={"packs": len(names)})

    async def _in_pack_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._packs.thread, call)


def _fence(sessions: list[Session]) -> None:
    for session in sessions:
        session.fenced = True
