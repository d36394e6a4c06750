"""Limits on the snapshots of a volume: set, kept, shown, and kept to."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.cluster import LocalCluster
from tests.support.requirements import requires_tools

pytestmark = [requires_tools("qemu-io", "nbdcopy"), pytest.mark.timeout(240)]

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
def cluster(local_cluster: LocalCluster) -> Iterator[LocalCluster]:
    local_cluster.cli("volume", "create", "lim", "--size", str(SIZE))
    yield local_cluster
    local_cluster.run("volume", "delete", "lim", "--force")


def write(cluster: LocalCluster, pattern: int) -> None:
    uri = f"{cluster.env['primary']['nbd']}/lim"
    command = ["qemu-io", "-f", "raw", "-c", f"write -P {pattern} 0 {SIZE}", "-c", "flush", uri]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def read(cluster: LocalCluster, name: str) -> bytes:
    uri = f"{cluster.env['standby']['nbd']}/lim@{name}"
    return subprocess.run(["nbdcopy", uri, "-"], check=True, capture_output=True, timeout=60).stdout


def policy(cluster: LocalCluster, *options: str) -> Any:
    return cluster.cli("snapshot", "policy", "lim", *options)


def create(cluster: LocalCluster, name: str) -> None:
    cluster.cli("snapshot", "create", "lim", "--name", name)


def states(cluster: LocalCluster) -> dict[str, str]:
    return {each["name"]: each["state"] for each in cluster.cli("snapshot", "list", "lim")}


def test_a_limit_on_the_count_refuses_one_more_or_takes_the_oldest_that_is_not_protected(cluster: LocalCluster) -> None:
    assert policy(cluster, "--count", "2")["own"] == ["count_max"]
    create(cluster, "a")
    create(cluster, "b")
    refused = cluster.run("snapshot", "create", "lim", "--name", "c")
    assert (refused.code, refused.error) == (
        1,
        "lim@c: the volume has 2 snapshots and may have 2; delete one first",
    )
    cluster.cli("snapshot", "protect", "lim@a")
    policy(cluster, "--expire", "yes")
    create(cluster, "c")
    create(cluster, "d")
    assert states(cluster) == {"a": "active", "d": "active"}
    cluster.cli("snapshot", "protect", "lim@d")
    assert cluster.run("snapshot", "create", "lim", "--name", "e").code == 1
    assert states(cluster) == {"a": "active", "d": "active"}
    for name in ("a", "d"):
        cluster.cli("snapshot", "unprotect", f"lim@{name}")


@pytest.mark.parametrize("expire", ["yes", "no"])
def test_a_limit_on_room_takes_the_oldest_that_is_not_protected_and_no_write(
    cluster: LocalCluster, expire: str
) -> None:
    policy(cluster, "--bytes", "9MiB", "--expire", expire)
    for number, name in enumerate(("kept", "b", "c"), start=1):
        write(cluster, number)
        create(cluster, name)
        if name == "kept":
            cluster.cli("snapshot", "protect", "lim@kept")
    write(cluster, 4)
    assert states(cluster) == (
        {"kept": "active", "c": "active"} if expire == "yes" else {"kept": "active", "b": "invalid", "c": "active"}
    )
    assert read(cluster, "kept") == b"\1" * SIZE
    assert read(cluster, "c") == b"\3" * SIZE
    with open(cluster.env["volumes"]["lim"]["mirror_path"], "rb") as mirror:
        assert mirror.read() == b"\4" * SIZE
    held = policy(cluster)
    assert (held["preserved_bytes"], held["preserved_bytes_max"]) == (2 * SIZE, 9 * MIB)
    refused = cluster.run("snapshot", "policy", "lim", "--bytes", "1MiB")
    assert refused.code == 1
    assert refused.error.endswith("delete some first")
    assert policy(cluster)["preserved_bytes_max"] == 9 * MIB
    cluster.cli("snapshot", "unprotect", "lim@kept")


def test_limits_are_kept_over_the_death_of_the_standby_and_go_back_to_the_nodes(own_cluster: LocalCluster) -> None:
    own_cluster.cli("volume", "create", "lim", "--size", str(SIZE))
    none = {
        "volume": "lim",
        "expire": False,
        "count_max": 0,
        "preserved_bytes_max": 0,
        "own": [],
        "count": 0,
        "preserved_bytes": 0,
    }
    assert own_cluster.cli("snapshot", "policy") == [none]
    own = {"expire": True, "count_max": 7, "own": ["expire", "count_max"]}
    assert policy(own_cluster, "--count", "7", "--expire", "yes") == none | own
    own_cluster.kill("standby")
    own_cluster.start("standby")
    assert policy(own_cluster) == none | own
    assert policy(own_cluster, "--count", "default", "--expire", "default") == none


def test_what_is_no_limit_is_wrong_usage(local_cluster: LocalCluster) -> None:
    for options in (("vol", "--count", "0"), ("vol", "--bytes", "x"), ("--count", "3")):
        failed = local_cluster.run("snapshot", "policy", *options)
        assert failed.code == 2
        assert failed.error
