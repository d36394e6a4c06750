"""Opens a repository, or makes one: its format, its lock, its index, and what a crash left half done."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from stillpoint.errors import DataCorrupt, NotFound

from .folder import DirectoryStorage
from .format import CHUNK_SIZE, Format, make_format, read_format
from .index import ChunkIndex
from .keys import Secret
from .manifests import agree_notes
from .notes import Notes
from .packs import PACK_SIZE, Packs, reconcile
from .repository import CACHE, PackRepository
from .storage import Storage

logger = logging.getLogger(__name__)


async def open_directory(
    root: Path,
    *,
    level: int = 1,
    chunk_size: int = CHUNK_SIZE,
    pack_size: int = PACK_SIZE,
    secret: Secret | None = None,
    threads: int | None = None,
    clock: Callable[[], int] = time.time_ns,
) -> PackRepository:
    """`open_storage` of a local directory."""
    storage = DirectoryStorage(root)
    return await open_storage(
        storage, level=level, chunk_size=chunk_size, pack_size=pack_size, secret=secret, threads=threads, clock=clock
    )


async def open_storage(
    storage: Storage,
    *,
    owner: str = "",
    level: int = 1,
    chunk_size: int = CHUNK_SIZE,
    pack_size: int = PACK_SIZE,
    secret: Secret | None = None,
    threads: int | None = None,
    clock: Callable[[], int] = time.time_ns,
) -> PackRepository:
    """Open the repository there, making it when there is none, and remove leftovers of crashes.

    owner: who opens it, under a name that no other running process has; "": a random one. level: of zstd.
    chunk_size: of a new repository; an existing one keeps its own. secret: makes a new one encrypted, and opens an
    encrypted one. threads: for hashing and compression.
    Raises InUse when another process has it open, Refused when something else is there, a format this program does not
    know, or the secret does not fit, DataCorrupt, DeviceError.
    """
    threads = threads or min(4, os.cpu_count() or 1)

    def work() -> PackRepository:
        if storage.make():
            make_format(storage, chunk_size=chunk_size, secret=secret, clock=clock)
        format_ = read_format(storage, secret)
        storage.lock(owner or secrets.token_hex(16))
        try:
            storage.prepare()
            packs, notes = load_packs(storage, format_, pack_size=pack_size)
            agree_notes(storage, notes)
        except BaseException:
            storage.close()
            raise
        return PackRepository(storage, format_, packs, notes, level=level, threads=threads, clock=clock)

    return await asyncio.to_thread(work)


def load_packs(storage: Storage, format_: Format, *, pack_size: int = PACK_SIZE) -> tuple[Packs, Notes]:
    """The index, from its cache as far as that agrees with the packs, and what is in quarantine."""
    notes = Notes(storage, format_.keys)
    quarantined = notes.quarantined()
    anew = False
    try:
        index = ChunkIndex.load(
            lambda offset, length: storage.read(CACHE, offset=offset, length=length), size=storage.size(CACHE)
        )
    except (NotFound, DataCorrupt) as error:
        logger.info("the index is made anew from the packs: %s", error)
        # What the packs that are there cannot tell is which others there were.
        index, anew = ChunkIndex(), True
    read_count, gone_count = reconcile(storage, index, quarantined)
    if read_count:
        logger.info("read the headers of packs that the index did not know", extra={"packs": read_count})
    packs = Packs(storage, index, format_.keys, pack_size=pack_size)
    packs.quarantined = quarantined
    packs.may_miss = bool(quarantined or gone_count or anew)
    return packs, notes
