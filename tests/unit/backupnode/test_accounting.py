"""What each backup occupies, against what a collection really gives back."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from backupnode.repository import open_directory
from stillpoint.errors import NotFound
from tests.conformance.test_repositories import store

CHUNK = 4096


@pytest.mark.parametrize("seed", range(3))
def test_the_unique_bytes_are_what_deleting_a_backup_gives_back(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    # Small packs of a chunk each, so that what a collection deletes is just what nothing needs.
    contents = [source.randbytes(CHUNK) for _ in range(30)]

    async def main() -> None:
        repository = await open_directory(tmp_path / "repository", chunk_size=CHUNK, pack_size=CHUNK)
        backups = [
            (await store(repository, b"".join(source.choices(contents, k=source.randrange(5, 40))))).id
            for _ in range(4)
        ]
        while backups:
            backup = backups.pop(source.randrange(len(backups)))
            used = await repository.usage(backup)
            assert 0 <= used.unique_bytes <= used.referenced_bytes
            await repository.delete(backup)
            freed = (await repository.collect()).deleted_bytes
            # Sizes of blobs are known to the KiB; a pack has 20 bytes besides.
            blob_count = freed // CHUNK
            assert abs(used.unique_bytes - freed) <= 1024 * (blob_count + 1)
        with pytest.raises(NotFound):
            await repository.usage(backup)
        await repository.close()

    asyncio.run(main())


def test_two_equal_backups_share_everything(tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_directory(tmp_path / "repository", chunk_size=CHUNK)
        image = random.Random(1).randbytes(50 * CHUNK)
        first, second = (await store(repository, image)).id, (await store(repository, image)).id
        assert (await repository.usage(first)).unique_bytes == 0
        alone = await repository.usage(second)
        assert alone.referenced_bytes >= len(image)
        await repository.delete(first)
        assert (await repository.usage(second)).unique_bytes == alone.referenced_bytes
        await repository.close()

    asyncio.run(main())
