"""The directory repository's files: locks, sweeping, what the disk says, and names."""

from __future__ import annotations

import asyncio
import os
import random
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from blake3 import blake3

from backupnode.repository import BackupWriter, Origin, open_directory, parse_backup_id
from backupnode.repository.backup_id import new_backup_id
from stillpoint.errors import DataCorrupt, DeviceError, InUse, InvalidRequest, Refused
from tests.conformance.test_repositories import read_all, store
from tests.support.requirements import requires_root

IMAGE = random.Random(1).randbytes(100_000)


def test_a_repository_is_open_once_at_a_time(tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_directory(tmp_path)
        with pytest.raises(InUse, match=f"the repository {tmp_path} is in use"):
            await open_directory(tmp_path)
        await repository.close()
        await (await open_directory(tmp_path)).close()

    asyncio.run(main())


@requires_root
def test_a_full_disk_fails_the_backup_and_the_next_one_works_when_there_is_room(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], check=True)

    async def main() -> None:
        repository = await open_directory(tmp_path)
        kept = await store(repository, IMAGE)
        writer = await repository.begin(Origin("vol1", "u", "s", 8 << 20, 1))
        noise = random.Random(1).randbytes(8 << 20)
        with pytest.raises(DeviceError, match="No space left on device"):
            await _write_and_commit(writer, noise)
        await writer.abort()
        assert (await repository.list()).backups == [kept]
        await asyncio.to_thread(subprocess.run, ["mount", "-o", "remount,size=16m", str(tmp_path)], check=True)
        assert await read_all(repository, (await store(repository, noise)).id) == noise
        assert await read_all(repository, kept.id) == IMAGE
        await repository.close()

    try:
        asyncio.run(main())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_leftovers_are_swept_and_files_of_others_are_not(tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_directory(tmp_path)
        record = await store(repository, IMAGE)
        await repository.close()
        before = set(tmp_path.rglob("*"))
        for folder in ("", "packs", "manifests"):
            (tmp_path / folder / ".tmp-0123").write_bytes(b"left over")
        (tmp_path / "notes.txt").write_bytes(b"precious")
        (tmp_path / "manifests" / "README").write_bytes(b"precious")
        repository = await open_directory(tmp_path)
        assert [each.id for each in (await repository.list()).backups] == [record.id]
        await repository.close()
        assert set(tmp_path.rglob("*")) == before | {tmp_path / "notes.txt", tmp_path / "manifests" / "README"}

    asyncio.run(main())


def test_a_repository_of_the_first_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    # What the first format's file began with: magic, version 1, length, digest.
    payload = b'{"chunk_size":4096}'
    head = b"SPRP" + struct.pack("<II", 1, len(payload)) + blake3(payload).digest()
    (tmp_path / "repository").write_bytes(head + struct.pack("<I", zlib.crc32(head)) + payload)
    with pytest.raises(Refused, match="format version 1; this program reads 2 and 3"):
        asyncio.run(open_directory(tmp_path))
    assert os.listdir(tmp_path) == ["repository"]


@pytest.mark.parametrize("call", ["pwritev", "fsync"])
def test_a_disk_that_fails_fails_the_backup_and_nothing_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    async def main() -> None:
        repository = await open_directory(tmp_path)
        writer = await repository.begin(Origin("vol1", "u", "s", 80 << 20, 1))

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, call, fail)
        noise = random.Random(1).randbytes(80 << 20)
        with pytest.raises(DeviceError, match="No space left on device"):
            await _write_and_commit(writer, noise)
        await writer.abort()
        # The first pack that failed ended the backup; others may still be on their way to the disk.
        await asyncio.wrap_future(repository.packs._sealer.submit(lambda: None))
        monkeypatch.undo()
        assert not (await repository.list()).backups
        assert not os.listdir(tmp_path / "packs")
        assert await read_all(repository, (await store(repository, IMAGE)).id) == IMAGE
        await repository.close()

    asyncio.run(main())


async def _write_and_commit(writer: BackupWriter, data: bytes) -> None:
    for offset in range(0, len(data), 1 << 20):
        await writer.write(data[offset : offset + (1 << 20)])
    await writer.commit(received_bytes=0)


def test_a_short_write_of_the_system_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev

    def pwritev(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return real(descriptor, [memoryview(b"".join(buffers))[:999]], offset)

    async def main() -> None:
        repository = await open_directory(tmp_path, chunk_size=4096)
        monkeypatch.setattr(os, "pwritev", pwritev)
        record = await store(repository, IMAGE)
        monkeypatch.undo()
        assert await read_all(repository, record.id) == IMAGE
        await repository.close()

    asyncio.run(main())


def test_an_existing_repository_keeps_its_chunk_size(tmp_path: Path) -> None:
    async def main() -> None:
        await (await open_directory(tmp_path, chunk_size=8192)).close()
        repository = await open_directory(tmp_path, chunk_size=4096)
        reader = repository.open((await store(repository, IMAGE)).id)
        assert reader.chunk_size == 8192
        reader.close()
        await repository.close()

    asyncio.run(main())


def test_ids_sort_by_time_and_name_the_volume() -> None:
    second = 1_000_000_000
    ids = [new_backup_id("vol.1_a-b", time_s * second) for time_s in (1, 1_600_000_000, 1_795_429_702)]
    assert ids == sorted(ids)
    assert ids[2].startswith("20261123T102822-vol.1_a-b-")
    assert [parse_backup_id(each) for each in ids] == ids


@pytest.mark.parametrize(
    "text",
    [
        "",
        "..",
        "../20261123T101502-vol1-3f9a",
        "20261123T101502-../x-3f9a",
        "20261123T101502-a/b-3f9a",
        "20261123T101502-vol1-3F9A",
        "20261123T101502-vol1-3f9a\n",
        "20261123T101502-vol1-3f9a\0",
        "20261123T101502--3f9a",
        "２0261123T101502-vol1-3f9a",
        "x" * 5000,
    ],
)
def test_what_is_no_backup_id_never_becomes_a_path(text: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse_backup_id(text)
    assert len(str(raised.value)) < 600


def test_neighbours_in_a_pack_are_read_at_once_and_damage_among_them_is_told_by_its_place(tmp_path: Path) -> None:
    chunk, count = 4096, 40
    image = b"".join(random.Random(number).randbytes(chunk) for number in range(count)) + bytes(chunk) + b"end"

    async def main() -> None:
        repository = await open_directory(tmp_path, chunk_size=chunk)
        backup = (await store(repository, image)).id
        reader = repository.open(backup)
        reads = 0
        read = repository.storage.read

        def counted(name: str, **options: int | None) -> bytes:
            nonlocal reads
            reads += 1
            return read(name, **options)  # type: ignore[arg-type]

        repository.storage.read = counted  # type: ignore[method-assign]
        reader.page(0)
        before = reads
        whole = reader.read_chunks(range(count + 2))
        assert b"".join(part or bytes(chunk) for part in whole) == image
        assert reads - before <= 2
        (pack,) = (tmp_path / "packs").iterdir()
        data = bytearray(pack.read_bytes())
        place = data.index(image[7 * chunk : 7 * chunk + 50])
        data[place + 10] ^= 1
        pack.write_bytes(data)
        assert b"".join(part or b"" for part in reader.read_chunks(range(7))) == image[: 7 * chunk]
        with pytest.raises(DataCorrupt, match="chunk 7:"):
            reader.read_chunks(range(count))
        assert reader.read_chunks(range(8, 10)) == [image[8 * chunk : 9 * chunk], image[9 * chunk : 10 * chunk]]
        await repository.close()

    asyncio.run(main())
