"""The care of a repository as an administrator sees it: lists, prunes, checks, and what damage looks like."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from stillpoint.nbd.client import NbdClient
from tests.support.cluster import LocalCluster

MIB = 1 << 20


def write(cluster: LocalCluster, offset: int, data: bytes) -> None:
    async def main() -> None:
        async with await NbdClient.connect(f"{cluster.env['primary']['nbd']}/vol1") as client:
            await client.write(offset, data)
            await client.flush()

    asyncio.run(main())


def test_an_administrator_lists_protects_prunes_collects_and_checks(tmp_path: Path) -> None:
    with LocalCluster.up(tmp_path / "cluster", f"vol1:{8 * MIB}") as cluster:
        made = []
        for number in range(4):
            write(cluster, number * MIB, random.Random(number).randbytes(MIB))
            made.append(cluster.cli("backup", "run", "vol1")["id"])
        _accounting(cluster, made)
        _pruning(cluster, made)
        _damage(cluster, made[3])


def _accounting(cluster: LocalCluster, made: list[str]) -> None:
    listed = cluster.cli("backup", "list")
    assert [each["id"] for each in listed] == made
    assert all(each["state"] == "complete" and each["verified"] is None for each in listed)
    assert listed[3]["data_bytes"] == 4 * MIB and listed[3]["dedup_ratio"] > 3
    assert "4 backups, 10 MiB of data in" in cluster.cli("backup", "list", json=False)
    shown = cluster.cli("backup", "show", made[3])
    assert MIB <= shown["unique_bytes"] < 1.2 * MIB and 3 * MIB <= shown["shared_bytes"] < 3.5 * MIB
    assert "what deleting it gives back" in cluster.cli("backup", "show", made[3], json=False)


def _pruning(cluster: LocalCluster, made: list[str]) -> None:
    assert cluster.cli("backup", "protect", made[0])["protected"] is True
    assert "protected" in cluster.run("backup", "delete", made[0]).error
    assert "there is no policy" in cluster.run("backup", "prune").error
    planned = cluster.cli("backup", "prune", "--keep-last", "1", "--dry-run")
    assert planned["deleted"] == made[1:3]
    assert {each["id"]: each["kept_by"] for each in planned["kept"]} == {made[0]: "protected", made[3]: "last"}
    assert len(cluster.cli("backup", "list")) == 4
    assert "would go" in cluster.cli("backup", "prune", "vol1", "--keep-last", "1", "--dry-run", json=False)
    assert cluster.cli("backup", "prune", "vol1", "--keep-last", "1")["deleted"] == made[1:3]
    assert [each["id"] for each in cluster.cli("backup", "list")] == [made[0], made[3]]
    cluster.cli("backup", "unprotect", made[0])
    cluster.cli("backup", "delete", made[0])
    # The last one needs what all of them brought, so there is next to nothing to give back.
    assert cluster.cli("backup", "gc")["pending_packs"] == 0
    assert cluster.cli("backup", "gc", "--dry-run")["unreferenced_bytes"] < MIB


def _damage(cluster: LocalCluster, left: str) -> None:
    checked = cluster.cli("backup", "check", "--deep")
    assert checked["ok"] is True and checked["verified"] == [{"id": left, "ok": True, "reason": None}]
    assert cluster.cli("backup", "show", left)["verified"] is not None
    pack = max((cluster.directory / "backup" / "repository" / "packs").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    for command in (["check"], ["verify"]):
        found = cluster.run("--json", "backup", *command)
        assert found.code == 1 and found.document["damaged_packs"] == [pack.name]
        assert [(each["id"], each["ok"]) for each in found.document["verified"]] == [(left, False)]
    assert f"!! {left}:" in cluster.run("backup", "check").stdout
    assert cluster.run("backup", "verify", left).code == 1
    # The mirror still has what was lost.
    healed = cluster.cli("backup", "run", "vol1", "--full")["id"]
    assert cluster.cli("backup", "verify", left)["ok"] is True
    manifest = cluster.directory / "backup" / "repository" / "manifests" / left
    manifest.write_bytes(manifest.read_bytes()[:-1])
    assert {each["id"]: each["state"] for each in cluster.cli("backup", "list")} == {
        healed: "complete",
        left: "damaged",
    }
    assert "DAMAGED" in cluster.cli("backup", "list", json=False)
    assert f"the manifest of {left} is damaged" in cluster.run("backup", "prune", "--keep-last", "1").error
    cluster.cli("backup", "delete", left)
    assert cluster.cli("backup", "verify", healed)["ok"] is True
