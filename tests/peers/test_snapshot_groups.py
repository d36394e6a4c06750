"""A snapshot of several volumes is one instant, also while they are being written."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillpoint.cli.cluster import load_cluster
from stillpoint.cli.nodes import Nodes
from stillpoint.cli.snapshot_calls import Kind, create_snapshots
from stillpoint.nbd.client import NbdClient
from tests.support.cluster import LocalCluster

pytestmark = pytest.mark.timeout(240)

MIB = 1 << 20
SNAPSHOT_COUNT = 40


@pytest.fixture(params=["tcp", "grpc"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalCluster]:
    volumes = (f"first:{MIB}", f"second:{MIB}")
    with LocalCluster.up(tmp_path / "cluster", *volumes, carrier=request.param) as cluster:
        yield cluster


def test_a_counter_written_to_both_in_turn_is_never_ahead_in_the_second(cluster: LocalCluster) -> None:
    environment = cluster.env
    volumes, snapshots = environment["primary"]["nbd"], environment["standby"]["nbd"]
    counters: list[tuple[int, int]] = []
    written = 0

    async def write(stop: asyncio.Event) -> None:
        nonlocal written
        async with (
            await NbdClient.connect(f"{volumes}/first") as first,
            await NbdClient.connect(f"{volumes}/second") as second,
        ):
            while not stop.is_set():
                written += 1
                # The second is written only when the first has been acknowledged, so no instant shows it ahead.
                await first.write(0, written.to_bytes(8, "little"))
                await second.write(0, written.to_bytes(8, "little"))

    async def main() -> None:
        stop = asyncio.Event()
        writing = asyncio.create_task(write(stop))
        async with Nodes(load_cluster(cluster.cluster_file)) as nodes:
            for number in range(SNAPSHOT_COUNT):
                await create_snapshots(nodes.data_nodes[1], ("second", "first"), Kind(name=f"s{number}"))
                await asyncio.sleep(0.01)
        stop.set()
        await writing
        names = [f"s{number}" for number in range(SNAPSHOT_COUNT)]
        for name in names:
            first, second = await counter(f"{snapshots}/first@{name}"), await counter(f"{snapshots}/second@{name}")
            counters.append((first, second))

    asyncio.run(main())
    assert written > SNAPSHOT_COUNT, "the writer stood still"
    assert all(first - second in (0, 1) for first, second in counters), counters
    assert counters == sorted(counters)
    assert len(set(counters)) > SNAPSHOT_COUNT // 2, "the writer stood still"


async def counter(uri: str) -> int:
    async with await NbdClient.connect(uri) as client:
        return int.from_bytes(await client.read(0, 8), "little")
