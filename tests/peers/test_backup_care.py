"""The care of a repository as an administrator sees it: lists, prunes, checks, and what damage looks like."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from stillpoint.cli.standbyctl import main
from stillpoint.nbd.client import NbdClient
from tests.support.cluster import CliResult, LocalCluster

MIB = 1 << 20


class Console:
    """standbyctl in this process, because this test calls it often."""

    def __init__(self, cluster: LocalCluster, capsys: pytest.CaptureFixture[str]) -> None:
        self._cluster = cluster
        self._capsys = capsys

    def run(self, *arguments: str) -> CliResult:
        self._capsys.readouterr()
        code = main(["--cluster", str(self._cluster.cluster_file), *arguments])
        said = self._capsys.readouterr()
        return CliResult(code, said.out, said.err)

    def json(self, *arguments: str) -> Any:
        done = self.run("--json", *arguments)
        assert done.code == 0, done.stderr + self._cluster.log_tails()
        return done.document

    def text(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.code == 0, done.stderr + self._cluster.log_tails()
        return done.stdout


async def write(uri: str, offset: int, data: bytes) -> None:
    async with await NbdClient.connect(uri) as client:
        await client.write(offset, data)
        await client.flush()


def test_an_administrator_lists_protects_prunes_collects_and_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LocalCluster.up(tmp_path / "cluster", f"vol1:{8 * MIB}") as cluster:
        console = Console(cluster, capsys)
        uri = f"{cluster.env['primary']['nbd']}/vol1"
        made = []
        for number in range(4):
            asyncio.run(write(uri, number * MIB, random.Random(number).randbytes(MIB)))
            made.append(console.json("backup", "run", "vol1")["id"])
        _accounting(console, made)
        _pruning(console, made)
        _damage(console, made[3], cluster.directory / "backup" / "repository")


def _accounting(console: Console, made: list[str]) -> None:
    listed = console.json("backup", "list")
    assert [each["id"] for each in listed] == made
    assert all(each["state"] == "complete" and each["verified"] is None for each in listed)
    assert listed[3]["data_bytes"] == 4 * MIB and listed[3]["dedup_ratio"] > 3
    assert "4 backups, 10 MiB of data in" in console.text("backup", "list")
    shown = console.json("backup", "show", made[3])
    assert MIB <= shown["unique_bytes"] < 1.2 * MIB and 3 * MIB <= shown["shared_bytes"] < 3.5 * MIB
    assert "what deleting it gives back" in console.text("backup", "show", made[3])


def _pruning(console: Console, made: list[str]) -> None:
    assert console.json("backup", "protect", made[0])["protected"] is True
    assert "protected" in console.run("backup", "delete", made[0]).error
    assert "there is no policy" in console.run("backup", "prune").error
    planned = console.json("backup", "prune", "--keep-last", "1", "--dry-run")
    assert planned["deleted"] == made[1:3]
    assert {each["id"]: each["kept_by"] for each in planned["kept"]} == {made[0]: "protected", made[3]: "last"}
    assert len(console.json("backup", "list")) == 4
    assert "would go" in console.text("backup", "prune", "vol1", "--keep-last", "1", "--dry-run")
    assert console.json("backup", "prune", "vol1", "--keep-last", "1")["deleted"] == made[1:3]
    assert [each["id"] for each in console.json("backup", "list")] == [made[0], made[3]]
    console.json("backup", "unprotect", made[0])
    console.json("backup", "delete", made[0])
    # The last one needs what all of them brought, so there is next to nothing to give back.
    assert console.json("backup", "gc")["pending_packs"] == 0
    assert console.json("backup", "gc", "--dry-run")["unreferenced_bytes"] < MIB


def _damage(console: Console, left: str, repository: Path) -> None:
    checked = console.json("backup", "check", "--deep")
    assert checked["ok"] is True and checked["verified"] == [{"id": left, "ok": True, "reason": None}]
    assert console.json("backup", "show", left)["verified"] is not None
    pack = max((repository / "packs").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    for command in (["check"], ["verify"]):
        found = console.run("--json", "backup", *command)
        assert found.code == 1 and found.document["damaged_packs"] == [pack.name]
        assert [(each["id"], each["ok"]) for each in found.document["verified"]] == [(left, False)]
    assert f"!! {left}:" in console.run("backup", "check").stdout
    assert console.run("backup", "verify", left).code == 1
    # The mirror still has what was lost.
    healed = console.json("backup", "run", "vol1", "--full")["id"]
    assert console.json("backup", "verify", left)["ok"] is True
    manifest = repository / "manifests" / left
    manifest.write_bytes(manifest.read_bytes()[:-1])
    assert {each["id"]: each["state"] for each in console.json("backup", "list")} == {
        healed: "complete",
        left: "damaged",
    }
    assert "DAMAGED" in console.text("backup", "list")
    assert f"the manifest of {left} is damaged" in console.run("backup", "prune", "--keep-last", "1").error
    console.json("backup", "delete", left)
    assert console.json("backup", "verify", healed)["ok"] is True
