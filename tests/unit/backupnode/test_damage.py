"""Every byte of a backup is under a checksum: change, cut or exchange any, and it is told, never served."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backupnode.repository import BackupId, DirectoryRepository, Origin, open_directory
from backupnode.repository.directory import DirectoryRepository as Directory
from backupnode.repository.records import FILE_HEADER_SIZE, RECORD_HEADER_SIZE
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


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[DirectoryRepository]:
    made = asyncio.run(open_directory(tmp_path / "repository", chunk_size=CHUNK))
    yield made
    asyncio.run(made.close())


def store(repository: Directory, image: bytes = IMAGE) -> BackupId:
    async def main() -> BackupId:
        writer = await repository.begin(Origin("vol1", "u", "s", len(image), snapshot_ns=1))
        await writer.write(image)
        return (await writer.commit(received_bytes=0)).id

    return asyncio.run(main())


def read_checked(repository: Directory, backup: BackupId, image: bytes = IMAGE) -> None:
    """Raises when damage is noticed. Fails when a chunk is served that is not what was stored."""
    reader = repository.open(backup)
    try:
        indices = list(reader.data_chunks())
        for index in range(-(-len(image) // CHUNK)):
            expected = image[index * CHUNK : (index + 1) * CHUNK]
            assert (reader.read_chunk(index) or bytes(len(expected))) == expected, "wrong data was served"
            assert (index in indices) == any(expected)
        reader.check_frame()
    finally:
        reader.close()


def path_of(repository: Directory, backup: BackupId, suffix: str) -> Path:
    return Path(repository.description) / f"{backup}{suffix}"


def test_an_undamaged_backup_reads_right(repository: Directory) -> None:
    read_checked(repository, store(repository))


@pytest.mark.parametrize("suffix", [".data", ".manifest"])
def test_a_change_of_any_byte_is_noticed(repository: Directory, suffix: str) -> None:
    backup = store(repository)
    path = path_of(repository, backup, suffix)
    whole = path.read_bytes()
    for position in _positions(len(whole)):
        for bit in (0x01, 0x80):
            _write_at(path, position, bytes([whole[position] ^ bit]))
            with pytest.raises((DataCorrupt, Refused), match=backup):
                read_checked(repository, backup)
        _write_at(path, position, whole[position : position + 1])
    read_checked(repository, backup)


def _positions(length: int) -> list[int]:
    """All of the beginning and the end, where headers and the index are, and a part of the chunks' bytes."""
    edge = 1000
    return [*range(min(edge, length)), *range(edge, length - edge, 13), *range(max(edge, length - edge), length)]


@pytest.mark.parametrize("suffix", [".data", ".manifest"])
def test_a_file_that_is_cut_or_grown_is_noticed(repository: Directory, suffix: str) -> None:
    backup = store(repository)
    path = path_of(repository, backup, suffix)
    whole = path.read_bytes()
    for length in [0, 1, 31, 32, 33, *range(40, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataCorrupt, match=backup):
            read_checked(repository, backup)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DataCorrupt, match=backup):
        read_checked(repository, backup)


def test_a_missing_data_file_is_damage_and_hides_no_other_backup(repository: Directory) -> None:
    lost, kept = store(repository), store(repository)
    path_of(repository, lost, ".data").unlink()
    with pytest.raises(DataCorrupt, match=f"backup {lost} is damaged: the data file: it is missing"):
        read_checked(repository, lost)
    read_checked(repository, kept)
    asyncio.run(repository.delete(lost))
    assert [record.id for record in asyncio.run(repository.list()).backups] == [kept]


def test_chunks_that_changed_places_are_noticed(repository: Directory) -> None:
    image = random.Random(1).randbytes(2 * CHUNK)
    backup = store(repository, image)
    path = path_of(repository, backup, ".data")
    length = RECORD_HEADER_SIZE + CHUNK
    whole = path.read_bytes()
    first = whole[FILE_HEADER_SIZE : FILE_HEADER_SIZE + length]
    second = whole[FILE_HEADER_SIZE + length : FILE_HEADER_SIZE + 2 * length]
    path.write_bytes(whole[:FILE_HEADER_SIZE] + second + first + whole[FILE_HEADER_SIZE + 2 * length :])
    with pytest.raises(DataCorrupt, match="another record stands in its place"):
        read_checked(repository, backup, image)


@pytest.mark.parametrize("suffix", [".data", ".manifest"])
def test_the_file_of_another_backup_is_noticed(repository: Directory, suffix: str) -> None:
    first = store(repository, random.Random(1).randbytes(3 * CHUNK))
    second = store(repository, random.Random(2).randbytes(3 * CHUNK))
    shutil.copy(path_of(repository, first, suffix), path_of(repository, second, suffix))
    with pytest.raises(DataCorrupt, match=second):
        read_checked(repository, second, random.Random(2).randbytes(3 * CHUNK))


def test_a_damaged_manifest_is_told_by_its_id_and_hides_no_other_backup(repository: Directory) -> None:
    damaged, kept = store(repository), store(repository)
    _write_at(path_of(repository, damaged, ".manifest"), 60, b"\xff\xff")
    listing = asyncio.run(repository.list())
    assert [record.id for record in listing.backups] == [kept]
    assert listing.damaged == [damaged]


def test_a_damaged_note_of_verification_only_loses_the_note(repository: Directory) -> None:
    backup = store(repository)
    asyncio.run(repository.record_verified(backup, 77))
    _write_at(path_of(repository, backup, ".verified"), 50, b"\xff")
    assert asyncio.run(repository.get(backup)).verified_ns == 0
    read_checked(repository, backup)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda path: _write_at(path, 20, b"\xff"), DataCorrupt),
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


def _write_at(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)
