"""Incremental backups of a real pair under load, each compared with the snapshot it was made from."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from stillpoint.nbd.client import NbdClient
from tests.support.cluster import LocalCluster

pytestmark = pytest.mark.timeout(240)

MIB = 1 << 20
SIZE = 32 * MIB
INCREMENTALS = 4


def test_a_full_and_incrementals_under_load_restore_as_their_snapshots(tmp_path: Path) -> None:
    source = random.Random(1)

    async def write(uri: str, stop: asyncio.Event) -> None:
        async with await NbdClient.connect(uri) as client:
            while not stop.is_set():
                offset = source.randrange(SIZE - 4096)
                await client.write(offset, source.randbytes(4096))
                if source.random() < 0.05:
                    await client.trim(source.randrange(SIZE // 65536) * 65536, 65536)
                await asyncio.sleep(0.02)

    async def read(uri: str) -> bytes:
        async with await NbdClient.connect(uri) as client:
            return bytes(await client.read(0, SIZE))

    async def main(cluster: LocalCluster) -> None:
        environment = cluster.env
        stop = asyncio.Event()
        async with await NbdClient.connect(f"{environment['primary']['nbd']}/vol1") as client:
            await client.write(0, source.randbytes(16 * MIB))
        writing = asyncio.create_task(write(f"{environment['primary']['nbd']}/vol1", stop))
        made = []
        for number in range(1 + INCREMENTALS):
            await asyncio.to_thread(cluster.cli, "snapshot", "create", "vol1", "--name", f"s{number}")
            made.append(await asyncio.to_thread(cluster.cli, "backup", "run", "vol1", "--snapshot", f"s{number}"))
        own = await asyncio.to_thread(cluster.cli, "backup", "run", "vol1")
        stop.set()
        await writing
        assert [each["base"] for each in made] == [None, *(each["id"] for each in made[:-1])]
        assert own["base"] == made[-1]["id"]
        assert all(each["received_bytes"] < made[0]["received_bytes"] for each in made[1:])
        for number, each in enumerate(made):
            truth = await read(f"{environment['standby']['nbd']}/vol1@s{number}")
            assert await read(f"{environment['backup']['nbd']}/vol1@{each['id']}") == truth
        names = {each["name"] for each in await asyncio.to_thread(cluster.cli, "snapshot", "list", "vol1")}
        assert names == {f"s{number}" for number in range(1 + INCREMENTALS)}

    with LocalCluster.up(tmp_path / "cluster", f"vol1:{SIZE}") as cluster:
        asyncio.run(main(cluster))
