"""Who reads a snapshot, and that it does not go away under them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from stillpoint.cli.cluster import load_cluster
from stillpoint.cli.nodes import Nodes
from stillpoint.nbd.client import NbdClient
from stillpoint.wire import streams
from stillpoint.wire.chunks import DecodedChunk, decode
from stillpoint.wire.v1 import export_pb2
from tests.support.cluster import STANDBYCTL, LocalCluster
from tests.support.requirements import requires_tools

pytestmark = [requires_tools("qemu-io"), pytest.mark.timeout(240)]

MIB = 1 << 20
SIZE = 64 * MIB
BLOCK = 64 << 10


@pytest.fixture
def cluster(local_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """A volume `read` with 32 MiB of data and a snapshot s1."""
    local_cluster.cli("volume", "create", "read", "--size", str(SIZE))
    qemu_io(f"{local_cluster.env['primary']['nbd']}/read", "write -P 1 0 32M", "flush")
    local_cluster.cli("snapshot", "create", "read", "--name", "s1")
    yield local_cluster
    local_cluster.run("volume", "delete", "read", "--force")


def qemu_io(uri: str, *commands: str) -> None:
    options = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "raw", *options, uri], check=True, capture_output=True, timeout=60)


@contextmanager
def nbd_reader(cluster: LocalCluster) -> Iterator[None]:
    """A client that holds the snapshot open."""
    uri = f"{cluster.env['standby']['nbd']}/read@s1"
    client = subprocess.Popen(["qemu-io", "-r", "-f", "raw", uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert client.stdin is not None and client.stdout is not None
    try:
        client.stdin.write(b"read 0 64k\n")
        client.stdin.flush()
        assert b"read" in client.stdout.readline()
        yield
    finally:
        client.communicate(b"quit\n", timeout=20)


def show(cluster: LocalCluster) -> Any:
    return cluster.cli("snapshot", "show", "read@s1")


def test_a_snapshot_is_not_deleted_under_an_nbd_client(cluster: LocalCluster) -> None:
    with nbd_reader(cluster):
        shown = show(cluster)
        assert shown["readers"] == 1
        assert shown["reader_names"][0].startswith("NBD client 127.0.0.1:")
        (listed,) = cluster.cli("snapshot", "list", "read")
        assert listed["readers"] == 1
        refused = cluster.run("snapshot", "delete", "read@s1", "--bookmark", "kept")
        assert refused.code == 1
        assert refused.error.startswith("snapshot read@s1 is being read by NBD client 127.0.0.1:")
        assert "--wait" in refused.error
        assert cluster.cli("bookmark", "list", "read") == []
        assert show(cluster)["state"] == "active"
    cluster.cli("snapshot", "delete", "read@s1")
    assert cluster.cli("snapshot", "list", "read") == []


def test_a_deletion_can_wait_for_the_reader_to_end(cluster: LocalCluster) -> None:
    with nbd_reader(cluster):
        deleting = subprocess.Popen(
            [*STANDBYCTL, "--cluster", str(cluster.cluster_file), "snapshot", "delete", "read@s1", "--wait"],
            stdin=subprocess.DEVNULL,
        )
        time.sleep(3)
        assert deleting.poll() is None
        assert show(cluster)["state"] == "active"
    assert deleting.wait(timeout=20) == 0
    assert cluster.cli("snapshot", "list", "read") == []


def test_a_snapshot_is_not_deleted_under_a_grpc_stream(cluster: LocalCluster) -> None:
    async def main() -> None:
        async with Nodes(load_cluster(cluster.cluster_file)) as nodes:
            request = export_pb2.ReadSnapshotRequest(volume="read", snapshot="s1")
            stream = aiter(streams.read_snapshot(nodes.export.channel, request))
            await anext(stream)  # and then read no further: the rest does not fit the connection's window
            refused = await asyncio.to_thread(cluster.run, "snapshot", "delete", "read@s1")
            assert refused.code == 1
            assert refused.error.startswith("snapshot read@s1 is being read by gRPC client ")
            async for _ in stream:
                pass

    asyncio.run(main())
    cluster.cli("snapshot", "delete", "read@s1")


def test_parts_of_a_snapshot_are_read_by_one_call_and_parts_that_make_no_sense_are_refused(
    cluster: LocalCluster,
) -> None:
    async def read(parts: list[tuple[int, int]], lengths: list[int] | None = None) -> list[DecodedChunk]:
        async with Nodes(load_cluster(cluster.cluster_file)) as nodes:
            request = export_pb2.ReadSnapshotRequest(
                volume="read",
                snapshot="s1",
                offsets=[offset for offset, _ in parts],
                lengths=[length for _, length in parts] if lengths is None else lengths,
            )
            return [decode(message) async for message in streams.read_snapshot(nodes.export.channel, request)]

    whole = bytearray()
    for chunk in asyncio.run(read([(0, 1 << 20)])):
        whole += bytes(chunk.hole_length) or chunk.data
    parts = [(0, 512), (1024, 70_000), (500_000, 1)]
    pieces = {offset: b"" for offset, _ in parts}
    for chunk in asyncio.run(read(parts)):
        start = max(offset for offset in pieces if offset <= chunk.offset)
        pieces[start] += bytes(chunk.hole_length) or bytes(chunk.data)
    assert pieces == {offset: bytes(whole[offset : offset + length]) for offset, length in parts}
    for wrong in ([(512, 512), (0, 512)], [(0, 512), (511, 512)], [(0, 0), (512, 1)], [(1 << 40, 512)], [(0, 1 << 40)]):
        with pytest.raises(grpc.RpcError, match=r"INVALID_ARGUMENT|OUT_OF_RANGE"):
            asyncio.run(read(wrong))
    with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
        asyncio.run(read([(0, 512), (1024, 512)], lengths=[512]))


def test_a_protected_snapshot_is_deleted_only_when_it_is_unprotected(cluster: LocalCluster) -> None:
    assert cluster.cli("snapshot", "protect", "read@s1")["protected"]
    refused = cluster.run("snapshot", "delete", "read@s1")
    assert (refused.code, refused.error) == (1, "snapshot read@s1 is protected; `snapshot unprotect` it first")
    assert show(cluster)["protected"]
    assert not cluster.cli("snapshot", "unprotect", "read@s1")["protected"]
    cluster.cli("snapshot", "delete", "read@s1")


def test_show_tells_what_a_deletion_gives_back_and_what_is_shared(cluster: LocalCluster) -> None:
    uri = f"{cluster.env['primary']['nbd']}/read"
    qemu_io(uri, "write -P 2 0 64k", "flush")
    cluster.cli("snapshot", "create", "read", "--name", "s2")
    qemu_io(uri, "write -P 3 0 128k", "flush")
    newer = cluster.cli("snapshot", "show", "read@s2")
    # Block 0 changed between the two; block 1 did not, so what s2 keeps of it is what s1 reads too.
    assert newer["preserved_blocks"] == 2
    assert (newer["reclaimable_bytes"], newer["shared_bytes"]) == (BLOCK, BLOCK)
    older = show(cluster)
    assert (older["preserved_blocks"], older["reclaimable_bytes"], older["shared_bytes"]) == (1, BLOCK, 0)


def test_a_killed_export_process_leaves_no_reader_behind(cluster: LocalCluster) -> None:
    async def main() -> None:
        client = await NbdClient.connect(f"{cluster.env['standby']['nbd']}/read@s1")
        try:
            assert show(cluster)["readers"] == 1
            os.kill(cluster.env["standby"]["export_pid"], signal.SIGKILL)
            await asyncio.to_thread(cluster.cli, "snapshot", "delete", "read@s1")
        finally:
            await client.close()

    asyncio.run(main())
