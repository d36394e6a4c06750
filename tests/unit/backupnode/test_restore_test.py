"""Backups that are put to the test: by a check of a real file system, and by commands."""

from __future__ import annotations

import asyncio
import random
import subprocess
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from backupnode.repository import BackupRecord, Origin, PackRepository, open_directory
from backupnode.restore_test import RestoreTest, RestoreTestConfig, RestoreTestResult, remove_leftovers
from stillpoint.errors import ConfigError
from tests.support.requirements import requires_tools

MIB = 1 << 20


@asynccontextmanager
async def repository_at(folder: Path) -> AsyncIterator[PackRepository]:
    repository = await open_directory(folder / "repository")
    try:
        yield repository
    finally:
        await repository.close()


async def store(repository: PackRepository, image: bytes) -> BackupRecord:
    writer = await repository.begin(Origin("vol1", "u", "s", len(image), 1))
    await writer.write(image)
    return await writer.commit(received_bytes=0)


def put_to_the_test(
    folder: Path, image: bytes, *command: str, timeout_s: float = 60.0, damage: bool = False
) -> RestoreTestResult:
    async def main() -> RestoreTestResult:
        async with repository_at(folder) as repository:
            record = await store(repository, image)
            if damage:
                (pack,) = (folder / "repository" / "packs").iterdir()
                data = bytearray(pack.read_bytes())
                data[5000] ^= 1
                pack.write_bytes(data)
            with ThreadPoolExecutor(2) as executor:
                test = RestoreTest(folder, RestoreTestConfig(command, timeout_s), executor)
                result = await test.run(record, lambda: repository.open(record.id))
            reader = repository.open(record.id)
            if not damage:
                content = b"".join(reader.read_chunk(n) or bytes(262144) for n in range(-(-len(image) // 262144)))
                assert content == image, "the test wrote to the backup"
            return result

    result = asyncio.run(main())
    assert not list(folder.glob("restore-test-*")), "something of the test was left"
    return result


def ext4(folder: Path) -> bytearray:
    path = folder / "image"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    content = folder / "content"
    content.mkdir()
    for number in range(40):
        (content / f"file{number}").write_bytes(random.Random(number).randbytes(50_000))
    subprocess.run(["mkfs.ext4", "-q", "-d", str(content), str(path)], check=True)
    return bytearray(path.read_bytes())


@pytest.mark.root
@requires_tools("nbdfuse", "mkfs.ext4", "e2fsck")
def test_a_file_system_that_is_right_passes_and_one_that_is_not_fails(tmp_path: Path) -> None:
    image = ext4(tmp_path)
    passed = put_to_the_test(tmp_path, bytes(image))
    assert passed.passed and "files" in passed.detail and passed.duration_ns > 0
    # Of the second block group's tables, or of inodes: something that no preening mends.
    image[1 * MIB : 3 * MIB] = random.Random(1).randbytes(2 * MIB)
    image[1024 + 1024 : 1024 + 8192] = b"\xff" * 7168
    failed = put_to_the_test(tmp_path, bytes(image))
    assert not failed.passed and "e2fsck ended with exit code" in failed.detail


@requires_tools("nbdinfo")
def test_a_command_has_the_disk_by_its_address(tmp_path: Path) -> None:
    command = 'test "$(nbdinfo --size "$STILLPOINT_NBD_URI")" = 1048576 && echo $STILLPOINT_VOLUME is fine'
    result = put_to_the_test(tmp_path, random.Random(1).randbytes(MIB), "/bin/sh", "-c", command)
    assert result.passed and result.detail == "vol1 is fine"


@pytest.mark.root
@requires_tools("nbdfuse")
def test_a_command_may_write_to_the_disk_and_changes_nothing(tmp_path: Path) -> None:
    command = (
        'echo rubbish | dd of="$STILLPOINT_DEVICE" conv=notrunc,fsync status=none && head -c 7 "$STILLPOINT_DEVICE"'
    )
    result = put_to_the_test(tmp_path, random.Random(1).randbytes(MIB), "/bin/sh", "-c", command)
    assert result.passed and result.detail == "rubbish"


def test_a_command_that_fails_or_hangs_is_a_failed_test(tmp_path: Path) -> None:
    failed = put_to_the_test(tmp_path, bytes(MIB), "/bin/sh", "-c", "echo it is empty; exit 1")
    assert not failed.passed and failed.detail == "/bin/sh ended with exit code 1, saying: it is empty"
    hanging = put_to_the_test(tmp_path, bytes(MIB), "/bin/sleep", "60", timeout_s=0.3)
    assert not hanging.passed and "was killed after 0.3 s" in hanging.detail


@requires_tools("nbdcopy")
def test_a_backup_that_cannot_be_read_fails(tmp_path: Path) -> None:
    command = 'nbdcopy "$STILLPOINT_NBD_URI" null:'
    image = random.Random(1).randbytes(2 * MIB)
    assert put_to_the_test(tmp_path, image, "/bin/sh", "-c", command).passed
    other = tmp_path / "other"
    other.mkdir()
    assert not put_to_the_test(other, image, "/bin/sh", "-c", command, damage=True).passed


def test_without_a_file_system_that_is_known_the_test_says_so(tmp_path: Path) -> None:
    result = put_to_the_test(tmp_path, bytes(MIB))
    assert not result.passed and "restore_test.command" in result.detail


def test_what_a_crash_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "restore-test-x" / "mount"
    left.mkdir(parents=True)
    (tmp_path / "restore-test-x" / "b.overlay").write_bytes(b"x")
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_limit_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"restore_test\.timeout_s is 0"):
        RestoreTestConfig(timeout_s=0)
