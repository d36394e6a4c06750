"""Incremental backups of a real pair under load, each compared with the snapshot it was made from."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from backupnode.progress import Progress
from backupnode.puller import Puller
from backupnode.repository import open_directory
from backupnode.standby_client import StandbyClient
from stillpoint.cli.backup_calls import follow, list_backups, run_backup
from stillpoint.cli.cluster import load_cluster
from stillpoint.cli.nodes import Nodes
from stillpoint.errors import StillpointError
from stillpoint.nbd.client import NbdClient
from stillpoint.wire.v1 import backup_pb2, common_pb2, standby_pb2
from tests.conformance.test_repositories import read_all
from tests.support.cluster import LocalCluster

pytestmark = pytest.mark.timeout(240)

MIB = 1 << 20
SIZE = 32 * MIB
INCREMENTALS = 10


class Silent:
    def update(self, done_bytes: int, total_bytes: int | None = None) -> None:
        pass


async def write(uri: str, source: random.Random) -> None:
    """Until cancelled."""
    async with await NbdClient.connect(uri) as client:
        while True:
            offset = source.randrange(SIZE - 4096)
            await client.write(offset, source.randbytes(4096))
            if source.random() < 0.05:
                await client.trim(source.randrange(SIZE // 65536) * 65536, 65536)
            await asyncio.sleep(0.01)


@asynccontextmanager
async def load(uri: str, source: random.Random) -> AsyncIterator[None]:
    writing = asyncio.create_task(write(uri, source))
    try:
        yield
        assert not writing.done(), "the writer ended early"
    finally:
        writing.cancel()
        await asyncio.wait([writing])


async def read(uri: str) -> bytes:
    async with await NbdClient.connect(uri) as client:
        return bytes(await client.read(0, SIZE))


async def fill(uri: str, source: random.Random, size: int = 16 * MIB) -> None:
    async with await NbdClient.connect(uri) as client:
        await client.write(0, source.randbytes(size))
        await client.flush()


async def restored(nodes: Nodes, backup: str, target: Path) -> bytes:
    target.unlink(missing_ok=True)
    request = backup_pb2.RestoreBackupRequest(id=backup, target=str(target))
    await follow(nodes, "RestoreBackup", request, Silent())
    return target.read_bytes()


def ignore(_: Progress) -> None:
    pass


def test_a_full_and_incrementals_under_load_restore_as_their_snapshots(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    source = random.Random(seed)

    async def main(cluster: LocalCluster) -> None:
        environment = cluster.env
        volume = f"{environment['primary']['nbd']}/vol1"
        target = tmp_path / "restored"
        await fill(volume, source)
        truths: dict[str, bytes] = {}
        made: list[backup_pb2.Backup] = []
        async with Nodes(load_cluster(cluster.cluster_file)) as nodes:
            async with load(volume, source):
                for number in range(1 + INCREMENTALS):
                    request = standby_pb2.CreateSnapshotRequest(volumes=["vol1"], name=f"s{number}")
                    await nodes.standby.call("CreateSnapshot", request, standby_pb2.SnapshotList)
                    made.append(await run_backup(nodes, "vol1", snapshot=f"s{number}", bar=Silent()))
                    truths[made[-1].id] = await read(f"{environment['standby']['nbd']}/vol1@s{number}")
                own = await run_backup(nodes, "vol1", bar=Silent())
            assert [each.base for each in made] == ["", *(each.id for each in made[:-1])]
            assert own.base == made[-1].id
            assert all(each.received_bytes < made[0].received_bytes for each in made[1:])
            for number, each in enumerate(made):
                assert await restored(nodes, each.id, target) == truths[each.id], f"backup {number} differs"
            await _a_fresh_full_is_the_same(nodes, tmp_path, f"s{INCREMENTALS}", truths[made[-1].id])
            # Deleting any of them, in any order, leaves the others.
            source.shuffle(made)
            while len(made) > 1:
                gone = made.pop().id
                await nodes.backup.call("DeleteBackup", backup_pb2.BackupId(id=gone), common_pb2.Empty)
                await nodes.backup.call("CollectGarbage", backup_pb2.CollectRequest(), backup_pb2.CollectReport)
                other = source.choice(made).id
                assert await read(f"{environment['backup']['nbd']}/vol1@{other}") == truths[other]
            assert await restored(nodes, made[0].id, target) == truths[made[0].id]
            assert {each.id for each in (await list_backups(nodes)).backups} == {made[0].id, own.id}
            snapshots = await nodes.standby.call(
                "ListSnapshots", standby_pb2.ListSnapshotsRequest(), standby_pb2.SnapshotList
            )
            assert {each.name for each in snapshots.snapshots} == {f"s{number}" for number in range(1 + INCREMENTALS)}

    with LocalCluster.up(tmp_path / "cluster", f"vol1:{SIZE}", insecure=True) as cluster:
        asyncio.run(main(cluster))


async def _a_fresh_full_is_the_same(nodes: Nodes, folder: Path, name: str, truth: bytes) -> None:
    """By another backup node with an empty repository."""
    standby = nodes.cluster.standby
    client = StandbyClient(standby=standby.grpc, export=standby.export_grpc)
    repository = await open_directory(folder / "other")
    try:
        record = await Puller(client, repository).run("vol1", snapshot=name, report=ignore)
        assert record.origin.base is None and await read_all(repository, record.id) == truth
    finally:
        await client.close()
        await repository.close()


def test_a_standby_killed_in_the_middle_of_a_pull_costs_no_backup(tmp_path: Path) -> None:
    source = random.Random(1)

    async def main(cluster: LocalCluster) -> None:
        environment = cluster.env
        volume = f"{environment['primary']['nbd']}/vol1"
        await fill(volume, source, 12 * MIB)
        async with Nodes(load_cluster(cluster.cluster_file)) as nodes:
            first = (await run_backup(nodes, "vol1", bar=Silent())).id
            truth = await read(f"{environment['backup']['nbd']}/vol1@{first}")
            await fill(volume, source, 12 * MIB)
            running = asyncio.create_task(run_backup(nodes, "vol1", bar=Silent()))
            await asyncio.sleep(0.3)
            await asyncio.to_thread(cluster.kill, "standby")
            assert [each.id for each in (await list_backups(nodes)).backups] == [first]
            await asyncio.to_thread(cluster.start, "standby")
            try:
                # It is taken up from the same snapshot, or ends with an error.
                taken_up = (await running).id
            except StillpointError:
                taken_up = ""
            listed = [each.id for each in (await list_backups(nodes)).backups]
            assert listed == [each for each in (first, taken_up) if each]
            await asyncio.to_thread(cluster.wait_in_sync, "vol1")
            again = await run_backup(nodes, "vol1", bar=Silent())
        now = await read(volume)
        assert await read(f"{environment['backup']['nbd']}/vol1@{again.id}") == now
        assert await read(f"{environment['backup']['nbd']}/vol1@{first}") == truth

    with LocalCluster.up(tmp_path / "cluster", f"vol1:{SIZE}") as cluster:
        config = cluster.directory / "backup.yaml"
        config.write_text(config.read_text() + f"rate_limit: {4 * MIB}\n")
        cluster.kill("backup")
        cluster.start("backup")
        asyncio.run(main(cluster))


def test_backups_go_on_from_the_new_standby_after_a_switchover(tmp_path: Path) -> None:
    source = random.Random(1)

    async def main(cluster: LocalCluster) -> None:
        async with Nodes(load_cluster(cluster.cluster_file)) as nodes:
            await fill(f"{cluster.env['primary']['nbd']}/vol1", source, 4 * MIB)
            first = await run_backup(nodes, "vol1", bar=Silent())
            await asyncio.to_thread(cluster.cli, "switchover", "vol1")
            volume = f"{cluster.env['standby']['volume_nbd']}/vol1"
            await fill(volume, source, 2 * MIB)
            second = await run_backup(nodes, "vol1", bar=Silent())
            third = await run_backup(nodes, "vol1", bar=Silent())
            now = await read(volume)
            backups = cluster.env["backup"]["nbd"]
            assert await read(f"{backups}/vol1@{second.id}") == now == await read(f"{backups}/vol1@{third.id}")
            assert third.base == second.id and third.received_bytes < MIB + 16 * 65536
            await nodes.backup.call("DeleteBackup", backup_pb2.BackupId(id=second.id), common_pb2.Empty)
            assert await read(f"{backups}/vol1@{first.id}") != now
        logs = (cluster.directory / "logs" / "backup.log").read_text()
        assert "has no standby" not in logs

    with LocalCluster.up(tmp_path / "cluster", f"vol1:{SIZE}") as cluster:
        asyncio.run(main(cluster))
