"""A volume is rolled back on both nodes, by what differs, and forward again."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import STANDBYCTL, LocalCluster
from tests.support.requirements import requires_tools

pytestmark = [requires_tools("qemu-io", "nbdcopy"), pytest.mark.timeout(240)]

MIB = 1 << 20
SIZE = 32 * MIB
BLOCK = 64 << 10


@pytest.fixture
def cluster(local_cluster: LocalCluster, tmp_path: Path) -> Iterator[LocalCluster]:
    """A volume `roll` with a random content and a snapshot `good`, and changes since."""
    local_cluster.cli("volume", "create", "roll", "--size", str(SIZE))
    image = tmp_path / "image"
    image.write_bytes(random.Random(5).randbytes(SIZE // 2) + bytes(SIZE // 2))
    subprocess.run(["nbdcopy", "--flush", str(image), uri(local_cluster)], check=True, timeout=60)
    local_cluster.cli("snapshot", "create", "roll", "--name", "good")
    qemu_io(local_cluster, "write -P 7 1M 64k", "discard 2M 1M", "write -P 9 20M 100", "flush")
    yield local_cluster
    local_cluster.run("volume", "delete", "roll", "--force")


CHANGED = BLOCK + MIB + BLOCK


def uri(cluster: LocalCluster) -> str:
    return f"{cluster.env['primary']['nbd']}/roll"


def qemu_io(cluster: LocalCluster, *commands: str) -> None:
    options = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "raw", "-d", "unmap", *options, uri(cluster)], check=True, timeout=60)


def both(cluster: LocalCluster) -> bytes:
    """The content of the volume, which is the same on both nodes."""
    paths = cluster.env["volumes"]["roll"]
    primary, mirror = (Path(paths[name]).read_bytes() for name in ("primary_path", "mirror_path"))
    assert primary == mirror
    return primary


def snapshot(cluster: LocalCluster, name: str) -> bytes:
    nbd = f"{cluster.env['standby']['nbd']}/roll@{name}"
    return subprocess.run(["nbdcopy", nbd, "-"], check=True, capture_output=True, timeout=60).stdout


def test_a_rollback_makes_both_copies_the_snapshot_and_is_undone_by_another(cluster: LocalCluster) -> None:
    good, bad = snapshot(cluster, "good"), both(cluster)
    assert good != bad
    done = cluster.cli("snapshot", "rollback", "roll@good")
    assert (done["volume"], done["snapshot"], done["written_bytes"]) == ("roll", "roll@good", CHANGED)
    assert both(cluster) == good
    undo = done["undo"].removeprefix("roll@")
    assert snapshot(cluster, undo) == bad
    assert snapshot(cluster, "good") == good
    assert cluster.cli("snapshot", "rollback", done["undo"])["written_bytes"] == CHANGED
    assert both(cluster) == bad


def test_a_rollback_right_after_another_writes_nothing_twice(cluster: LocalCluster) -> None:
    first = cluster.cli("snapshot", "rollback", "roll@good")
    marker = cluster.cli("snapshot", "create", "roll", "--name", "marker")
    assert marker["id"] == "roll@marker" != first["undo"]
    assert cluster.cli("snapshot", "rollback", "roll@marker")["written_bytes"] == 0


def test_a_rollback_under_a_connected_client_is_refused_unless_forced(cluster: LocalCluster) -> None:
    before = both(cluster)
    client = subprocess.Popen(["qemu-io", "-f", "raw", uri(cluster)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert client.stdin is not None and client.stdout is not None
    try:
        client.stdin.write(b"read 0 64k\n")
        client.stdin.flush()
        assert b"read" in client.stdout.readline()
        refused = cluster.run("snapshot", "rollback", "roll@good")
        assert refused.code == 1
        assert refused.error == (
            "volume 'roll' has 1 connected client, under which its content would change; disconnect, or use --force"
        )
        assert both(cluster) == before
        assert [each["name"] for each in cluster.cli("snapshot", "list", "roll")] == ["good"]
        cluster.cli("snapshot", "rollback", "roll@good", "--force")
    finally:
        client.communicate(b"quit\n", timeout=20)
    assert both(cluster) == snapshot(cluster, "good")


def test_a_rollback_that_was_killed_is_completed_by_doing_it_again(own_cluster: LocalCluster) -> None:
    own_cluster.cli("volume", "create", "roll", "--size", str(4 * SIZE))
    own_cluster.cli("snapshot", "create", "roll", "--name", "good")
    qemu_io(own_cluster, "write -P 7 0 128M", "flush")
    bad = both(own_cluster)
    rolling = subprocess.Popen(
        [*STANDBYCTL, "--cluster", str(own_cluster.cluster_file), "snapshot", "rollback", "roll@good"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while len(own_cluster.cli("snapshot", "list", "roll")) == 1:
        assert rolling.poll() is None
    rolling.kill()
    rolling.wait()
    (undo,) = [each["name"] for each in own_cluster.cli("snapshot", "list", "roll") if each["name"] != "good"]
    assert snapshot(own_cluster, undo) == bad
    own_cluster.cli("snapshot", "rollback", "roll@good")
    assert both(own_cluster) == bytes(4 * SIZE)


def test_a_volume_out_of_sync_or_a_missing_snapshot_is_not_rolled_back(own_cluster: LocalCluster) -> None:
    own_cluster.cli("volume", "create", "roll", "--size", str(SIZE))
    own_cluster.cli("snapshot", "create", "roll", "--name", "good")
    missing = own_cluster.run("snapshot", "rollback", "roll@never")
    assert (missing.code, missing.error) == (1, "roll@never: there is no such snapshot")
    own_cluster.kill("standby")
    failed = own_cluster.run("snapshot", "rollback", "roll@good")
    assert failed.code == 1
    assert failed.error
