"""A process that dies at every call it makes to the system while it commits, notes, deletes and collects."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backupnode.repository import open_directory
from tests.conformance.test_repositories import read_all, store

IMAGE = random.Random(1).randbytes(100_000)
ROOT = Path(__file__).resolve().parents[2]

# Commits one backup undisturbed, then dies at the given call of the system while it commits a second, notes that the
# first was verified, deletes the first, and collects.
CRASHER = """
import asyncio, os, random, sys
from pathlib import Path
from backupnode.repository import Origin, open_directory

async def store(repository, image):
    writer = await repository.begin(Origin("vol1", "u", "s", len(image), 1))
    await writer.write(image)
    return (await writer.commit(received_bytes=0)).id

async def main():
    image = random.Random(1).randbytes(100_000)
    repository = await open_directory(Path(sys.argv[1]), chunk_size=4096)
    first = await store(repository, image)
    print(first, flush=True)
    left = int(sys.argv[2])
    def dying(call):
        def wrapped(*arguments, **options):
            nonlocal left
            left -= 1
            if not left:
                os._exit(9)
            return call(*arguments, **options)
        return wrapped
    for name in ("open", "pwritev", "fsync", "link", "unlink", "replace"):
        setattr(os, name, dying(getattr(os, name)))
    print(await store(repository, image[50_000:] + image), flush=True)
    await repository.record_verified(first, 5)
    await repository.delete(first)
    print("deleted", flush=True)
    await repository.collect()
    await repository.close()

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_crash_at_any_step_leaves_whole_backups_and_nothing_else(tmp_path: Path) -> None:
    for step in range(1, 300):
        folder = tmp_path / str(step)
        command = [sys.executable, "-c", CRASHER, str(folder), str(step)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        said = run.stdout.split()
        asyncio.run(_check_after_crash(folder, said))
        if run.returncode == 0:
            assert step > 15, "the crashes were not where the work is done"
            return
        assert run.returncode == 9, run.stderr
    pytest.fail("the work never ended")


async def _check_after_crash(folder: Path, said: list[str]) -> None:
    repository = await open_directory(folder)
    listing = await repository.list()
    listed = [record.id for record in listing.backups]
    assert not listing.damaged
    first, *rest = said
    if "deleted" in rest:
        assert first not in listed
    if rest:
        assert rest[0] in listed, "a backup that was committed is gone"
    else:
        assert first in listed
    for backup in listed:
        assert await read_all(repository, backup) == (IMAGE if backup == first else IMAGE[50_000:] + IMAGE)
    with ThreadPoolExecutor(1) as pool:
        assert (await repository.check(pool, deep=True)).ok
    assert not [path for path in folder.rglob("*") if path.name.startswith(".tmp-")]
    assert await read_all(repository, (await store(repository, IMAGE)).id) == IMAGE
    await repository.close()
