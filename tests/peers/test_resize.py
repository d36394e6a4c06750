"""A volume grows on both nodes while it is used and has snapshots."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stillpoint.cli.cluster import load_cluster
from stillpoint.cli.nodes import Nodes
from stillpoint.nbd.client import NbdClient
from stillpoint.wire.v1 import standby_pb2
from tests.support.cluster import LocalCluster
from tests.support.requirements import requires_tools

pytestmark = [requires_tools("qemu-io", "nbdcopy", "nbdinfo"), pytest.mark.timeout(240)]

MIB = 1 << 20
SMALL, LARGE = 8 * MIB, 24 * MIB
BLOCK = 64 << 10


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster.up(tmp_path / "cluster", f"vol:{SMALL}") as cluster:
        yield cluster


def uri(cluster: LocalCluster) -> str:
    return f"{cluster.env['primary']['nbd']}/vol"


def run(*command: str | Path) -> bytes:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=60).stdout


def qemu_io(cluster: LocalCluster, *commands: str) -> None:
    run("qemu-io", "-f", "raw", *(word for command in commands for word in ("-c", command)), uri(cluster))


def both(cluster: LocalCluster) -> bytes:
    """The content of the volume, which is the same on both nodes."""
    qemu_io(cluster, "flush")
    paths = cluster.env["volumes"]["vol"]
    primary, mirror = (Path(paths[name]).read_bytes() for name in ("primary_path", "mirror_path"))
    assert primary == mirror
    return primary


def snapshot(cluster: LocalCluster, name: str) -> bytes:
    return run("nbdcopy", f"{cluster.env['standby']['nbd']}/vol@{name}", "-")


def state(cluster: LocalCluster) -> str:
    word: str = cluster.cli("volume", "show", "vol")["pair"]["state"]
    return word


def resize_mirror_only(cluster: LocalCluster, size: int) -> None:
    """As if the primary had been killed right after the mirror had grown."""

    async def call() -> None:
        known = load_cluster(cluster.cluster_file)
        assert known.tls is not None
        # Only the other data node may ask for that.
        peer = replace(known, tls=replace(known.tls, directory=known.tls.directory.with_name("primary")))
        async with Nodes(peer) as nodes:
            volume_uuid = cluster.cli("volume", "show", "vol")["uuid"]
            request = standby_pb2.ResizeMirrorRequest(volume="vol", volume_uuid=volume_uuid, size=size)
            await nodes.standby.call("ResizeMirror", request, standby_pb2.Mirror)

    asyncio.run(call())


def test_a_volume_grows_with_its_snapshots_alive_and_the_new_space_counts_as_written(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(random.Random(2).randbytes(SMALL))
    run("nbdcopy", "--flush", image, uri(cluster))
    cluster.cli("snapshot", "create", "vol", "--name", "small")
    assert cluster.cli("volume", "resize", "vol", "--size", str(LARGE))["size"] == LARGE
    assert state(cluster) == "in_sync"
    assert both(cluster) == image.read_bytes() + bytes(LARGE - SMALL)
    qemu_io(cluster, "write -P 5 0 1M", f"write -P 6 {LARGE - MIB} 1M")
    cluster.cli("snapshot", "create", "vol", "--name", "large")
    qemu_io(cluster, "write -P 7 0 24M")
    assert snapshot(cluster, "small") == image.read_bytes()
    large = snapshot(cluster, "large")
    assert large[:MIB] == b"\5" * MIB
    assert large[SMALL:] == bytes(LARGE - SMALL - MIB) + b"\6" * MIB
    bitmap = json.loads(
        run("nbdinfo", "--json", "--map=qemu:dirty-bitmap:small", f"{cluster.env['standby']['nbd']}/vol@large")
    )
    assert [(each["offset"], each["length"]) for each in bitmap if each["type"] == 1] == [
        (0, MIB),
        (SMALL, LARGE - SMALL),
    ]
    for node in ("standby", "primary"):
        cluster.kill(node)
        cluster.start(node)
    assert snapshot(cluster, "small") == image.read_bytes()
    assert snapshot(cluster, "large") == large
    assert both(cluster) == b"\7" * LARGE
    # And a rollback across the growth leaves zeroes where the snapshot had nothing.
    cluster.cli("snapshot", "rollback", "vol@small")
    assert both(cluster) == image.read_bytes() + bytes(LARGE - SMALL)


def test_clients_go_on_writing_while_the_volume_grows(cluster: LocalCluster) -> None:
    async def main() -> int:
        written = 0
        grown = asyncio.create_task(asyncio.to_thread(cluster.cli, "volume", "resize", "vol", "--size", str(LARGE)))
        async with await NbdClient.connect(uri(cluster)) as client:
            while not grown.done():
                await client.write(written % 128 * BLOCK, bytes([written % 251]) * BLOCK)
                written += 1
            await client.flush()
        await grown
        async with await NbdClient.connect(uri(cluster)) as client:
            assert client.size == LARGE
            await client.write(LARGE - 4096, b"\1" * 4096)
        return written

    assert asyncio.run(main()) > 0
    assert both(cluster)[-4096:] == b"\1" * 4096
    assert state(cluster) == "in_sync"


def test_a_growth_that_ended_after_the_mirror_is_no_harm_and_can_be_asked_for_again(cluster: LocalCluster) -> None:
    cluster.cli("snapshot", "create", "vol", "--name", "s1")
    resize_mirror_only(cluster, LARGE)
    qemu_io(cluster, "write -P 1 0 1M", "flush")
    for node in ("standby", "primary"):
        cluster.kill(node)
        cluster.start(node)
        while state(cluster) != "in_sync":
            pass
    assert cluster.cli("volume", "show", "vol")["size"] == SMALL
    assert cluster.cli("volume", "resize", "vol", "--size", str(LARGE))["size"] == LARGE
    assert both(cluster) == b"\1" * MIB + bytes(LARGE - MIB)
    assert snapshot(cluster, "s1") == bytes(SMALL)


def test_a_size_that_makes_no_sense_or_a_standby_that_is_away_changes_nothing(cluster: LocalCluster) -> None:
    for size in (SMALL - BLOCK, SMALL + 1):
        assert cluster.run("volume", "resize", "vol", "--size", str(size)).code == 1
    cluster.kill("standby")
    failed = cluster.run("volume", "resize", "vol", "--size", str(LARGE))
    assert failed.code == 1
    assert "standby" in failed.error
    assert cluster.cli("volume", "show", "vol")["size"] == SMALL
