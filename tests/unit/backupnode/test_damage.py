"""Change, cut, exchange or remove any byte of a repository: it is told, never served, and the next backup heals it."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backupnode.repository import BackupId, CheckReport, Origin, PackRepository, open_directory
from backupnode.repository.blobs import BLOB_HEADER_SIZE
from backupnode.repository.packs import PACK_HEADER_SIZE
from stillpoint.errors import DataCorrupt, Refused, StillpointError

CHUNK = 4096
# Noise, a hole, text (compressed), zeroes, noise, and a short last chunk.
IMAGE = (
    random.Random(1).randbytes(CHUNK)
    + bytes(CHUNK)
    + (b"the same again " * 300)[:CHUNK]
    + bytes(CHUNK)
    + random.Random(2).randbytes(CHUNK)
    + b"the end"
)
OTHER = random.Random(3).randbytes(3 * CHUNK)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, BackupId, BackupId]:
    """A closed repository of two backups that share nothing."""

    async def main() -> tuple[Path, BackupId, BackupId]:
        repository = await open_directory(tmp_path / "repository", chunk_size=CHUNK)
        first, second = await store(repository, IMAGE), await store(repository, OTHER)
        await repository.close()
        return tmp_path / "repository", first, second

    return asyncio.run(main())


async def store(repository: PackRepository, image: bytes = IMAGE) -> BackupId:
    writer = await repository.begin(Origin("vol1", "u", "s", len(image), snapshot_ns=1))
    await writer.write(image)
    return (await writer.commit(received_bytes=0)).id


def read_checked(repository: PackRepository, backup: BackupId, image: bytes = IMAGE) -> None:
    """Raises when damage is noticed. Fails when a chunk is served that is not what was stored."""
    reader = repository.open(backup)
    indices = list(reader.data_chunks())
    for index in range(-(-len(image) // CHUNK)):
        expected = image[index * CHUNK : (index + 1) * CHUNK]
        assert (reader.read_chunk(index) or bytes(len(expected))) == expected, "wrong data was served"
        assert (index in indices) == any(expected)
    reader.check_frame()


async def check(repository: PackRepository, *, deep: bool = False) -> CheckReport:
    with ThreadPoolExecutor(1) as pool:
        return await repository.check(pool, deep=deep)


def pack_of(folder: Path, number: int = 0) -> Path:
    """The packs in the order in which they were made."""
    return sorted((folder / "packs").iterdir(), key=lambda path: path.stat().st_mtime_ns)[number]


async def after_damage(folder: Path, first: BackupId, second: BackupId) -> None:
    """The first backup is damaged: that is told, heals with the next backup, and never touched the second."""
    repository = await open_directory(folder)
    try:
        report = await check(repository)
        assert set(report.affected) == {first} and not report.ok
        with pytest.raises((DataCorrupt, Refused), match=first):
            read_checked(repository, first)
        read_checked(repository, second, OTHER)
        read_checked(repository, await store(repository))
        if first not in (await repository.list()).damaged:
            read_checked(repository, first)
            assert not (await check(repository, deep=True)).affected
    finally:
        await repository.close()


def test_an_undamaged_repository_passes_both_checks(made: tuple[Path, BackupId, BackupId]) -> None:
    async def main() -> None:
        folder, first, second = made
        repository = await open_directory(folder)
        for deep in (False, True):
            report = await check(repository, deep=deep)
            assert report.ok and report.checked_packs == 2
        read_checked(repository, first)
        read_checked(repository, second, OTHER)
        await repository.close()

    asyncio.run(main())


@pytest.mark.parametrize("part", ["header", "id", "stored", "page", "manifest"])
def test_a_flipped_bit_is_told_and_the_next_backup_heals_it(made: tuple[Path, BackupId, BackupId], part: str) -> None:
    folder, first, second = made
    pack = pack_of(folder)
    place = {
        "header": (pack, PACK_HEADER_SIZE + 8),
        "id": (pack, PACK_HEADER_SIZE + 20),
        "stored": (pack, PACK_HEADER_SIZE + BLOB_HEADER_SIZE + 1000),
        "page": (pack, pack.stat().st_size - 5),
        "manifest": (folder / "manifests" / first, 60),
    }
    flip(*place[part])
    asyncio.run(after_damage(folder, first, second))


def test_a_flipped_bit_anywhere_is_never_served_and_always_told(
    made: tuple[Path, BackupId, BackupId], tmp_path: Path
) -> None:
    folder, first, second = made
    source = random.Random(5)

    async def attempt(path: Path) -> None:
        repository = await open_directory(copy)
        try:
            assert not (await check(repository)).ok
            for backup, image in ((first, IMAGE), (second, OTHER)):
                try:
                    read_checked(repository, backup, image)
                except (DataCorrupt, Refused):
                    assert path.parent.name == "packs" or backup == first
        finally:
            await repository.close()

    for number, relative in [*enumerate(["packs"] * 40), *enumerate(["manifests"] * 15)]:
        copy = tmp_path / f"{relative}{number}"
        shutil.copytree(folder, copy)
        path = pack_of(copy, source.randrange(2)) if relative == "packs" else copy / "manifests" / first
        flip(path, source.randrange(path.stat().st_size), bit=1 << source.randrange(8))
        asyncio.run(attempt(path))


@pytest.mark.parametrize("how", ["cut", "removed", "swapped", "emptied"])
def test_a_pack_that_is_cut_or_gone_or_has_chunks_in_other_places_is_told(
    made: tuple[Path, BackupId, BackupId], how: str
) -> None:
    folder, first, second = made
    pack = pack_of(folder)
    whole = pack.read_bytes()
    start, length = PACK_HEADER_SIZE, BLOB_HEADER_SIZE + CHUNK
    if how == "removed":
        pack.unlink()
    elif how == "swapped":
        # Only the stored bytes: each header then stands before another chunk.
        body = whole[start + BLOB_HEADER_SIZE : start + length]
        text_at = whole.index(b"SPBL", start + 4)
        pack.write_bytes(whole[: text_at + BLOB_HEADER_SIZE] + body + whole[text_at + BLOB_HEADER_SIZE + len(body) :])
    else:
        pack.write_bytes(whole[: len(whole) // 2] if how == "cut" else b"")
    asyncio.run(after_damage(folder, first, second))


def test_whole_blobs_that_changed_places_are_found_by_their_headers(made: tuple[Path, BackupId, BackupId]) -> None:
    folder, first, _ = made
    pack = pack_of(folder, 1)
    whole = pack.read_bytes()
    start, length = PACK_HEADER_SIZE, BLOB_HEADER_SIZE + CHUNK
    one, two, rest = (
        whole[start : start + length],
        whole[start + length : start + 2 * length],
        whole[start + 2 * length :],
    )
    pack.write_bytes(whole[:start] + two + one + rest)
    (folder / "index-cache").unlink()

    async def main() -> None:
        repository = await open_directory(folder)
        assert len((await check(repository)).damaged_packs) == 1
        read_checked(repository, first)
        await repository.close()

    asyncio.run(main())


def test_the_manifest_of_another_backup_is_noticed(made: tuple[Path, BackupId, BackupId]) -> None:
    folder, first, second = made
    shutil.copy(folder / "manifests" / second, folder / "manifests" / first)
    asyncio.run(after_damage(folder, first, second))


@pytest.mark.parametrize("cache", ["removed", "damaged", "an older one", "of nothing"])
def test_the_cache_of_the_index_may_be_lost_or_wrong(
    made: tuple[Path, BackupId, BackupId], tmp_path: Path, cache: str
) -> None:
    folder, first, second = made
    path = folder / "index-cache"

    async def main() -> None:
        if cache == "an older one":
            old = path.read_bytes()
            repository = await open_directory(folder)
            await repository.delete(first)
            await repository.collect()
            third = await store(repository, IMAGE[::-1])
            await repository.close()
            path.write_bytes(old)
        elif cache == "removed":
            path.unlink()
        else:
            path.write_bytes(b"") if cache == "of nothing" else flip(path, 50)
        repository = await open_directory(folder)
        read_checked(repository, second, OTHER)
        if cache == "an older one":
            read_checked(repository, third, IMAGE[::-1])
        else:
            read_checked(repository, first)
        assert (await check(repository, deep=True)).ok
        await repository.close()

    asyncio.run(main())


def test_what_is_quarantined_stays_so_when_the_repository_is_opened_again(
    made: tuple[Path, BackupId, BackupId],
) -> None:
    folder, first, second = made
    flip(pack_of(folder), PACK_HEADER_SIZE + BLOB_HEADER_SIZE + 5)

    async def main() -> None:
        for cached in (True, False):
            repository = await open_directory(folder)
            with pytest.raises(DataCorrupt, match="chunk 0"):
                read_checked(repository, first)
            await repository.close()
            if not cached:
                (folder / "index-cache").unlink(missing_ok=True)
        repository = await open_directory(folder)
        read_checked(repository, await store(repository))
        read_checked(repository, first)
        await repository.close()
        repository = await open_directory(folder)
        read_checked(repository, first)
        read_checked(repository, second, OTHER)
        await repository.close()

    asyncio.run(main())


def test_a_collection_with_an_unreadable_backup_deletes_nothing(made: tuple[Path, BackupId, BackupId]) -> None:
    folder, first, _ = made
    flip(folder / "manifests" / first, 60)
    before = sorted(os.listdir(folder / "packs"))

    async def main() -> None:
        repository = await open_directory(folder)
        with pytest.raises(DataCorrupt, match=first):
            await repository.collect()
        await repository.close()

    asyncio.run(main())
    assert sorted(os.listdir(folder / "packs")) == before


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda path: flip(path, 20), DataCorrupt),
        (lambda path: path.write_bytes(b""), DataCorrupt),
        (lambda path: path.write_bytes(b"precious notes"), DataCorrupt),
        (lambda path: path.rename(path.with_name("other")), Refused),
    ],
)
def test_a_directory_that_is_no_repository_is_not_used(
    tmp_path: Path, damage: Callable[[Path], object], error: type[StillpointError]
) -> None:
    asyncio.run(asyncio.run(open_directory(tmp_path)).close())
    damage(tmp_path / "repository")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(error, match=str(tmp_path)):
        asyncio.run(open_directory(tmp_path))
    assert sorted(os.listdir(tmp_path)) == before


def flip(path: Path, position: int, *, bit: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ bit]))
