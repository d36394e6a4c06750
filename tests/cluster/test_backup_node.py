"""The whole node as a process of its own, driven over gRPC and NBD as its clients drive it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from stillpoint.wire.v1 import backup_pb2, common_pb2
from tests.support.backup_node import (
    ROOT,
    SIZE,
    Node,
    answer_to,
    eventually,
    eventually_async,
    is_idle,
    output_of,
    with_node,
)
from tests.support.requirements import requires_tools


def test_run_list_read_verify_restore_delete(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        made = await node.back_up()
        assert made.size == SIZE and made.volume == "vol1" and made.verified_ns == 0
        assert await node.list_ids() == [made.id]
        assert await node.read(made.id) == node.image
        target = tmp_path / "restored.img"
        name = backup_pb2.BackupId(id=made.id)
        async with node.stub() as stub:
            verified = [progress async for progress in stub.VerifyBackup(name)]
            assert verified[-1].done and verified[-1].done_bytes == SIZE
            assert (await stub.GetBackup(name)).verified_ns > 0
            request = backup_pb2.RestoreBackupRequest(id=made.id, target=str(target))
            restored = [progress async for progress in stub.RestoreBackup(request)]
            assert restored[-1].done and restored[-1].moved_bytes < SIZE
            assert target.read_bytes() == node.image
            status = await stub.GetStatus(common_pb2.Empty())
            assert status.backup_count == 1 and status.repository_bytes > 9 << 20
            assert status.nbd_address == str(node.nbd_address) and status.info.node == "backup"
            await stub.DeleteBackup(name)
        assert await node.list_ids() == []
        assert not list((node.repository / "manifests").iterdir())
        assert not node.standby.snapshots
        assert await node.stop() == 0

    with_node(tmp_path, body)


@pytest.mark.parametrize(
    ("method", "request_message", "code"),
    [
        ("GetBackup", backup_pb2.BackupId(id="../../etc/passwd"), grpc.StatusCode.INVALID_ARGUMENT),
        ("GetBackup", backup_pb2.BackupId(id="20261123T101502-vol1-3f9a"), grpc.StatusCode.NOT_FOUND),
        ("DeleteBackup", backup_pb2.BackupId(id=""), grpc.StatusCode.INVALID_ARGUMENT),
        ("VerifyBackup", backup_pb2.BackupId(id="20261123T101502-vol1-3f9a"), grpc.StatusCode.NOT_FOUND),
        ("RunBackup", backup_pb2.RunBackupRequest(volume="a/b"), grpc.StatusCode.INVALID_ARGUMENT),
        ("RunBackup", backup_pb2.RunBackupRequest(volume="vol9"), grpc.StatusCode.NOT_FOUND),
        (
            "RestoreBackup",
            backup_pb2.RestoreBackupRequest(id="20261123T101502-vol1-3f9a", target="out.img"),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ],
)
def test_a_bad_request_is_answered_with_a_status_and_changes_nothing(
    tmp_path: Path, method: str, request_message: Any, code: grpc.StatusCode
) -> None:
    async def body(node: Node) -> None:
        async with node.stub() as stub:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await answer_to(getattr(stub, method)(request_message))
            assert raised.value.code() is code
        assert await node.list_ids() == []
        assert not list((node.repository / "manifests").iterdir())

    with_node(tmp_path, body)


def test_a_cancelled_call_stops_the_backup_and_leaves_nothing(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.standby.delay_s = 0.05
        async with node.stub() as stub:
            call = stub.RunBackup(backup_pb2.RunBackupRequest(volume="vol1"))
            async for event in call:
                if event.progress.phase == "read":
                    break
            call.cancel()
            await eventually(lambda: not node.standby.snapshots)
            await eventually(lambda: not list((node.repository / "manifests").iterdir()))
            node.standby.delay_s = 0
            await eventually_async(lambda: is_idle(stub))
        assert await node.read((await node.back_up()).id) == node.image

    with_node(tmp_path, body)


def test_a_stop_in_the_middle_of_a_backup_is_clean(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.standby.delay_s = 0.05
        async with node.stub() as stub:
            call = stub.RunBackup(backup_pb2.RunBackupRequest(volume="vol1"))
            async for event in call:
                if event.progress.phase == "read":
                    break
            assert await node.stop() == 0
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await answer_to(call)
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not node.standby.snapshots
        assert not list((node.repository / "manifests").iterdir())

    with_node(tmp_path, body)


@pytest.mark.slow
def test_killed_at_any_time_it_starts_again_and_nothing_incomplete_is_there(tmp_path: Path) -> None:
    """At 20 points: of full backups and incrementals of a volume that changes, of deletions, and of collections."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    source = random.Random(seed)

    async def body(node: Node) -> None:
        images: dict[str, bytes] = {}
        node.standby.delay_s = 0.004
        for number in range(20):
            before = len(images)
            run = asyncio.create_task(node.back_up())
            upkeep = asyncio.create_task(_delete_and_collect(node, source.choice([*images]) if before > 3 else ""))
            await asyncio.sleep(source.uniform(0, 0.35))
            await node.kill()
            with contextlib.suppress(grpc.aio.AioRpcError):
                images[(await run).id] = node.image
            gone = await upkeep
            await node.start()
            listed = await node.list_ids()
            # One more may be there whose answer was lost on the way; then it must be whole, as the others. So may one
            # whose deletion was asked for, and it must be whole too.
            fresh = set(listed) - set(images)
            assert set(images) - {gone} <= set(listed) and len(fresh) <= 1
            images = {backup: images.get(backup, node.image) for backup in listed}
            # All of them now and then, the newest each time.
            for backup in listed if number % 5 == 4 else listed[-1:]:
                assert await node.read(backup) == images[backup]
            assert {path.name for path in (node.repository / "manifests").iterdir()} == set(listed)
            await eventually(lambda: not node.standby.snapshots)
            node.change(source)
        made = await node.back_up()
        assert await node.read(made.id) == node.image
        async with node.stub() as stub:
            events = [event async for event in stub.CheckRepository(backup_pb2.CheckRequest(deep=True))]
        assert not events[-1].report.affected and not events[-1].report.damaged_packs

    with_node(tmp_path, body)


async def _delete_and_collect(node: Node, backup: str) -> str:
    """Unless it is "". Returns what may be gone."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        async with node.stub() as stub:
            if backup:
                await stub.DeleteBackup(backup_pb2.BackupId(id=backup))
            await stub.CollectGarbage(backup_pb2.CollectRequest())
    return backup


@pytest.mark.slow
def test_a_node_that_is_stopped_in_the_middle_of_backups_and_collections_goes_on(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        source = random.Random(1)
        images: dict[str, bytes] = {}
        for _ in range(3):
            images[(await node.back_up()).id] = node.image
            node.change(source)
        node.standby.delay_s = 0.01
        assert node.process is not None
        for _ in range(3):
            run = asyncio.create_task(node.back_up())
            oldest = next(iter(images))
            upkeep = asyncio.create_task(_delete_and_collect(node, oldest))
            await asyncio.sleep(source.uniform(0.05, 0.2))
            node.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(1.5)
            node.process.send_signal(signal.SIGCONT)
            images[(await run).id] = node.image
            images.pop(await upkeep)
            for backup in await node.list_ids():
                assert await node.read(backup) == images[backup]
            assert await node.list_ids() == [*images]
            node.change(source)

    with_node(tmp_path, body)


@requires_tools("nbdinfo", "nbdcopy")
def test_every_backup_is_an_nbd_export_at_once(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        made = await node.back_up()
        uri = f"nbd://{node.nbd_address}/vol1@{made.id}"
        assert (await output_of("nbdinfo", "--size", uri)).split() == [str(SIZE).encode()]
        assert b"is_read_only: true" in await output_of("nbdinfo", uri)
        assert b"hole" in await output_of("nbdinfo", "--map", uri)
        await output_of("nbdcopy", uri, str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == node.image
        await node.kill()
        await node.start()
        assert made.id.encode() in await output_of("nbdinfo", "--list", f"nbd://{node.nbd_address}")
        async with node.stub() as stub:
            await stub.DeleteBackup(backup_pb2.BackupId(id=made.id))
        assert made.id.encode() not in await output_of("nbdinfo", "--list", f"nbd://{node.nbd_address}")

    with_node(tmp_path, body)


def test_a_second_node_on_the_state_directory_or_port_is_refused(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        def second() -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "backupnode", "--config", str(node.config)]
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)

        answer = await asyncio.to_thread(second)
        assert answer.returncode == 1 and "is in use by another process" in answer.stderr
        node.config.write_text(node.config.read_text().replace(str(node.folder / "state"), str(node.folder / "other")))
        answer = await asyncio.to_thread(second)
        assert answer.returncode == 1 and "stillpoint-backupnode:" in answer.stderr
        node.config.write_text("state_dir: /tmp/x\nlisen: {}\n")
        answer = await asyncio.to_thread(second)
        assert answer.returncode == 2 and "did you mean 'listen'" in answer.stderr

    with_node(tmp_path, body)
