"""Writable virtual devices: what is written to one stays there, and is there after a restart."""

from __future__ import annotations

import asyncio
import errno
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from stillpoint.cli.cluster import load_cluster
from stillpoint.cli.nodes import Nodes
from stillpoint.errors import DataCorrupt, InvalidRequest, OutOfRange, PermissionRefused
from stillpoint.nbd import constants as c
from stillpoint.wire import chunks, streams
from stillpoint.wire.status import from_rpc_error
from stillpoint.wire.v1 import common_pb2, export_pb2, export_pb2_grpc
from tests.support.cluster import LocalCluster
from tests.support.nbd import RawClient
from tests.support.requirements import requires_tools

pytestmark = [requires_tools("qemu-io", "nbdcopy", "nbdinfo"), pytest.mark.timeout(240)]

MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture
def cluster(local_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """A volume `base` full of ones."""
    local_cluster.cli("volume", "create", "base", "--size", str(SIZE))
    qemu_io(volume(local_cluster), f"write -P 1 0 {SIZE}", "flush")
    yield local_cluster
    local_cluster.run("volume", "delete", "base", "--force")


def volume(cluster: LocalCluster) -> str:
    return f"{cluster.env['primary']['nbd']}/base"


def device(cluster: LocalCluster, name: str) -> str:
    return f"{cluster.env['standby']['nbd']}/base@{name}"


def try_qemu_io(uri: str, *commands: str) -> subprocess.CompletedProcess[str]:
    options = [word for command in commands for word in ("-c", command)]
    command = ["qemu-io", "-f", "raw", "-d", "unmap", *options, uri]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def qemu_io(uri: str, *commands: str) -> None:
    done = try_qemu_io(uri, *commands)
    assert done.returncode == 0, done.stdout + done.stderr


def read(uri: str) -> bytes:
    return subprocess.run(["nbdcopy", uri, "-"], check=True, capture_output=True, timeout=60).stdout


def both(cluster: LocalCluster) -> bytes:
    paths = cluster.env["volumes"]["base"]
    primary, mirror = (Path(paths[name]).read_bytes() for name in ("primary_path", "mirror_path"))
    assert primary == mirror
    return primary


WRITTEN = b"\1" * 100 + b"\2" * 200 + b"\1" * (MIB - 300) + b"\3" * MIB + bytes(MIB) + b"\1" * (SIZE - 3 * MIB)
WRITES = ("write -P 2 100 200", "write -P 3 1M 1M", "discard 2M 1M", "flush")


def test_what_is_written_to_a_virtual_device_is_seen_there_and_nowhere_else(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    made = cluster.cli("snapshot", "create", "base", "--name", "w", "--writable")
    assert made["writable"]
    cluster.cli("snapshot", "create", "base", "--name", "other")
    qemu_io(device(cluster, "w"), *WRITES)
    assert read(device(cluster, "w")) == WRITTEN
    assert read(device(cluster, "other")) == both(cluster) == b"\1" * SIZE
    # The volume goes on without disturbing what was written, and what was not written stays as it was.
    qemu_io(volume(cluster), f"write -P 9 0 {SIZE}", "flush")
    assert read(device(cluster, "w")) == WRITTEN
    assert read(device(cluster, "other")) == b"\1" * SIZE
    backup = cluster.cli("backup", "run", "base", "--snapshot", "w")["id"]
    cluster.cli("backup", "restore", backup, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"\1" * SIZE
    cluster.cli("backup", "delete", backup)
    cluster.cli("snapshot", "delete", "base@w")
    cluster.cli("snapshot", "create", "base", "--name", "w", "--writable")
    assert read(device(cluster, "w")) == b"\x09" * SIZE


def test_what_was_flushed_survives_the_death_of_the_standby(own_cluster: LocalCluster) -> None:
    own_cluster.cli("volume", "create", "base", "--size", str(SIZE))
    qemu_io(volume(own_cluster), f"write -P 1 0 {SIZE}", "flush")
    own_cluster.cli("snapshot", "create", "base", "--name", "w", "--writable")
    qemu_io(device(own_cluster, "w"), *WRITES)
    own_cluster.kill("standby")
    own_cluster.start("standby")
    assert own_cluster.cli("snapshot", "show", "base@w")["writable"]
    assert read(device(own_cluster, "w")) == WRITTEN
    qemu_io(device(own_cluster, "w"), "write -P 4 0 4k")
    assert read(device(own_cluster, "w"))[:4096] == b"\4" * 4096


def test_a_read_only_device_refuses_a_write_until_it_is_exported_writable(cluster: LocalCluster) -> None:
    cluster.cli("snapshot", "create", "base", "--name", "s")
    info = subprocess.run(
        ["nbdinfo", "--is", "read-only", device(cluster, "s")], capture_output=True, timeout=60, check=False
    )
    assert info.returncode == 0
    with RawClient(int(cluster.env["standby"]["nbd"].rpartition(":")[2])) as client:
        client.go("base@s", structured=False)
        assert client.ask(c.Command.WRITE, 0, 4096, payload=b"w" * 4096) == errno.EPERM
        assert client.ask(c.Command.WRITE_ZEROES, 0, 4096) == errno.EPERM
        assert client.ask(c.Command.TRIM, 0, 4096) == errno.EPERM
    with pytest.raises(PermissionRefused, match="base@s is read-only"):
        grpc_write(cluster, "s", chunk(0, b"w"))
    assert read(device(cluster, "s")) == b"\1" * SIZE
    assert not cluster.cli("snapshot", "export", "base@s")["writable"]
    exported = cluster.cli("snapshot", "export", "base@s", "--writable")
    assert (exported["writable"], exported["uri"]) == (True, device(cluster, "s"))
    qemu_io(device(cluster, "s"), "write -P 2 0 4k", "flush")
    cluster.cli("snapshot", "export", "base@s", "--writable")
    assert read(device(cluster, "s")) == b"\2" * 4096 + b"\1" * (SIZE - 4096)


def grpc_write(cluster: LocalCluster, name: str, *written: common_pb2.Chunk) -> int:
    """The bytes written, as the standby counts them."""

    async def call() -> int:
        async with Nodes(load_cluster(cluster.cluster_file)) as nodes:
            stub: Any = export_pb2_grpc.ExportServiceStub
            parts = [export_pb2.WriteSnapshotPart(chunk=each) for each in written]
            parts[0].volume, parts[0].snapshot = "base", name
            try:
                answer = await stub(nodes.export.channel).WriteSnapshot(iter(parts))
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error, peer="export process") from None
            return int(answer.written_bytes)

    return asyncio.run(call())


def grpc_read(cluster: LocalCluster, name: str, *, with_writes: bool) -> bytes:
    async def call() -> bytes:
        content = bytearray(SIZE)
        async with Nodes(load_cluster(cluster.cluster_file)) as nodes:
            request = export_pb2.ReadSnapshotRequest(volume="base", snapshot=name, with_writes=with_writes)
            async for message in streams.read_snapshot(nodes.export.channel, request):
                part = chunks.decode(message)
                content[part.offset : part.offset + len(part.data)] = part.data
        return bytes(content)

    return asyncio.run(call())


def chunk(offset: int, data: bytes) -> common_pb2.Chunk:
    return common_pb2.Chunk.FromString(chunks.encode_data(offset, data))


def test_what_is_written_over_grpc_is_what_the_nbd_clients_of_the_device_read(cluster: LocalCluster) -> None:
    cluster.cli("snapshot", "create", "base", "--name", "w", "--writable")
    hole = common_pb2.Chunk(offset=2 * MIB, hole_length=MIB)
    written = [chunk(100, b"\2" * 200), chunk(MIB, b"\3" * MIB), hole]
    assert grpc_write(cluster, "w", *written) == 200 + 2 * MIB
    assert read(device(cluster, "w")) == grpc_read(cluster, "w", with_writes=True) == WRITTEN
    assert grpc_read(cluster, "w", with_writes=False) == both(cluster) == b"\1" * SIZE
    damaged = chunk(0, b"x")
    damaged.crc32 ^= 1
    for bad, refusal in (
        (damaged, DataCorrupt),
        (common_pb2.Chunk(offset=SIZE - 1, hole_length=2), OutOfRange),
        (common_pb2.Chunk(data=b"x", crc32=damaged.crc32 ^ 1, hole_length=1), InvalidRequest),
    ):
        with pytest.raises(refusal):
            grpc_write(cluster, "w", bad)
    assert read(device(cluster, "w")) == WRITTEN


def test_the_dirty_bitmaps_of_a_writable_device_tell_what_was_written_to_it_too(cluster: LocalCluster) -> None:
    cluster.cli("snapshot", "create", "base", "--name", "before")
    qemu_io(volume(cluster), "write -P 5 8M 1")
    cluster.cli("snapshot", "create", "base", "--name", "w", "--writable")
    qemu_io(device(cluster, "w"), "write -P 2 100 200", "discard 2M 1M", "flush")
    told = subprocess.run(
        ["nbdinfo", "--json", "--map=qemu:dirty-bitmap:before", device(cluster, "w")],
        check=True,
        capture_output=True,
        timeout=60,
    )
    dirty = [(each["offset"], each["length"]) for each in json.loads(told.stdout) if each["type"] == 1]
    assert dirty == [(0, 65536), (2 * MIB, MIB), (8 * MIB, 65536)]


def test_a_volume_is_not_rolled_back_to_a_snapshot_that_was_written_to(cluster: LocalCluster) -> None:
    cluster.cli("snapshot", "create", "base", "--name", "w", "--writable")
    refused = cluster.run("snapshot", "rollback", "base@w")
    assert refused.code == 1
    assert refused.error == "snapshot base@w is writable, so it may no longer hold what the volume held"
