"""A snapshot that the engine ends by itself: nobody finds it any more, and whoever reads it is told of an error."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from stillpoint.cli.cluster import load_cluster
from stillpoint.cli.nodes import Nodes
from stillpoint.errors import DataCorrupt, NotFound
from stillpoint.nbd import constants as c
from stillpoint.nbd.codec import GoRequest
from stillpoint.wire import chunks, streams
from stillpoint.wire.status import from_rpc_error
from stillpoint.wire.v1 import export_pb2
from tests.support.cluster import LocalCluster
from tests.support.nbd import RawClient
from tests.support.requirements import requires_tools

pytestmark = [requires_tools("qemu-io", "nbdcopy"), pytest.mark.timeout(240)]

MIB = 1 << 20
SIZE = 32 * MIB
STORE_SIZE = 64 * MIB  # room for one snapshot's blocks, not for two


@pytest.fixture
def cluster(local_cluster: LocalCluster, tmp_path: Path) -> Iterator[LocalCluster]:
    """A volume `end` full of ones, and the store `tight`."""
    local_cluster.cli("volume", "create", "end", "--size", str(SIZE))
    local_cluster.cli("store", "create", "tight", "--file", tmp_path / "tight", "--size", str(STORE_SIZE))
    write(local_cluster, 1)
    yield local_cluster
    local_cluster.run("volume", "delete", "end", "--force")
    local_cluster.cli("store", "delete", "tight")


def write(cluster: LocalCluster, pattern: int) -> None:
    uri = f"{cluster.env['primary']['nbd']}/end"
    command = ["qemu-io", "-f", "raw", "-c", f"write -P {pattern} 0 {SIZE}", "-c", "flush", uri]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def create(cluster: LocalCluster, name: str, *options: str) -> None:
    cluster.cli("snapshot", "create", "end", "--name", name, "--store", "tight", *options)


def nbd_client(cluster: LocalCluster) -> RawClient:
    return RawClient(int(cluster.env["standby"]["nbd"].rpartition(":")[2]), timeout_s=20)


def is_found(cluster: LocalCluster, name: str) -> bool:
    with nbd_client(cluster) as client:
        client.greet()
        return client.answer(c.Option.GO, GoRequest(f"end@{name}").encode()) == c.OptionReplyKind.ACK


@pytest.mark.parametrize("expire", ["yes", "no"])
def test_readers_of_a_snapshot_that_a_full_store_costs_get_errors_and_nobody_finds_it_again(
    cluster: LocalCluster, expire: str
) -> None:
    cluster.cli("snapshot", "policy", "end", "--expire", expire)
    create(cluster, "s1")
    write(cluster, 2)
    create(cluster, "s2")

    async def main() -> None:
        async with Nodes(load_cluster(cluster.cluster_file)) as nodes:
            with nbd_client(cluster) as client:
                client.go("end@s1", structured=False)
                read_block(client, errno_expected=0)
                request = export_pb2.ReadSnapshotRequest(volume="end", snapshot="s1")
                stream = aiter(streams.read_snapshot(nodes.export.channel, request))
                assert bytes(chunks.decode(await anext(stream)).data[:9]) == b"\1" * 9
                await asyncio.to_thread(write, cluster, 3)  # no room for what s2 needs, unless s1 goes
                read_block(client, errno_expected=errno.EIO)
                with pytest.raises(DataCorrupt, match="end@s1"):
                    await rest(stream)
                deadline = time.monotonic() + 5
                while is_found(cluster, "s1"):
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.05)
                read_block(client, errno_expected=errno.EIO)  # still answered
                with pytest.raises(NotFound):
                    await rest(aiter(streams.read_snapshot(nodes.export.channel, request)))

    asyncio.run(main())
    left = {each["name"]: each["state"] for each in cluster.cli("snapshot", "list", "end")}
    assert left == {"s2": "active"} | ({} if expire == "yes" else {"s1": "invalid"})
    if expire == "no":
        refused = cluster.run("snapshot", "export", "end@s1", "--writable")
        assert refused.code == 1
        assert refused.error.startswith("snapshot end@s1 is not served: store tight: ")
        assert not cluster.cli("snapshot", "show", "end@s1")["writable"]
    uri = f"{cluster.env['standby']['nbd']}/end@s2"
    assert subprocess.run(["nbdcopy", uri, "-"], check=True, capture_output=True).stdout == b"\2" * SIZE
    assert Path(cluster.env["volumes"]["end"]["mirror_path"]).read_bytes() == b"\3" * SIZE


def test_what_was_written_to_an_expired_snapshot_goes_with_it(cluster: LocalCluster) -> None:
    cluster.cli("snapshot", "policy", "end", "--expire", "yes")
    create(cluster, "s1", "--writable")
    overlays = Path(cluster.env["volumes"]["end"]["mirror_path"]).parent / "overlays"
    with nbd_client(cluster) as client:
        client.go("end@s1", structured=False)
        assert client.ask(c.Command.WRITE, 0, 4096, payload=b"w" * 4096) == 0
        assert client.ask(c.Command.FLUSH) == 0
        assert len(list(overlays.iterdir())) == 1
        write(cluster, 2)
        create(cluster, "s2")
        write(cluster, 3)
        deadline = time.monotonic() + 5
        while list(overlays.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # Also what was written there, which the store had nothing to do with, is not shown as if nothing were amiss.
        read_block(client, errno_expected=errno.EIO)
        assert client.ask(c.Command.WRITE, 0, 4096, payload=b"w" * 4096) == errno.EIO
        assert client.ask(c.Command.FLUSH) == errno.EIO


def read_block(client: RawClient, *, errno_expected: int) -> None:
    cookie = client.request(c.Command.READ, 0, 4096)
    assert client.reply()[:2] == (cookie, errno_expected)
    if not errno_expected:
        client.receive(4096)


async def rest(stream: AsyncIterator[bytes]) -> None:
    try:
        async for _ in stream:
            pass
    except grpc.RpcError as error:
        raise from_rpc_error(error, peer="export process") from None
