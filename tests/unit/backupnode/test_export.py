"""A backup as a block device."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backupnode.export import BackupDevice, BackupExports
from backupnode.overlays import Overlays
from backupnode.repository import BackupReader, BackupRecord, Origin, PackRepository, open_directory
from stillpoint.errors import DataCorrupt, OutOfRange, PermissionRefused, Refused

CHUNK = 4096
IMAGE = bytes(3 * CHUNK) + random.Random(1).randbytes(5 * CHUNK + 100) + bytes(20 * CHUNK) + b"the end"


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[PackRepository]:
    made = asyncio.run(open_directory(tmp_path / "repository", chunk_size=CHUNK))
    yield made
    asyncio.run(made.close())


def store(repository: PackRepository) -> BackupRecord:
    async def main() -> BackupRecord:
        writer = await repository.begin(Origin("vol1", "u", "s", len(IMAGE), snapshot_ns=1))
        await writer.write(IMAGE)
        return await writer.commit(received_bytes=0)

    return asyncio.run(main())


@pytest.fixture
def device(repository: PackRepository) -> Iterator[BackupDevice]:
    record = store(repository)
    made = BackupDevice(record, lambda: repository.open(record.id))
    yield made
    made.close()


def test_any_range_reads_as_the_volume_did(device: BackupDevice) -> None:
    source = random.Random(1)
    for _ in range(300):
        offset = source.randrange(len(IMAGE) + 1)
        buffer = bytearray(source.randrange(min(3 * CHUNK, len(IMAGE) - offset) + 1))
        if not device.try_read_into(offset, memoryview(buffer)):
            device.read_into(offset, memoryview(buffer))
        assert buffer == IMAGE[offset : offset + len(buffer)]


def test_threads_may_read_at_once(device: BackupDevice) -> None:
    def read(seed: int) -> bool:
        source = random.Random(seed)
        for _ in range(100):
            offset = source.randrange(len(IMAGE) - 2 * CHUNK)
            buffer = bytearray(2 * CHUNK)
            device.read_into(offset, memoryview(buffer))
            if buffer != IMAGE[offset : offset + len(buffer)]:
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(8)))


def test_what_was_read_lately_needs_no_wait(device: BackupDevice) -> None:
    buffer = memoryview(bytearray(100))
    assert not device.try_read_into(0, buffer)
    device.read_into(0, buffer)
    assert device.try_read_into(5, buffer)
    device.release()
    assert not device.try_read_into(5, buffer)


def test_extents_are_gapless_and_holes_are_zeroes(device: BackupDevice) -> None:
    for offset, length in [(0, len(IMAGE)), (1, 1), (CHUNK * 3 - 1, 2), (5 * CHUNK, 20 * CHUNK), (len(IMAGE), 0)]:
        position = offset
        for extent in device.extents(offset, length):
            assert extent.offset == position and extent.length > 0
            position = extent.end
            if extent.hole:
                assert not any(IMAGE[extent.offset : extent.end])
        assert position == offset + length
    assert [extent.hole for extent in device.extents(0, len(IMAGE))] == [True, False, True, False]


def test_it_cannot_be_changed_and_has_an_end(device: BackupDevice) -> None:
    with pytest.raises(PermissionRefused):
        device.write(0, [b"x"])
    with pytest.raises(PermissionRefused):
        device.trim(0, 1)
    with pytest.raises(PermissionRefused):
        device.write_zeroes(0, 1)
    with pytest.raises(OutOfRange):
        device.read_into(len(IMAGE), memoryview(bytearray(1)))
    with pytest.raises(OutOfRange):
        device.extents(0, len(IMAGE) + 1)


def test_a_damaged_chunk_is_an_error_and_the_others_read_on(repository: PackRepository) -> None:
    record = store(repository)
    (path,) = (Path(repository.description) / "packs").iterdir()
    with path.open("r+b") as file:
        file.seek(20 + 88 + 100)
        file.write(b"\xff\x00\xff")
    device = BackupDevice(record, lambda: repository.open(record.id))
    with pytest.raises(DataCorrupt, match=r"chunk 3: .*the stored bytes do not match"):
        device.read_into(3 * CHUNK, memoryview(bytearray(10)))
    buffer = bytearray(CHUNK)
    device.read_into(4 * CHUNK, memoryview(buffer))
    assert buffer == IMAGE[4 * CHUNK : 5 * CHUNK]
    device.close()


def test_an_export_holds_its_reader_only_while_somebody_is_connected(
    repository: PackRepository, tmp_path: Path
) -> None:
    record = store(repository)
    readers: list[BackupReader] = []

    def open_reader(backup: object) -> BackupReader:
        readers.append(repository.open(record.id))
        return readers[-1]

    with ThreadPoolExecutor(1) as executor:
        exports = BackupExports(open_reader, executor, Overlays(tmp_path / "overlays"))
        exports.add(record)
        assert list(exports) == [f"vol1@{record.id}"]
        export = exports[f"vol1@{record.id}"]
        assert export.read_only and export.size == len(IMAGE) and not readers
        for _ in range(2):
            export.opened()
            export.opened()
            export.read_into(0, memoryview(bytearray(10)))
            export.closed()
            export.read_into(CHUNK, memoryview(bytearray(10)))
            export.closed()
        assert len(readers) == 2
        assert exports.remove(record.id) is export
        assert exports.remove(record.id) is None
        assert not exports


SECTORS = 40 * CHUNK


def stored(repository: PackRepository, image: bytes) -> BackupRecord:
    async def main() -> BackupRecord:
        writer = await repository.begin(Origin("vol1", "u", "s", len(image), snapshot_ns=1))
        await writer.write(image)
        return await writer.commit(received_bytes=0)

    return asyncio.run(main())


def test_what_is_written_to_an_export_survives_a_restart_and_never_reaches_the_backup(
    repository: PackRepository, tmp_path: Path
) -> None:
    image = random.Random(2).randbytes(SECTORS)
    record = stored(repository, image)
    with ThreadPoolExecutor(1) as executor:

        def opened() -> BackupExports:
            made = BackupExports(repository.open, executor, Overlays(tmp_path / "overlays"))
            made.add(record)
            return made

        def content(exports: BackupExports) -> bytes:
            buffer = bytearray(SECTORS)
            exports[f"vol1@{record.id}"].read_into(0, memoryview(buffer))
            return bytes(buffer)

        exports = opened()
        assert exports[f"vol1@{record.id}"].read_only
        export = exports.make_writable(record)
        assert not export.read_only and exports.make_writable(record) is export
        export._device.write(5000, [b"written"])
        expected = image[:5000] + b"written" + image[5007:]
        assert content(exports) == expected
        exports.close()

        exports = opened()
        assert content(exports) == expected and not exports[f"vol1@{record.id}"].read_only
        reader = repository.open(record.id)
        assert b"".join(reader.read_chunk(index) or b"" for index in range(40)) == image

        exports[f"vol1@{record.id}"].opened()
        with pytest.raises(Refused, match="in use by 1 connections"):
            exports.discard(record)
        exports[f"vol1@{record.id}"].closed()
        assert exports.discard(record).read_only and content(exports) == image
        assert exports.discard(record).read_only
        assert content(opened()) == image


def test_a_damaged_overlay_leaves_the_backup_read_only_and_overlays_of_nobody_go(
    repository: PackRepository, tmp_path: Path
) -> None:
    record = stored(repository, bytes(SECTORS - 4096) + bytes(range(256)) * 16)
    overlays = Overlays(tmp_path / "overlays")
    with ThreadPoolExecutor(1) as executor:
        exports = BackupExports(repository.open, executor, overlays)
        exports.add(record)
        exports.make_writable(record)
        exports.close()
        (path,) = (tmp_path / "overlays").iterdir()
        with path.open("r+b") as file:
            file.write(b"rubbish!")
        exports.add(record)
        assert exports[f"vol1@{record.id}"].read_only and path.exists()
    overlays.keep_only([record.id])
    assert path.exists()
    overlays.keep_only([])
    assert not path.exists()


def test_a_backup_that_is_no_whole_number_of_sectors_is_not_made_writable(
    repository: PackRepository, tmp_path: Path
) -> None:
    record = store(repository)
    with ThreadPoolExecutor(1) as executor:
        exports = BackupExports(repository.open, executor, Overlays(tmp_path / "overlays"))
        exports.add(record)
        with pytest.raises(Refused, match="not a multiple of 512"):
            exports.make_writable(record)
        assert exports[f"vol1@{record.id}"].read_only
