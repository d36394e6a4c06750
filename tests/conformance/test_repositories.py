"""What every backup repository promises, run on every kind."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from backupnode.repository import (
    BackupId,
    BackupReader,
    BackupRecord,
    Origin,
    PackRepository,
    Repository,
    Secret,
    open_directory,
    open_storage,
)
from backupnode.repository.storage import Upload
from backupnode.streaming import stream
from stillpoint.errors import DataCorrupt, InvalidRequest, NotFound
from tests.support.s3 import bucket_storage

CHUNK = 4096
TIB = 1 << 40

Open = Callable[[Path], Coroutine[Any, Any, PackRepository]]


async def _directory(folder: Path) -> PackRepository:
    return await open_directory(folder / "repository", chunk_size=CHUNK)


async def _directory_of_default_chunks(folder: Path) -> PackRepository:
    return await open_directory(folder / "repository")


async def _encrypted(folder: Path) -> PackRepository:
    return await open_directory(folder / "repository", chunk_size=CHUNK, secret=Secret(key_file=b"k" * 32))


KINDS: dict[str, Open] = {
    "directory": _directory,
    "directory of default chunks": _directory_of_default_chunks,
    "encrypted": _encrypted,
}


@pytest.fixture(params=[*KINDS, "bucket"])
def open_repository(request: pytest.FixtureRequest) -> Open:
    if request.param != "bucket":
        return KINDS[request.param]
    url, bucket = request.getfixturevalue("service"), request.getfixturevalue("bucket")
    return lambda _: open_storage(bucket_storage(url, bucket), owner="tests", chunk_size=CHUNK)


def origin(size: int, volume: str = "vol1") -> Origin:
    return Origin(volume=volume, volume_uuid="6f1c", snapshot="s1", size=size, snapshot_ns=1_700_000_000_000_000_000)


async def store(repository: Repository, image: bytes, volume: str = "vol1") -> BackupRecord:
    writer = await repository.begin(origin(len(image), volume))
    await writer.write(image)
    return await writer.commit(received_bytes=len(image))


async def store_random_pieces(
    repository: Repository, size: int, source: random.Random
) -> tuple[BackupRecord, bytearray]:
    """A random image of data, zero data and holes, given in pieces of random length; and the image."""
    image = bytearray(size)
    writer = await repository.begin(origin(size))
    while writer.position < size:
        start = writer.position
        length = min(size - start, source.choice([1, 7, 512, CHUNK, 3 * CHUNK, source.randrange(1, 20 * CHUNK)]))
        kind = source.random()
        if kind < 0.4:
            await writer.hole(length)
            continue
        data = bytes(length) if kind < 0.5 else source.randbytes(length) if kind < 0.8 else b"text" * (length // 4 + 1)
        image[start : start + length] = data[:length]
        await writer.write(data[:length])
    return await writer.commit(received_bytes=0), image


async def read_all(repository: Repository, backup: BackupId) -> bytes:
    reader = repository.open(backup)
    try:
        reader.check_frame()
        image = bytearray(reader.record.origin.size)
        position = 0
        with ThreadPoolExecutor(2) as pool:
            async with contextlib.aclosing(stream(reader, pool)) as pieces:
                async for piece in pieces:
                    assert piece.offset == position
                    position += piece.length
                    if piece.data is not None:
                        image[piece.offset : position] = piece.data
        assert position == len(image)
        return bytes(image)
    finally:
        reader.close()


def read_at(reader: BackupReader, offset: int, length: int) -> bytes:
    first, last = offset // reader.chunk_size, (offset + length - 1) // reader.chunk_size
    data = b""
    for index in range(first, last + 1):
        full = min(reader.chunk_size, reader.record.origin.size - index * reader.chunk_size)
        data += reader.read_chunk(index) or bytes(full)
    return data[offset - first * reader.chunk_size :][:length]


@pytest.mark.parametrize("seed", range(8))
def test_what_was_given_in_any_pieces_is_read_back(open_repository: Open, tmp_path: Path, seed: int) -> None:
    async def main() -> None:
        source = random.Random(seed)
        repository = await open_repository(tmp_path)
        size = source.choice([1, CHUNK, CHUNK + 1, source.randrange(1, 12 << 20)])
        record, image = await store_random_pieces(repository, size, source)
        assert await read_all(repository, record.id) == image
        reader = repository.open(record.id)
        for _ in range(50):
            offset = source.randrange(size)
            length = min(size - offset, source.randrange(1, 5 * reader.chunk_size))
            assert read_at(reader, offset, length) == image[offset : offset + length]
        reader.close()
        await repository.close()

    asyncio.run(main())


def test_zeroes_are_stored_nowhere_however_they_come(open_repository: Open, tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_repository(tmp_path)
        writer = await repository.begin(origin(3 << 20))
        await writer.write(bytes(1 << 20))
        await writer.hole(1 << 20)
        await writer.write(bytes(1 << 20))
        record = await writer.commit(received_bytes=2 << 20)
        assert record.data_bytes == 0
        assert record.stored_bytes < 1024
        reader = repository.open(record.id)
        assert list(reader.data_chunks()) == []
        assert reader.read_chunk(0) is None
        reader.close()
        await repository.close()

    asyncio.run(main())


def test_a_sparse_volume_of_a_tebibyte_is_quick_and_small(open_repository: Open, tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_repository(tmp_path)
        writer = await repository.begin(origin(TIB))
        await writer.hole(TIB // 2 + 100)
        await writer.write(b"a needle")
        await writer.hole(TIB - writer.position)
        record = await writer.commit(received_bytes=8)
        assert record.stored_bytes < 1 << 20
        reader = repository.open(record.id)
        reader.check_frame()
        chunk = TIB // 2 // reader.chunk_size
        assert list(reader.data_chunks()) == [chunk]
        assert list(reader.data_chunks(chunk + 1)) == []
        assert read_at(reader, TIB // 2 + 99, 10) == b"\0a needle\0"
        reader.close()
        await repository.close()

    asyncio.run(main())


def test_what_can_be_compressed_takes_less_and_what_cannot_hardly_more(open_repository: Open, tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_repository(tmp_path)
        text = await store(repository, b"to be or not to be, " * 50_000)
        noise = await store(repository, random.Random(1).randbytes(1 << 20))
        assert text.stored_bytes < text.origin.size // 10
        assert noise.origin.size < noise.stored_bytes < noise.origin.size * 1.05
        assert await repository.stored_bytes() >= text.stored_bytes + noise.stored_bytes
        await repository.close()

    asyncio.run(main())


def test_the_record_says_what_the_origin_said_and_survives_reopening(open_repository: Open, tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_repository(tmp_path)
        record = await store(repository, b"x" * 10_000)
        assert record.origin == origin(10_000)
        assert record.received_bytes == 10_000
        assert record.verified_ns == 0
        assert record.finished_ns > record.duration_ns > 0
        identity = repository.uuid
        await repository.close()
        again = await open_repository(tmp_path)
        assert again.uuid == identity
        assert await again.get(record.id) == record
        assert (await again.list()).backups == [record]
        await again.close()

    asyncio.run(main())


def test_backups_are_listed_by_volume_oldest_first(open_repository: Open, tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_repository(tmp_path)
        writer = await repository.begin(Origin("vol1", "u", "s", 10, snapshot_ns=2))
        await writer.hole(10)
        late = await writer.commit(received_bytes=0)
        writer = await repository.begin(Origin("vol1", "u", "s", 10, snapshot_ns=1))
        await writer.hole(10)
        early = await writer.commit(received_bytes=0)
        other = await store(repository, b"other", volume="vol2")
        assert (await repository.list("vol1")).backups == [early, late]
        assert (await repository.list("vol2")).backups == [other]
        assert (await repository.list("vol3")).backups == []
        assert len((await repository.list()).backups) == 3
        await repository.close()

    asyncio.run(main())


def test_an_unfinished_backup_is_not_listed_and_a_collection_takes_what_it_left(
    open_repository: Open, tmp_path: Path
) -> None:
    async def main() -> None:
        repository = await open_repository(tmp_path)
        before = await repository.stored_bytes()
        writer = await repository.begin(origin(64 << 20))
        await writer.write(random.Random(1).randbytes(20 << 20))
        assert (await repository.list()).backups == []
        with pytest.raises(NotFound):
            await repository.get(writer.id)
        await writer.abort()
        await writer.abort()
        assert (await repository.list()).backups == []
        await repository.collect()
        # Nothing but the pack in the making and the index's cache.
        assert await repository.stored_bytes() - before < 33 << 20
        await repository.close()
        repository = await open_repository(tmp_path)
        await repository.collect()
        assert await repository.stored_bytes() < before + 16384
        await repository.close()

    asyncio.run(main())


def test_a_writer_that_is_cancelled_at_any_time_can_be_aborted(open_repository: Open, tmp_path: Path) -> None:
    async def attempt(repository: Repository, delay_s: float, data: bytes) -> bool:
        writer = await repository.begin(origin(len(data)))

        async def work() -> None:
            await writer.write(data)
            await writer.commit(received_bytes=0)

        try:
            await asyncio.wait_for(work(), delay_s)
        except TimeoutError:
            await writer.abort()
            return False
        await writer.abort()
        return True

    async def main() -> None:
        repository = await open_repository(tmp_path)
        data = random.Random(1).randbytes(30 << 20)
        finished = 0
        for delay_ms in (0.1, 1, 3, 10, 20, 50, 80, 5000):
            finished += await attempt(repository, delay_ms / 1000, data)
        listing = await repository.list()
        assert len(listing.backups) == finished >= 1
        assert not listing.damaged
        await repository.collect()
        assert await repository.stored_bytes() < 2.2 * len(data)
        await repository.close()

    asyncio.run(main())


def test_a_commit_that_is_cancelled_leaves_another_that_waits_for_the_same_pack(tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_directory(tmp_path / "repository", chunk_size=CHUNK)
        data = random.Random(1).randbytes(10 * CHUNK)
        upload = repository.storage.upload
        may_finish = threading.Event()

        def slow_upload(folder: str, *, name: str = "") -> Upload:
            made = upload(folder)
            finish = made.finish

            def slow_finish(name: str) -> None:
                may_finish.wait(20)
                finish(name)

            made.finish = slow_finish  # type: ignore[method-assign]
            return made

        repository.storage.upload = slow_upload  # type: ignore[method-assign]
        writers = [await repository.begin(origin(len(data))) for _ in range(2)]
        commits = []
        for writer in writers:
            await writer.write(data)
            commits.append(asyncio.create_task(writer.commit(received_bytes=0)))
        await asyncio.sleep(0.2)  # both wait for the pack to be durable
        commits[0].cancel()
        await asyncio.wait([commits[0]])
        await writers[0].abort()
        may_finish.set()
        made = await commits[1]
        assert await read_all(repository, made.id) == data
        assert [record.id for record in (await repository.list()).backups] == [made.id]
        await repository.close()

    asyncio.run(main())


def test_backups_of_one_second_have_names_of_their_own(
    open_repository: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = iter(f"20261123T101502-vol1-000{digit}" for digit in (0, 0, 0, 1, 1, 2))
    monkeypatch.setattr("backupnode.repository.repository.new_backup_id", lambda *_: BackupId(next(made)))

    async def main() -> None:
        repository = await open_repository(tmp_path)
        first = (await store(repository, b"1" * 5000)).id
        writers = [await repository.begin(origin(5000)) for _ in range(2)]
        assert len({first, *(writer.id for writer in writers)}) == 3
        for writer in writers:
            await writer.write(b"2" * 5000)
            await writer.commit(received_bytes=0)
        assert len((await repository.list()).backups) == 3
        await repository.close()

    asyncio.run(main())


def test_two_backups_may_be_written_at_once(open_repository: Open, tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_repository(tmp_path)
        images = [random.Random(seed).randbytes(3 << 20) for seed in range(3)]
        records = await asyncio.gather(*(store(repository, image) for image in images))
        assert len({record.id for record in records}) == 3
        for record, image in zip(records, images, strict=True):
            assert await read_all(repository, record.id) == image
        await repository.close()

    asyncio.run(main())


def test_a_deleted_backup_is_gone_and_the_others_stay(open_repository: Open, tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_repository(tmp_path)
        first = await store(repository, b"first" * 10_000)
        second = await store(repository, b"second" * 10_000)
        await repository.record_verified(first.id, 5)
        await repository.delete(first.id)
        for call in (repository.get, repository.delete):
            with pytest.raises(NotFound, match=first.id):
                await call(first.id)
        with pytest.raises(NotFound, match=first.id):
            repository.open(first.id)
        with pytest.raises(NotFound):
            await repository.record_verified(first.id, 6)
        assert (await repository.list()).backups == [second]
        assert await read_all(repository, second.id) == b"second" * 10_000
        await repository.close()

    asyncio.run(main())


def test_a_backup_that_is_deleted_while_it_is_read_reads_right_or_not_at_all(
    open_repository: Open, tmp_path: Path
) -> None:
    async def main() -> None:
        repository = await open_repository(tmp_path)
        record = await store(repository, b"kept" * 1000)
        reader = repository.open(record.id)
        await repository.delete(record.id)
        with contextlib.suppress(NotFound, DataCorrupt):
            assert read_at(reader, 0, 4000) == b"kept" * 1000
        reader.close()
        await repository.close()

    asyncio.run(main())


def test_the_time_of_verification_is_kept(open_repository: Open, tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_repository(tmp_path)
        record = await store(repository, b"x")
        await repository.record_verified(record.id, 111)
        await repository.record_verified(record.id, 222)
        await repository.close()
        again = await open_repository(tmp_path)
        assert (await again.get(record.id)).verified_ns == 222
        assert (await again.list()).backups[0].verified_ns == 222
        await again.close()

    asyncio.run(main())


@pytest.mark.parametrize("size", [0, -1])
def test_a_volume_without_bytes_is_refused(open_repository: Open, tmp_path: Path, size: int) -> None:
    async def main() -> None:
        repository = await open_repository(tmp_path)
        with pytest.raises(InvalidRequest):
            await repository.begin(origin(size))
        await repository.close()

    asyncio.run(main())
