"""Keys of an encrypted repository: more than one, changed while it is open, and what is readable without."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from backupnode import keys, rescue
from backupnode.repository import PackRepository, Secret, open_directory
from stillpoint.errors import Refused
from tests.conformance.test_repositories import read_all, store

IMAGE = random.Random(1).randbytes(20_000)
OLD, NEW = Secret(passphrase=b"the old one"), Secret(key_file=b"n" * 32)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "old").write_bytes(b"the old one\n")
    (tmp_path / "new").write_bytes(b"n" * 32)
    (tmp_path / "short").write_bytes(b"short")
    (tmp_path / "wrong").write_bytes(b"guessed")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], str]:
    code = keys.main([str(each) for each in arguments])
    said = capsys.readouterr()
    return code, [line.split("\t")[1] for line in said.out.splitlines() if "\t" in line], said.out + said.err


async def open_it(files: Path, secret: Secret) -> PackRepository:
    return await open_directory(files / "repository", secret=secret)


def test_a_passphrase_is_changed_while_a_backup_runs(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opener = (files / "repository", "--passphrase-file", files / "old")

    async def main() -> None:
        repository = await open_it(files, OLD)
        first = await store(repository, IMAGE)
        assert run(capsys, "add", *opener, "--new-key-file", files / "new")[:2] == (0, ["passphrase", "key_file"])
        listed = run(capsys, "list", *opener)[2]
        identity = listed.splitlines()[0].split("\t")[0]
        assert run(capsys, "remove", *opener, identity)[:2] == (0, ["key_file"])
        second = await store(repository, IMAGE[::-1])
        await repository.close()
        with pytest.raises(Refused, match="does not open it"):
            await open_it(files, OLD)
        repository = await open_it(files, NEW)
        assert await read_all(repository, first.id) == IMAGE
        assert await read_all(repository, second.id) == IMAGE[::-1]
        await repository.close()

    asyncio.run(main())
    code, _, said = run(capsys, "list", *opener)
    assert code == 1 and "does not open it" in said


def test_what_makes_no_sense_changes_nothing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        await (await open_it(files, OLD)).close()
        await (await open_directory(files / "plain")).close()

    asyncio.run(main())
    before = (files / "repository/repository").read_bytes()
    folder, opener = files / "repository", ("--passphrase-file", files / "old")
    only = run(capsys, "list", folder, *opener)[2].split("\t")[0]
    for arguments, expected in (
        (("remove", folder, *opener, only), "the last key cannot be removed"),
        (("remove", folder, *opener, "00000000"), "has no key 00000000"),
        (("add", folder, *opener, "--new-key-file", files / "short"), "fewer than 32 bytes"),
        (("add", folder, *opener, "--new-key-file", files / "missing"), "No such file"),
        (("add", folder, "--passphrase-file", files / "wrong", "--new-key-file", files / "new"), "does not open it"),
        (("list", folder), "name what opens the repository now"),
        (("list", files / "plain", *opener), "is not encrypted"),
        (("list", files / "nowhere", *opener), "is not a repository"),
    ):
        code, _, said = run(capsys, *arguments)
        assert (code, expected in said) == (1, True), said
        assert said.startswith("backupnode.keys: ") and said.count("\n") == 1
    assert (files / "repository/repository").read_bytes() == before


def test_the_recovery_form_alone_restores_when_the_file_of_the_keys_is_lost(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def main() -> str:
        repository = await open_it(files, OLD)
        backup = (await store(repository, IMAGE)).id
        await repository.close()
        return backup

    backup = asyncio.run(main())
    code, _, form = run(capsys, "recovery-form", files / "repository", "--passphrase-file", files / "old")
    assert code == 0
    (files / "form").write_text(form)
    path = files / "repository/repository"
    for damaged in (True, False):
        path.write_bytes(b"damaged") if damaged else path.unlink()
        target = files / "restored"
        target.unlink(missing_ok=True)
        arguments = [str(files / "repository"), backup, str(target), "--recovery-form", str(files / "form")]
        assert rescue.main(arguments) == 0
        assert target.read_bytes() == IMAGE


def test_nothing_but_names_of_files_can_be_read_without_a_key(files: Path) -> None:
    async def main() -> None:
        repository = await open_it(files, OLD)
        backup = (await store(repository, IMAGE)).id
        await repository.protect(backup, True)
        await repository.close()

    asyncio.run(main())
    everything = b"".join(path.read_bytes() for path in (files / "repository").rglob("*") if path.is_file())
    assert IMAGE[:64] not in everything
    for word in (b"vol1", b"snapshot", b"verified_ns", b"finished_ns", b"root"):
        assert word not in everything
