"""A store on a full disk: no write is lost, a snapshot is right or says that it is not, and room brings new ones."""

from __future__ import annotations

import asyncio
import errno
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillpoint.nbd import constants as c
from stillpoint.nbd.client import NbdClient
from tests.support.cluster import LocalCluster
from tests.support.nbd import RawClient
from tests.support.requirements import requires_root, requires_tools

pytestmark = [requires_root, requires_tools("mount", "nbdcopy"), pytest.mark.timeout(240)]

MIB = 1 << 20
SIZE = 64 * MIB
DISK_SIZE = 64 * MIB
OVERWRITTEN = 256 * MIB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE}", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def overwrite(cluster: LocalCluster, content: bytearray, length: int, choose: random.Random) -> None:
    """Write `length` bytes in pieces all over the volume. Each is acknowledged, else this fails."""

    async def write() -> None:
        async with await NbdClient.connect(f"{cluster.env['primary']['nbd']}/full") as client:
            for _ in range(length // MIB):
                piece = choose.randbytes(MIB)
                offset = choose.randrange(0, SIZE - MIB + 1, 512)
                await client.write(offset, piece)
                content[offset : offset + MIB] = piece
            await client.flush()

    asyncio.run(write())


def check_copies(cluster: LocalCluster, content: bytes | bytearray) -> None:
    paths = cluster.env["volumes"]["full"]
    for name in ("primary_path", "mirror_path"):
        assert Path(paths[name]).read_bytes() == content, name


def check_snapshots(cluster: LocalCluster, images: dict[str, bytes]) -> dict[str, str]:
    """Their states. Those that are active are read whole and are right."""
    states = {each["name"]: each["state"] for each in cluster.cli("snapshot", "list", "full")}
    assert set(states) == set(images)
    for name, state in states.items():
        if state == "active":
            uri = f"{cluster.env['standby']['nbd']}/full@{name}"
            read = subprocess.run(["nbdcopy", uri, "-"], check=True, capture_output=True, timeout=60).stdout
            assert read == images[name], name
    return states


def check_held_open(client: RawClient, image: bytes, *, is_active: bool) -> None:
    for offset in range(0, SIZE, MIB):
        cookie = client.request(c.Command.READ, offset, MIB)
        assert client.reply()[:2] == (cookie, 0 if is_active else errno.EIO)
        if is_active:
            assert client.receive(MIB) == image[offset : offset + MIB]


def test_a_full_disk_under_a_store_costs_no_write_and_its_growth_lets_a_new_snapshot_live(
    own_cluster: LocalCluster, disk: Path
) -> None:
    choose = random.Random(9)
    content = bytearray(SIZE)
    images: dict[str, bytes] = {}
    own_cluster.cli("volume", "create", "full", "--size", str(SIZE))
    sizes = ("--size", str(DISK_SIZE), "--auto-extend", str(16 * DISK_SIZE))
    own_cluster.cli("store", "create", "small", "--file", disk / "store", *sizes)

    def snapshot(name: str) -> RawClient:
        own_cluster.cli("snapshot", "create", "full", "--name", name, "--store", "small")
        images[name] = bytes(content)
        return RawClient(int(own_cluster.env["standby"]["nbd"].rpartition(":")[2])).go(f"full@{name}", structured=False)

    overwrite(own_cluster, content, SIZE, choose)
    with snapshot("first") as first:
        overwrite(own_cluster, content, OVERWRITTEN // 8, choose)
        with snapshot("second") as second:
            overwrite(own_cluster, content, OVERWRITTEN - OVERWRITTEN // 8, choose)
            check_copies(own_cluster, content)
            states = check_snapshots(own_cluster, images)
            assert "invalid" in states.values(), "the disk was not full"
            check_held_open(first, images["first"], is_active=states["first"] == "active")
            check_held_open(second, images["second"], is_active=states["second"] == "active")

    def restart() -> None:
        own_cluster.kill("standby")
        own_cluster.start("standby")
        own_cluster.wait_in_sync("full")
        check_copies(own_cluster, content)

    subprocess.run(["mount", "-o", f"remount,size={8 * DISK_SIZE}", str(disk)], check=True)
    snapshot("roomy").socket.close()
    overwrite(own_cluster, content, SIZE, choose)
    check_copies(own_cluster, content)
    assert check_snapshots(own_cluster, images) == states | {"roomy": "active"}
    restart()
    assert check_snapshots(own_cluster, images) == states | {"roomy": "active"}
