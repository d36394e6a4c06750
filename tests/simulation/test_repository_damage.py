"""Every kind of file of a repository, damaged in every way: the check tells, what is whole restores, nothing else does.

Three backups, a pack for each: the second shares most of the first's, the third nothing. Whatever is done to one file,
a check must exit unhappy and name just the backups that cannot be restored (or be happy when nothing at all was lost),
the restore of a named one must fail and leave nothing of the target's name, and all others must restore byte for byte.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from backupnode.repository import BackupId, CheckReport, Origin, PackRepository, Secret, open_directory
from backupnode.repository.blobs import BLOB_HEADER_SIZE, decode_header
from backupnode.repository.packs import PACK_HEADER_SIZE
from backupnode.restore import restore
from stillpoint.errors import DataCorrupt, NotFound, Refused, StillpointError
from stillpoint.target import open_target

CHUNK = 4096
FLIPS = 100
SECRET = Secret(key_file=b"k" * 32)
FIRST = random.Random(1).randbytes(3 * CHUNK) + (b"text of the first " * 500)[: 2 * CHUNK] + bytes(CHUNK)
SECOND = FIRST[: 2 * CHUNK] + random.Random(2).randbytes(CHUNK) + FIRST[3 * CHUNK :]
THIRD = (b"of the third " * 700)[: 2 * CHUNK] + random.Random(3).randbytes(2 * CHUNK)


@dataclass
class Made:
    folder: Path
    images: dict[BackupId, bytes] = field(default_factory=dict)

    @property
    def ids(self) -> list[BackupId]:
        return list(self.images)

    def packs(self) -> list[Path]:
        """In the order of the backups that made them."""
        return sorted((self.folder / "packs").iterdir(), key=lambda path: path.stat().st_mtime_ns)


async def open_it(folder: Path) -> PackRepository:
    return await open_directory(folder, chunk_size=CHUNK, secret=SECRET, threads=1)


async def store(repository: PackRepository, image: bytes) -> BackupId:
    writer = await repository.begin(Origin("vol1", "u", "s", len(image), snapshot_ns=1))
    await writer.write(image)
    return (await writer.commit(received_bytes=0)).id


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Closed, with notes that say something, a quarantine, and the marks of checks."""
    made = Made(tmp_path_factory.mktemp("damage") / "repository")

    async def main() -> None:
        repository = await open_it(made.folder)
        for image in (FIRST, SECOND, THIRD):
            made.images[await store(repository, image)] = image
        await repository.record_verified(made.ids[0], 5)
        await repository.protect(made.ids[1], True)
        with ThreadPoolExecutor(1) as pool:
            for deep in (False, True):
                assert not (await repository.check(pool, deep=deep, budget_s=1e-9)).complete
        repository.notes.put_quarantined([("0" * 64, 5)])
        await repository.close()

    asyncio.run(main())
    assert sorted(path.name for path in made.folder.iterdir()) == [
        "index-cache", "lock", "manifests", "notes", "packs", "repository",
    ]  # fmt: skip
    return made


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    shutil.copytree(original.folder, tmp_path / "repository")
    return Made(tmp_path / "repository", original.images)


async def examine(made: Made, out: Path, *, deep: bool = True) -> tuple[CheckReport, set[BackupId]]:
    """The report, and the backups that could be restored; fails when a wrong byte was, or something looks complete."""
    repository = await open_it(made.folder)
    restored = set()
    try:
        with ThreadPoolExecutor(1) as pool:
            report = await repository.check(pool, deep=deep)
            for backup, image in made.images.items():
                target = out / f"{backup}.img"
                try:
                    reader = repository.open(backup)
                    await restore(reader, await open_target(str(target), size=len(image)), pool, lambda _: None)
                except (DataCorrupt, NotFound, Refused):
                    assert not target.exists()
                    continue
                assert target.read_bytes() == image, "wrong bytes were restored"
                target.unlink()
                restored.add(backup)
        listing = await repository.list()
        assert {record.id for record in listing.backups}.union(listing.damaged) == set(made.ids)
    finally:
        await repository.close()
    return report, restored


def judge(made: Made, out: Path, *, harmless: bool = False, may_affect: set[BackupId], deep: bool = True) -> None:
    """may_affect: of these at least one is affected, unless it is harmless, and of no others any."""
    report, restored = asyncio.run(examine(made, out, deep=deep))
    affected = set(report.affected)
    assert affected | restored == set(made.ids), "a backup is called whole and cannot be restored"
    assert not affected & restored, "a backup is called damaged and can be restored"
    assert affected <= may_affect
    if not harmless:
        assert not report.ok
        assert affected or not may_affect


def flips(path: Path, seed: int) -> Iterator[tuple[int, int]]:
    source = random.Random(seed)
    for _ in range(FLIPS):
        yield source.randrange(path.stat().st_size), 1 << source.randrange(8)


def flipped(path: Path, offset: int, bit: int) -> bytes:
    data = bytearray(path.read_bytes())
    data[offset] ^= bit
    return bytes(data)


def each_damage(made: Made, path: Path, seed: int) -> Iterator[str]:
    """Puts the file right again, and everything else, before the next one. A name for each."""
    keep = made.folder.parent / "keep"
    shutil.copytree(made.folder, keep)
    source = random.Random(seed)
    size = path.stat().st_size
    whole = path.read_bytes()
    damages: dict[str, bytes | None] = {
        f"bit {bit} at {offset}": flipped(path, offset, bit) for offset, bit in flips(path, seed)
    }
    damages |= {f"cut at {at}": whole[:at] for at in {0, size - 1, *(source.randrange(size) for _ in range(5))}}
    damages["gone"] = None
    for name, data in damages.items():
        path.unlink() if data is None else path.write_bytes(data)
        yield name
        shutil.rmtree(made.folder)
        shutil.copytree(keep, made.folder)
    shutil.rmtree(keep)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "deep"), [(0, True), (2, False)], ids=["shared, deep", "alone, quick"])
def test_a_damaged_pack(made: Made, tmp_path: Path, number: int, deep: bool) -> None:
    path = made.packs()[number]
    owners = set(made.ids[:2]) if number == 0 else {made.ids[2]}
    for name in each_damage(made, path, seed=number):
        # A header of the pack, or of a blob that says nothing new, may be damaged without a loss of bytes.
        print(f"pack {number}: {name}")
        report, restored = asyncio.run(examine(made, tmp_path, deep=deep))
        assert not report.ok
        assert set(report.affected) | restored == set(made.ids) and not set(report.affected) & restored
        assert set(report.affected) <= owners


@pytest.mark.slow
def test_a_damaged_manifest(made: Made, tmp_path: Path) -> None:
    backup = made.ids[1]
    for name in each_damage(made, made.folder / "manifests" / backup, seed=3):
        print(f"manifest: {name}")
        judge(made, tmp_path, may_affect={backup})


@pytest.mark.slow
def test_a_damaged_note_costs_no_backup_and_takes_no_protection_away(made: Made, tmp_path: Path) -> None:
    backup = made.ids[1]
    path = made.folder / "notes" / backup

    async def delete() -> None:
        repository = await open_it(made.folder)
        try:
            await repository.delete(backup)
        finally:
            await repository.close()

    for name in each_damage(made, path, seed=4):
        print(f"note: {name}")
        judge(made, tmp_path, may_affect=set(), harmless=name == "gone")
        if name != "gone":
            with pytest.raises(Refused, match="protected"):
                asyncio.run(delete())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quarantine", "check-deep"])
def test_other_damaged_notes_cost_nothing(made: Made, tmp_path: Path, name: str) -> None:
    for damage in each_damage(made, made.folder / "notes" / name, seed=5):
        print(f"{name}: {damage}")
        judge(made, tmp_path, may_affect=set(), harmless=damage == "gone")


@pytest.mark.slow
def test_a_damaged_cache_of_the_index_costs_nothing(made: Made, tmp_path: Path) -> None:
    for name in each_damage(made, made.folder / "index-cache", seed=6):
        print(f"index-cache: {name}")
        judge(made, tmp_path, may_affect=set(), harmless=True)


@pytest.mark.slow
def test_nothing_opens_with_a_damaged_file_of_the_keys(made: Made) -> None:
    for name in each_damage(made, made.folder / "repository", seed=7):
        print(f"repository: {name}")
        before = sorted(path.name for path in made.folder.rglob("*"))
        with pytest.raises(StillpointError, match=str(made.folder)):
            asyncio.run(open_it(made.folder))
        assert sorted(path.name for path in made.folder.rglob("*")) == before


def blobs(path: Path) -> list[tuple[int, int]]:
    """(start, end) of the blobs of a pack."""
    data, position, found = path.read_bytes(), PACK_HEADER_SIZE, []
    while position < len(data):
        size = decode_header(data[position:]).blob_size
        found.append((position, position + size))
        position += size
    return found


@pytest.mark.parametrize("cached", [True, False], ids=["with the cache", "without"])
def test_two_blobs_in_each_others_places(made: Made, tmp_path: Path, cached: bool) -> None:
    path = made.packs()[0]
    data = path.read_bytes()
    (a, b), *_, (c, d) = [(start, end) for start, end in blobs(path) if end - start > CHUNK]
    path.write_bytes(data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:])
    if not cached:
        (made.folder / "index-cache").unlink()
    report, restored = asyncio.run(examine(made, tmp_path))
    assert report.damaged_packs == [path.name]
    assert restored == set(made.ids) and not report.affected, "whole blobs are found wherever they are"


@pytest.mark.parametrize("cached", [True, False], ids=["with the cache", "without"])
def test_two_contents_under_each_others_headers(made: Made, tmp_path: Path, cached: bool) -> None:
    path = made.packs()[0]
    data = path.read_bytes()
    equal = [each for each in blobs(path) if each[1] - each[0] == BLOB_HEADER_SIZE + CHUNK + 16]
    (a, b), (c, d) = equal[0], equal[1]
    skip = BLOB_HEADER_SIZE
    path.write_bytes(data[: a + skip] + data[c + skip : d] + data[b : c + skip] + data[a + skip : b] + data[d:])
    if not cached:
        (made.folder / "index-cache").unlink()
    judge(made, tmp_path, may_affect=set(made.ids[:2]))


def test_the_manifest_of_one_backup_in_the_place_of_another(made: Made, tmp_path: Path) -> None:
    shutil.copy(made.folder / "manifests" / made.ids[2], made.folder / "manifests" / made.ids[0])
    judge(made, tmp_path, may_affect={made.ids[0]})


def test_an_old_cache_of_the_index_put_back_changes_nothing(made: Made, tmp_path: Path) -> None:
    cache = made.folder / "index-cache"
    old = cache.read_bytes()

    async def main() -> BackupId:
        repository = await open_it(made.folder)
        await repository.delete(made.ids[0])
        await repository.collect()
        backup = await store(repository, THIRD[::-1])
        await repository.close()
        return backup

    backup = asyncio.run(main())
    changed = Made(made.folder, {made.ids[1]: SECOND, made.ids[2]: THIRD, backup: THIRD[::-1]})
    cache.write_bytes(old)
    judge(changed, tmp_path, may_affect=set(), harmless=True)


def test_an_old_cache_does_not_bring_back_what_was_found_damaged(made: Made, tmp_path: Path) -> None:
    """The next backup must not be deduplicated against the bad chunk."""
    cache = made.folder / "index-cache"
    old = cache.read_bytes()
    path = made.packs()[2]
    start, end = blobs(path)[-1]
    path.write_bytes(flipped(path, (start + end) // 2, 1))
    judge(made, tmp_path, may_affect={made.ids[2]})
    cache.write_bytes(old)

    async def back_up() -> BackupId:
        repository = await open_it(made.folder)
        backup = await store(repository, THIRD)
        await repository.close()
        return backup

    healed = Made(made.folder, {**made.images, asyncio.run(back_up()): THIRD})
    report, restored = asyncio.run(examine(healed, tmp_path))
    assert restored == set(healed.ids) and not report.affected, "the damage was deduplicated against"


def test_the_backups_whose_pack_vanished_are_named_while_the_repository_is_open(made: Made, tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_it(made.folder)
        made.packs()[2].unlink()
        with ThreadPoolExecutor(1) as pool:
            report = await repository.check(pool, deep=False)
            assert set(report.affected) == {made.ids[2]} and not report.ok
            again = await store(repository, THIRD)
            assert not (await repository.check(pool, deep=True)).affected
        made.images = {**made.images, again: THIRD}
        await repository.close()

    asyncio.run(main())
    judge(made, tmp_path, may_affect=set(), harmless=True)


def test_a_backup_whose_manifest_vanished_can_be_given_up(made: Made) -> None:
    (made.folder / "manifests" / made.ids[0]).unlink()

    async def main() -> None:
        repository = await open_it(made.folder)
        assert (await repository.list()).damaged == [made.ids[0]]
        await repository.delete(made.ids[0])
        assert (await repository.list()).damaged == []
        with pytest.raises(NotFound):
            await repository.delete(made.ids[0])
        with ThreadPoolExecutor(1) as pool:
            assert (await repository.check(pool, deep=True)).ok
        await repository.close()

    asyncio.run(main())


def test_checks_of_limited_time_come_round_and_find_damage_wherever_it_is(tmp_path: Path) -> None:
    images = {number: random.Random(number).randbytes(CHUNK) for number in range(12)}

    async def main() -> None:
        repository = await open_it(tmp_path / "repository")
        backups = {number: await store(repository, image) for number, image in images.items()}
        await repository.close()
        bad = random.Random(9).choice(sorted((tmp_path / "repository/packs").iterdir()))
        bad.write_bytes(flipped(bad, PACK_HEADER_SIZE + BLOB_HEADER_SIZE + 5, 1))
        seen, found = [], set[str]()
        for _ in range(len(images)):
            # Opened anew each time: where a check ended is durable.
            repository = await open_it(tmp_path / "repository")
            with ThreadPoolExecutor(1) as pool:
                report = await repository.check(pool, deep=True, budget_s=1e-9)
            seen.append(report.checked_packs)
            found |= set(report.damaged_packs)
            assert report.complete == (sum(seen) == len(images))
            affected = set(report.affected)
            await repository.close()
            if report.complete:
                break
        assert sum(seen) == len(images) and max(seen) <= 2
        assert found == {bad.name}
        assert len(affected) == 1 and affected < set(backups.values())

    asyncio.run(main())
