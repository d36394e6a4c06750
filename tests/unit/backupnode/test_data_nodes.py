"""Which of several data nodes a backup comes from, as roles change hands."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import backupnode.standby_client
from backupnode.data_nodes import DataNodes
from backupnode.puller import Puller
from backupnode.repository import PackRepository, open_directory
from backupnode.standby_client import SnapshotName, StandbyClient
from stillpoint.config import Address
from stillpoint.devices import MemoryDevice
from stillpoint.errors import NotFound, PeerUnavailable
from stillpoint.security.authorization import roles_for
from stillpoint.security.roles import Role
from tests.conformance.test_repositories import read_all
from tests.support.standby import StandInStandby, serving
from tests.unit.backupnode.test_puller import QUICK, ignore

SIZE = 1 << 20


@dataclass
class Pair:
    first: StandInStandby
    second: StandInStandby
    clients: list[StandbyClient]
    repository: PackRepository

    @property
    def nodes(self) -> DataNodes:
        return DataNodes(self.clients)

    def chosen(self, client: StandbyClient) -> StandInStandby:
        return (self.first, self.second)[self.clients.index(client)]


def node(byte: bytes) -> StandInStandby:
    device = MemoryDevice(SIZE)
    device.write(0, [byte * SIZE])
    return StandInStandby({"vol1": device}, incarnation=f"life of {byte!r}")


@asynccontextmanager
async def pair(folder: Path) -> AsyncIterator[Pair]:
    made = (node(b"1"), node(b"2"))
    async with AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(serving(each)) for each in made]
        clients = [StandbyClient(standby=address, export=address) for address in addresses]
        repository = await open_directory(folder / "repository")
        try:
            yield Pair(*made, clients, repository)
        finally:
            await repository.close()
            for client in clients:
                await client.close()


def with_pair(folder: Path, body: Callable[[Pair], Awaitable[None]]) -> None:
    async def main() -> None:
        async with pair(folder) as made:
            await body(made)

    asyncio.run(main())


def test_the_standby_comes_before_the_one_that_serves_and_what_is_whole_before_what_is_not(tmp_path: Path) -> None:
    async def body(pair: Pair) -> None:
        async def chosen() -> StandInStandby:
            return pair.chosen(await pair.nodes.holding("vol1"))

        pair.second.serves = True
        assert await chosen() is pair.first
        pair.first.serves, pair.second.serves = True, False
        assert await chosen() is pair.second
        # A standby that is behind is still no load on the other.
        pair.second.up_to_date = False
        assert await chosen() is pair.second
        pair.second.consistent = False
        assert await chosen() is pair.first
        pair.first.consistent = False
        with pytest.raises(NotFound, match="no data node has a whole copy of volume vol1"):
            await chosen()
        with pytest.raises(NotFound):
            await pair.nodes.holding("vol9")

    with_pair(tmp_path, body)


def test_a_node_that_is_silent_is_left_out_and_named_when_it_is_needed(tmp_path: Path) -> None:
    async def body(pair: Pair) -> None:
        nowhere = StandbyClient(standby=Address("127.0.0.1", 1), export=Address("127.0.0.1", 1))
        nodes = DataNodes([nowhere, pair.clients[1]])
        assert await nodes.holding("vol1") is pair.clients[1]
        pair.second.staged_bytes = 77
        assert await nodes.staged_bytes() == 77
        with pytest.raises(PeerUnavailable, match=r"127\.0\.0\.1:1"):
            await nodes.holding("vol9")
        with pytest.raises(PeerUnavailable):
            await DataNodes([nowhere, nowhere]).staged_bytes()
        await nowhere.close()

    with_pair(tmp_path, body)


def test_backups_follow_the_standby_from_node_to_node(tmp_path: Path) -> None:
    async def body(pair: Pair) -> None:
        puller = Puller(pair.clients[0], pair.repository, retry=QUICK, others=pair.clients[1:])
        pair.second.serves = True
        first = await puller.run("vol1", report=ignore)
        pair.first.serves, pair.second.serves = True, False
        second = await puller.run("vol1", report=ignore)
        third = await puller.run("vol1", report=ignore)
        assert await read_all(pair.repository, first.id) == b"1" * SIZE
        assert await read_all(pair.repository, second.id) == b"2" * SIZE
        # Each node has a block history of its own.
        assert second.origin.base is None and third.origin.base == second.id
        await pair.clients[0].create_snapshot(SnapshotName("vol1", "s1"))
        named = await puller.run("vol1", snapshot="s1", report=ignore)
        assert await read_all(pair.repository, named.id) == b"1" * SIZE and named.origin.base == first.id
        assert list(pair.first.snapshots) == [("vol1", "s1")] and not pair.second.snapshots

    with_pair(tmp_path, body)


def test_what_was_left_on_any_node_is_swept(tmp_path: Path) -> None:
    async def body(pair: Pair) -> None:
        mark = f"backup-{pair.repository.uuid[:8]}-"
        for number, client in enumerate(pair.clients):
            await client.create_snapshot(SnapshotName("vol1", f"{mark}2026112{number}T101502-3f9a"))
        nowhere = StandbyClient(standby=Address("127.0.0.1", 1), export=Address("127.0.0.1", 1))
        puller = Puller(nowhere, pair.repository, retry=QUICK, others=pair.clients)
        with pytest.raises(PeerUnavailable):
            await puller.sweep()
        assert not pair.first.snapshots and not pair.second.snapshots
        await nowhere.close()

    with_pair(tmp_path, body)


def test_a_backup_nodes_certificate_may_call_all_that_a_backup_node_calls() -> None:
    services = {"standby": "StandbyService", "replicas": "ReplicaService", "export": "ExportService"}
    source = Path(backupnode.standby_client.__file__).read_text()
    calls = set(re.findall(r"self\._(standby|replicas|export)\.([A-Z]\w+)\(", source)) | {("export", "ReadSnapshot")}
    assert len(calls) >= 10
    for service, method in calls:
        assert Role.BACKUP in roles_for(f"/stillpoint.wire.v1.{services[service]}/{method}"), method
