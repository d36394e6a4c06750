"""Restoring from a bare directory, with no node and nothing written."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from backupnode.repository import Origin, Secret, open_directory
from backupnode.rescue import main

IMAGE = random.Random(1).randbytes(300_000) + bytes(3 << 20) + b"the end"
KEY = b"0123456789abcdef" * 2


def make(folder: Path, secret: Secret | None = None) -> tuple[str, str | None]:
    """A closed repository of one backup: its id, and the recovery form."""

    async def work() -> tuple[str, str | None]:
        repository = await open_directory(folder, secret=secret)
        writer = await repository.begin(Origin("vol1", "u", "s", len(IMAGE), 1))
        await writer.write(IMAGE)
        backup = (await writer.commit(received_bytes=0)).id
        form = repository.recovery_form
        await repository.close()
        return backup, form

    return asyncio.run(work())


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_backup_is_restored_from_what_cannot_be_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "repository"
    backup, _ = make(folder)
    (folder / "index-cache").unlink()
    shutil.rmtree(folder / "notes")
    before = contents(folder)
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{backup}\tvol1\t{len(IMAGE)}\n"
    target = tmp_path / "restored"
    assert main([str(folder), backup, str(target)]) == 0
    assert target.read_bytes() == IMAGE
    assert contents(folder) == before


def test_a_backup_is_streamed_to_stdout(tmp_path: Path) -> None:
    backup, _ = make(tmp_path / "repository")
    command = [sys.executable, "-m", "backupnode.rescue", str(tmp_path / "repository"), backup, "-"]
    assert subprocess.run(command, capture_output=True, check=True, timeout=60).stdout == IMAGE


def test_an_encrypted_one_opens_with_its_key_file_or_the_recovery_form_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "repository"
    backup, form = make(folder, Secret(key_file=KEY))
    assert form is not None
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "wrong").write_bytes(KEY[::-1])
    (tmp_path / "form").write_text(form.lower().replace("-", " ") + "\n")
    (tmp_path / "typo").write_text("A" + form[1:] if form[0] != "A" else "B" + form[1:])
    for number, option in enumerate((["--key-file", "key"], ["--recovery-form", "form"])):
        target = tmp_path / f"restored{number}"
        assert main([str(folder), backup, str(target), option[0], str(tmp_path / option[1])]) == 0
        assert target.read_bytes() == IMAGE
    capsys.readouterr()
    for options, said in (
        (["--key-file", str(tmp_path / "wrong")], "does not open it"),
        (["--recovery-form", str(tmp_path / "typo")], "typing error"),
        ([], "encrypted repository; name its passphrase file or key file"),
    ):
        assert main([str(folder), *options]) == 1
        assert said in capsys.readouterr().err
    # Nothing of the image is in the files.
    assert not any(IMAGE[:64] in data for data in contents(folder).values())


def test_damage_fails_the_restore_and_leaves_nothing_that_looks_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "repository"
    backup, _ = make(folder)
    (pack,) = (folder / "packs").iterdir()
    with pack.open("r+b") as file:
        file.seek(200)
        file.write(b"\xff\x00\xff")
    assert main([str(folder), backup, str(tmp_path / "restored")]) == 1
    assert "damaged: chunk 0" in capsys.readouterr().err
    assert not list(tmp_path.glob("restored*"))


def test_what_is_no_repository_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "is not a repository" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
