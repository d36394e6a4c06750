"""Incremental reads of snapshots: over gRPC, and by tools that know nothing of us, over NBD."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillpoint.cli.cluster import load_cluster
from stillpoint.cli.nodes import Nodes
from stillpoint.wire.v1 import export_pb2
from tests.support.cluster import LocalCluster
from tests.support.requirements import requires_tools

pytestmark = [requires_tools("nbdinfo", "qemu-img", "qemu-io", "nbdcopy"), pytest.mark.timeout(240)]

KIB = 1 << 10
MIB = 1 << 20
BLOCK = 64 * KIB
SIZE = 64 * MIB
# More extents than one message of the answer holds.
MANY = 4200


@pytest.fixture(scope="module")
def cluster(local_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """A volume `inc` with snapshots s1, s2, s3 and what was written between them."""
    local_cluster.cli("volume", "create", "inc", "--size", str(SIZE))
    qemu_io(volume_uri(local_cluster), "write -P 1 0 8M")
    local_cluster.cli("snapshot", "create", "inc", "--name", "s1")
    qemu_io(volume_uri(local_cluster), "write -P 2 1M 64k", "discard 3M 128k", "write -P 3 16M 1")
    local_cluster.cli("snapshot", "create", "inc", "--name", "s2")
    qemu_io(volume_uri(local_cluster), "write -P 4 5M 64k", "flush")
    local_cluster.cli("snapshot", "create", "inc", "--name", "s3")
    yield local_cluster
    local_cluster.run("volume", "delete", "inc", "--force")


def volume_uri(cluster: LocalCluster, volume: str = "inc") -> str:
    return f"{cluster.env['primary']['nbd']}/{volume}"


def snapshot_uri(cluster: LocalCluster, name: str, volume: str = "inc") -> str:
    return f"{cluster.env['standby']['nbd']}/{volume}@{name}"


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def qemu_io(uri: str, *commands: str) -> None:
    options = [word for command in commands for word in ("-c", command)]
    assert "failed" not in run("qemu-io", "-f", "raw", "-d", "unmap", *options, uri)


def ask(cluster: LocalCluster, snapshot: str, volume: str = "inc", **base: Any) -> list[export_pb2.ChangedExtentsPart]:
    async def call() -> list[export_pb2.ChangedExtentsPart]:
        async with Nodes(load_cluster(cluster.cluster_file)) as nodes:
            request = export_pb2.ChangedExtentsRequest(volume=volume, snapshot=snapshot, **base)
            return [
                part async for part in nodes.export.stream("ChangedExtents", request, export_pb2.ChangedExtentsPart)
            ]

    return asyncio.run(call())


def describe(cluster: LocalCluster, snapshot: str) -> export_pb2.SnapshotDescription:
    async def call() -> export_pb2.SnapshotDescription:
        async with Nodes(load_cluster(cluster.cluster_file)) as nodes:
            request = export_pb2.DescribeSnapshotRequest(volume="inc", snapshot=snapshot)
            return await nodes.export.call("DescribeSnapshot", request, export_pb2.SnapshotDescription)

    return asyncio.run(call())


def extents(parts: list[export_pb2.ChangedExtentsPart]) -> list[tuple[int, int]]:
    assert parts[0].known
    return [pair for part in parts for pair in zip(part.offsets, part.lengths, strict=True)]


def dirty(cluster: LocalCluster, snapshot: str, base: str, volume: str = "inc") -> list[tuple[int, int]]:
    """What nbdinfo says changed."""
    uri = snapshot_uri(cluster, snapshot, volume)
    found = json.loads(run("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{base}", uri))
    assert sum(each["length"] for each in found) == SIZE
    return [(each["offset"], each["length"]) for each in found if each["type"] == 1]


BETWEEN_S1_AND_S2 = [(1 * MIB, BLOCK), (3 * MIB, 2 * BLOCK), (16 * MIB, BLOCK)]
BETWEEN_S2_AND_S3 = [(5 * MIB, BLOCK)]


def test_changed_extents_over_grpc_are_what_was_written_between_two_snapshots(cluster: LocalCluster) -> None:
    assert extents(ask(cluster, "s2", base="s1")) == BETWEEN_S1_AND_S2
    assert extents(ask(cluster, "s3", base="s2")) == BETWEEN_S2_AND_S3
    assert extents(ask(cluster, "s3", base="s1")) == sorted(BETWEEN_S1_AND_S2 + BETWEEN_S2_AND_S3)


def test_an_instant_may_be_named_by_its_incarnation_and_generation(cluster: LocalCluster) -> None:
    base = describe(cluster, "s1")
    assert base.incarnation == describe(cluster, "s3").incarnation
    parts = ask(cluster, "s2", base_incarnation=base.incarnation, base_generation=base.generation)
    assert extents(parts) == BETWEEN_S1_AND_S2


@pytest.mark.parametrize(
    "base",
    [
        {"base_incarnation": "0d0c5a0e-0000-4000-8000-000000000000", "base_generation": 1},
        {"base_generation": 1},
        {"base": "never-made"},
        {"base": "s3"},
    ],
    ids=["another life", "no life", "no such name", "a later snapshot"],
)
def test_an_unknown_base_means_everything_and_never_unchanged(cluster: LocalCluster, base: dict[str, Any]) -> None:
    (part,) = ask(cluster, "s2", **base)
    assert not part.known
    assert (list(part.offsets), list(part.lengths)) == ([0], [SIZE])


def test_the_same_snapshot_as_base_means_no_change(cluster: LocalCluster) -> None:
    (part,) = ask(cluster, "s2", base="s2")
    assert part.known
    assert not part.offsets


def test_nbdinfo_lists_and_maps_the_changes(cluster: LocalCluster) -> None:
    export = json.loads(run("nbdinfo", "--json", snapshot_uri(cluster, "s3")))["exports"][0]
    assert sorted(export["contexts"]) == ["base:allocation", "qemu:dirty-bitmap:s1", "qemu:dirty-bitmap:s2"]
    assert dirty(cluster, "s2", "s1") == BETWEEN_S1_AND_S2
    assert dirty(cluster, "s3", "s2") == BETWEEN_S2_AND_S3


def test_nbdinfo_is_told_that_a_later_snapshot_is_no_base(cluster: LocalCluster) -> None:
    uri = snapshot_uri(cluster, "s1")
    done = subprocess.run(["nbdinfo", "--map=qemu:dirty-bitmap:s2", uri], capture_output=True, timeout=60, check=False)
    assert done.returncode != 0


def test_qemu_img_maps_the_changes_through_its_dirty_bitmap_option(cluster: LocalCluster) -> None:
    port = snapshot_uri(cluster, "s2").split(":")[2].split("/")[0]
    options = (
        f"driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={port},export=inc@s2,"
        "x-dirty-bitmap=qemu:dirty-bitmap:s1"
    )
    found = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", options))
    # With that option qemu tells the bitmap as if it were allocation: what is dirty looks like a hole.
    assert [(each["start"], each["length"]) for each in found if not each["data"]] == BETWEEN_S1_AND_S2


def test_a_copy_is_brought_up_to_date_with_what_changed(cluster: LocalCluster, tmp_path: Path) -> None:
    run("nbdcopy", snapshot_uri(cluster, "s1"), tmp_path / "copy")
    run("nbdcopy", snapshot_uri(cluster, "s3"), tmp_path / "new")
    with (tmp_path / "copy").open("r+b") as copy, (tmp_path / "new").open("rb") as new:
        for offset, length in dirty(cluster, "s3", "s1"):
            new.seek(offset)
            copy.seek(offset)
            copy.write(new.read(length))
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "new").read_bytes()


def test_more_extents_than_one_message_holds_arrive_in_bounded_parts(local_cluster: LocalCluster) -> None:
    local_cluster.cli("volume", "create", "many", "--size", str(SIZE), "--block-size", "4096")
    try:
        local_cluster.cli("snapshot", "create", "many", "--name", "s1")
        offsets = [8192 * index for index in range(MANY)]
        shuffled = random.Random(1).sample(offsets, len(offsets))
        for start in range(0, MANY, 1400):
            qemu_io(volume_uri(local_cluster, "many"), *(f"write -P 1 {at} 1" for at in shuffled[start : start + 1400]))
        local_cluster.cli("snapshot", "create", "many", "--name", "s2")
        parts = ask(local_cluster, "s2", "many", base="s1")
        assert all(len(part.offsets) <= 4096 for part in parts)
        assert extents(parts) == [(at, 4096) for at in offsets]
        assert dirty(local_cluster, "s2", "s1", "many") == [(at, 4096) for at in offsets]
    finally:
        local_cluster.run("volume", "delete", "many", "--force")


def test_a_bookmark_outlives_its_snapshot_as_a_base(local_cluster: LocalCluster) -> None:
    local_cluster.cli("volume", "create", "marked", "--size", str(SIZE))
    try:
        local_cluster.cli("snapshot", "create", "marked", "--name", "s1")
        deleted = local_cluster.cli("snapshot", "delete", "marked@s1", "--bookmark", "monday")
        assert deleted == {"deleted": "marked@s1", "bookmark": "monday"}
        (bookmark,) = local_cluster.cli("bookmark", "list", "marked")
        assert (bookmark["id"], bookmark["volume"], bookmark["name"]) == ("marked@monday", "marked", "monday")
        qemu_io(volume_uri(local_cluster, "marked"), "write -P 1 2M 64k")
        local_cluster.cli("snapshot", "create", "marked", "--name", "s2")
        assert extents(ask(local_cluster, "s2", "marked", base="monday")) == [(2 * MIB, BLOCK)]
        assert dirty(local_cluster, "s2", "monday", "marked") == [(2 * MIB, BLOCK)]
        assert local_cluster.cli("bookmark", "delete", "marked@monday") == {"deleted": "marked@monday"}
        assert local_cluster.cli("bookmark", "list", "marked") == []
        assert not ask(local_cluster, "s2", "marked", base="monday")[0].known
        missing = local_cluster.run("bookmark", "delete", "marked@monday")
        assert (missing.code, missing.error) == (1, "marked: there is no bookmark monday")
    finally:
        local_cluster.run("volume", "delete", "marked", "--force")
