"""Random histories of backups, incrementals, deletions, collections, crashes and sleeping writers, against byte models.

STILLPOINT_TORTURE=N runs N histories instead of a few.
"""

from __future__ import annotations

import asyncio
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backupnode.repository import BackupId, BackupWriter, Origin, PackRepository, Secret, open_directory
from stillpoint.errors import Refused
from tests.conformance.test_repositories import read_all

CHUNK = 4096
HISTORIES = int(os.environ.get("STILLPOINT_TORTURE", "6"))
SECRETS = (None, None, Secret(key_file=b"k" * 32))


class World:
    """One repository, the images of its volumes as they are now, and of its backups as they were."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.secret = SECRETS[seed % len(SECRETS)]
        self.volumes = [bytearray(self.random.randrange(1, 1500 * CHUNK)) for _ in range(2)]
        self.backups: dict[BackupId, tuple[int, bytes]] = {}
        self.sleeping: list[tuple[BackupWriter, int, bytes, bool]] = []
        self.repository: PackRepository

    async def open(self) -> None:
        self.repository = await open_directory(
            self.folder,
            chunk_size=CHUNK,
            pack_size=self.random.choice([20_000, 300_000]),
            secret=self.secret,
            threads=2,
        )

    async def step(self) -> None:
        steps = [self.change, self.change, self.back_up, self.back_up, self.delete, self.collect, self.sleep, self.wake]
        await self.random.choice([*steps, self.reopen])()

    async def change(self) -> None:
        image = self.random.choice(self.volumes)
        for _ in range(self.random.randrange(1, 6)):
            offset = self.random.randrange(len(image))
            length = min(len(image) - offset, self.random.choice([1, 700, CHUNK, 40 * CHUNK]))
            kind = self.random.random()
            # Few different contents, so that chunks are shared, deleted and come again.
            word = bytes([self.random.randrange(4)])
            data = bytes(length) if kind < 0.3 else word * length if kind < 0.7 else self.random.randbytes(length)
            image[offset : offset + length] = data

    async def back_up(self) -> None:
        writer, number, image = await self._written()
        self.backups[(await writer.commit(received_bytes=0)).id] = number, image

    async def sleep(self) -> None:
        """A backup is written and not committed yet."""
        if len(self.sleeping) < 2:
            self.sleeping.append((*await self._written(), False))

    async def wake(self) -> None:
        if self.sleeping:
            writer, number, image, fenced = self.sleeping.pop()
            if self.random.random() < 0.2:
                await writer.abort()
                return
            try:
                self.backups[(await writer.commit(received_bytes=0)).id] = number, image
                assert not fenced
            except Refused:
                assert fenced
                await writer.abort()

    async def delete(self) -> None:
        if self.backups:
            backup = self.random.choice([*self.backups])
            await self.repository.delete(backup)
            del self.backups[backup]

    async def collect(self) -> None:
        fence = self.random.random() < 0.2
        report = await self.repository.collect(fence=fence)
        if fence:
            assert not report.pending_packs
            self.sleeping = [(writer, number, image, True) for writer, number, image, _ in self.sleeping]

    async def reopen(self) -> None:
        """As after a crash: nobody says goodbye. Sometimes the cache is lost too."""
        await self.repository.close()
        self.sleeping = []
        if self.random.random() < 0.5:
            (self.folder / "index-cache").unlink(missing_ok=True)
        await self.open()

    async def _written(self) -> tuple[BackupWriter, int, bytes]:
        number = self.random.randrange(len(self.volumes))
        image = bytes(self.volumes[number])
        bases = [backup for backup, (of, _) in self.backups.items() if of == number]
        base = self.random.choice(bases) if bases and self.random.random() < 0.8 else None
        then = self.backups[base][1] if base is not None else None
        origin = Origin(f"vol{number}", "u", "s", len(image), self.random.randrange(1 << 40), base=base)
        writer = await self.repository.begin(origin)
        assert not writer.missing
        position = 0
        while position < len(image):
            length = min(len(image) - position, self.random.choice([512, CHUNK, 5 * CHUNK, 200 * CHUNK]))
            piece = image[position : position + length]
            if then is not None and then[position : position + length] == piece and self.random.random() < 0.9:
                await writer.unchanged(length)
            elif not any(piece) and self.random.random() < 0.8:
                await writer.hole(length)
            else:
                await writer.write(piece)
            position += length
        return writer, number, image

    async def check(self) -> None:
        listing = await self.repository.list()
        assert not listing.damaged and {record.id for record in listing.backups} == set(self.backups)
        for record in listing.backups:
            image = self.backups[record.id][1]
            assert await read_all(self.repository, record.id) == image
            chunks = (image[start : start + CHUNK] for start in range(0, len(image), CHUNK))
            assert record.data_bytes == sum(len(chunk) for chunk in chunks if any(chunk))
        with ThreadPoolExecutor(1) as pool:
            assert (await self.repository.check(pool, deep=True)).ok


@pytest.mark.parametrize("seed", range(HISTORIES))
def test_every_backup_of_a_history_restores_as_it_was(tmp_path: Path, seed: int) -> None:
    async def main() -> None:
        world = World(tmp_path / "repository", seed)
        await world.open()
        for _ in range(40):
            await world.step()
            if world.random.random() < 0.15:
                await world.check()
        await world.check()
        for writer, *_ in world.sleeping:
            await writer.abort()
        # With nothing left that needs it, nothing is left.
        for backup in world.backups:
            await world.repository.delete(backup)
        await world.repository.close()
        await world.open()
        await world.repository.collect()
        assert not list((world.folder / "packs").iterdir())
        await world.repository.close()

    asyncio.run(main())


def test_a_writer_that_sleeps_through_a_collection_commits_a_backup_that_restores(tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_directory(tmp_path / "repository", chunk_size=CHUNK)
        image = random.Random(1).randbytes(50 * CHUNK)
        old = await _store(repository, image)
        writer = await repository.begin(Origin("vol1", "u", "s", len(image), 1))
        await writer.write(image)  # all of it found in the old backup's pack
        await repository.delete(old)
        for _ in range(2):
            report = await repository.collect()
            assert report.pending_packs == 1 and not report.deleted_packs
        record = await writer.commit(received_bytes=0)
        await repository.collect()
        assert await read_all(repository, record.id) == image
        await repository.close()

    asyncio.run(main())


def test_a_writer_that_was_fenced_commits_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_directory(tmp_path / "repository", chunk_size=CHUNK)
        image = random.Random(1).randbytes(50 * CHUNK)
        old = await _store(repository, image)
        writer = await repository.begin(Origin("vol1", "u", "s", len(image), 1))
        await writer.write(image)
        await repository.delete(old)
        assert (await repository.collect(fence=True)).deleted_packs == 1
        with pytest.raises(Refused, match="fenced by a collection"):
            await writer.commit(received_bytes=0)
        await writer.abort()
        assert not (await repository.list()).backups
        assert await read_all(repository, await _store(repository, image)) == image
        await repository.close()

    asyncio.run(main())


async def _store(repository: PackRepository, image: bytes) -> BackupId:
    writer = await repository.begin(Origin("vol1", "u", "s", len(image), 1))
    await writer.write(image)
    return (await writer.commit(received_bytes=0)).id
