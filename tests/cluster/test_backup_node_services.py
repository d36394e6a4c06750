"""What a backup node does beside backing up: exports that may be written to, restore tests, schedules."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest

from stillpoint.nbd.client import NbdClient
from stillpoint.wire.v1 import backup_pb2, common_pb2
from tests.support.backup_node import ROOT, Node, with_node


def test_a_writable_export_keeps_what_is_written_and_the_backup_stays_as_it_is(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        made = await node.back_up()
        uri = f"nbd://{node.nbd_address}/vol1@{made.id}"
        overlay = node.folder / "state" / "overlays" / f"{made.id}.overlay"
        async with node.stub() as stub:
            served = await stub.ExportBackup(backup_pb2.ExportBackupRequest(id=made.id))
            assert served.name == f"vol1@{made.id}" and not served.writable
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.ExportBackup(backup_pb2.ExportBackupRequest(id=made.id, writable=True, discard=True))
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert (await stub.ExportBackup(backup_pb2.ExportBackupRequest(id=made.id, writable=True))).writable
            async with await NbdClient.connect(uri) as client:
                await client.write(100_000, b"written")
                await client.flush()
                with pytest.raises(grpc.aio.AioRpcError, match="in use by 1 connections"):
                    await stub.ExportBackup(backup_pb2.ExportBackupRequest(id=made.id, discard=True))
        await node.kill()
        await node.start()
        async with await NbdClient.connect(uri) as client:
            assert (
                bytes(await client.read(99_999, 9))
                == node.image[99_999:100_000] + b"written" + node.image[100_007:100_008]
            )
        assert await node.read(made.id) == node.image
        # The incremental after it knows nothing of what was written.
        assert await node.read((await node.back_up()).id) == node.image
        assert overlay.exists()
        async with node.stub() as stub:
            discard = backup_pb2.ExportBackupRequest(id=made.id, discard=True)
            assert not (await stub.ExportBackup(discard)).writable and not overlay.exists()
            await stub.ExportBackup(backup_pb2.ExportBackupRequest(id=made.id, writable=True))
            await stub.DeleteBackup(backup_pb2.BackupId(id=made.id))
        assert not overlay.exists()

    with_node(tmp_path, body)


def test_a_restore_test_is_noted_with_the_backup_and_outlives_a_restart(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        made = await node.back_up()
        async with node.stub() as stub:
            tested = await stub.TestRestore(backup_pb2.BackupId(id=made.id))
            assert tested.passed and tested.detail == f"vol1 {made.id}"
            shown = await stub.GetBackup(backup_pb2.BackupId(id=made.id))
            assert shown.tested_ns == tested.finished_ns and shown.test_error == ""
            (tmp_path / "fail").touch()
            assert not (await stub.TestRestore(backup_pb2.BackupId(id=made.id))).passed
        await node.kill()
        await node.start()
        async with node.stub() as stub:
            shown = await stub.GetBackup(backup_pb2.BackupId(id=made.id))
            assert shown.tested_ns > tested.finished_ns and "exit code 1" in shown.test_error
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.TestRestore(backup_pb2.BackupId(id="20261123T101502-vol1-3f9a"))
            assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        assert await node.read(made.id) == node.image

    command = f"echo $STILLPOINT_VOLUME $STILLPOINT_BACKUP; test ! -e {tmp_path}/fail"
    with_node(tmp_path, body, config=f"restore_test: {{command: [/bin/sh, -c, '{command}']}}\n")


def test_schedules_of_the_configuration_are_listed_run_and_paused(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        async with node.stub() as stub:
            (nightly,) = (await stub.ListSchedules(common_pb2.Empty())).schedules
            assert (nightly.name, nightly.volume, nightly.when) == ("nightly", "vol1", "02:30 Europe/Berlin")
            assert nightly.due_ns > time.time_ns() and not nightly.paused and not nightly.success_ns
            events = [event async for event in stub.RunSchedule(backup_pb2.ScheduleName(name="nightly"))]
            assert await node.list_ids() == [events[-1].backup.id]
            paused = await stub.PauseSchedule(backup_pb2.PauseScheduleRequest(name="nightly", paused=True))
            assert paused.paused and not paused.due_ns and paused.backup == events[-1].backup.id
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.PauseSchedule(backup_pb2.PauseScheduleRequest(name="x", paused=True))
            assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        await node.kill()
        await node.start()
        async with node.stub() as stub:
            (nightly,) = (await stub.ListSchedules(common_pb2.Empty())).schedules
            assert nightly.paused and nightly.success_ns and nightly.backup == events[-1].backup.id

    with_node(tmp_path, body, config="schedules: [{volume: vol1, name: nightly, when: '02:30 Europe/Berlin'}]\n")


def test_a_schedule_in_the_configuration_that_makes_no_sense_is_one_line(tmp_path: Path) -> None:
    for config, why in (
        ("schedules: [{volume: vol1, when: someday}]", "'someday' is no calendar expression"),
        ("schedules: [{volume: vol1, wen: daily}]", "did you mean 'when'"),
        ("schedules: [{volume: v, when: daily}, {volume: v, when: hourly}]", "two schedules are named v"),
        ("notify: {when: sometimes}", "not one of failure, always"),
    ):
        path = tmp_path / "backup.yaml"
        path.write_text(f"state_dir: {tmp_path / 'state'}\n{config}\n")
        command = [sys.executable, "-m", "backupnode", "--config", str(path)]
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
        assert answer.returncode == 2 and why in answer.stderr, answer.stderr
        assert len(answer.stderr.splitlines()) == 1
