"""standbyctl backup restore and extract against real nodes: streams, archives, and targets that hold an older state."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillpoint.nbd.client import NbdClient
from tests.support.cluster import LocalCluster

pytestmark = pytest.mark.timeout(240)

MIB = 1 << 20
IMAGE = random.Random(1).randbytes(2 * MIB) + bytes(MIB) + b"text " * 100_000
IMAGE += bytes(4 * MIB - len(IMAGE))


@pytest.fixture(scope="module")
def cluster(local_cluster: LocalCluster) -> Iterator[LocalCluster]:
    local_cluster.cli("volume", "create", "restored", "--size", "4MiB")
    yield local_cluster
    local_cluster.run("volume", "delete", "restored", "--force")


@pytest.fixture(scope="module")
def backup_id(cluster: LocalCluster) -> Iterator[str]:
    async def fill() -> None:
        async with await NbdClient.connect(f"{cluster.env['primary']['nbd']}/restored") as client:
            await client.write(0, IMAGE)
            await client.flush()

    asyncio.run(fill())
    made: str = cluster.cli("backup", "run", "restored")["id"]
    yield made
    cluster.run("backup", "delete", made)


def piped(cluster: LocalCluster, *arguments: str, standard_input: bytes = b"") -> bytes:
    command = [sys.executable, "-m", "stillpoint.cli", *arguments, "--cluster", str(cluster.cluster_file)]
    done = subprocess.run(command, input=standard_input, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_backup_is_streamed_and_archived_and_the_archive_read_back(
    cluster: LocalCluster, backup_id: str, tmp_path: Path
) -> None:
    assert piped(cluster, "backup", "restore", backup_id, "-") == IMAGE
    archive = piped(cluster, "backup", "restore", backup_id, "-", "--archive")
    assert len(archive) < 2 * MIB + 100_000
    piped(cluster, "backup", "extract", "-", str(tmp_path / "from a pipe"), standard_input=archive)
    (tmp_path / "archive").write_bytes(archive)
    shown = cluster.cli("backup", "extract", tmp_path / "archive", tmp_path / "from a file", "--verify")
    assert (shown["id"], shown["size"]) == (backup_id, len(IMAGE))
    for name in ("from a pipe", "from a file"):
        assert (tmp_path / name).read_bytes() == IMAGE
    (tmp_path / "archive").write_bytes(archive[:-100])
    failed = cluster.run("backup", "extract", tmp_path / "archive", tmp_path / "from a cut one")
    assert failed.code == 1 and "cut short" in failed.stderr
    assert sorted(os.listdir(tmp_path)) == ["archive", "from a file", "from a pipe"]


@pytest.mark.parametrize("where", [[], ["--on-node"]], ids=["here", "on the node"])
def test_over_an_older_state_only_what_differs_is_written(
    cluster: LocalCluster, backup_id: str, tmp_path: Path, where: list[str]
) -> None:
    out = tmp_path / "out"
    out.write_bytes(IMAGE[:MIB] + b"older" * 1000 + IMAGE[MIB + 5000 :])
    shown = cluster.cli("backup", "restore", backup_id, out, "--differences", "--verify", *where)
    assert out.read_bytes() == IMAGE
    assert 5000 <= shown["written_bytes"] <= 2 * 65536


def test_what_makes_no_sense_is_one_line(cluster: LocalCluster, backup_id: str, tmp_path: Path) -> None:
    (tmp_path / "notes").write_bytes(b"precious notes, longer than the header of an archive")
    for arguments in (
        ("restore", backup_id, "-", "--differences"),
        ("restore", backup_id, "-", "--on-node"),
        ("restore", backup_id, tmp_path / "x", "--archive"),
        ("extract", tmp_path / "missing", tmp_path / "x"),
        ("extract", tmp_path, tmp_path / "x"),
        ("extract", tmp_path / "notes", tmp_path / "x"),
    ):
        failed = cluster.run("backup", *arguments)
        assert (failed.code, failed.stdout, failed.stderr.count("\n")) == (1, "", 1), failed
    assert os.listdir(tmp_path) == ["notes"]
