"""The whole node as a process of its own, driven over gRPC and NBD as its clients drive it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from stillpoint.config import Address
from stillpoint.devices import FileDevice
from stillpoint.wire import chunks, streams
from stillpoint.wire.channel import open_channel
from stillpoint.wire.v1 import backup_pb2, backup_pb2_grpc, common_pb2
from tests.support.requirements import requires_tools
from tests.support.standby import StandInStandby, serving

SIZE = (24 << 20) + 4096
ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Node:
    """A backup node process and what it works on. `start` may be called again after `kill`."""

    folder: Path
    standby: StandInStandby
    standby_address: Address
    image: bytes
    grpc_address: Address = field(default_factory=lambda: Address("127.0.0.1", free_port()))
    nbd_address: Address = field(default_factory=lambda: Address("127.0.0.1", free_port()))
    process: asyncio.subprocess.Process | None = None

    @property
    def repository(self) -> Path:
        return self.folder / "state" / "repository"

    @property
    def config(self) -> Path:
        return self.folder / "backup.yaml"

    def write_config(self) -> None:
        self.config.write_text(
            f"state_dir: {self.folder / 'state'}\n"
            f"listen: {{grpc: '{self.grpc_address}', nbd: '{self.nbd_address}'}}\n"
            f"standby: {{grpc: '{self.standby_address}', export_grpc: '{self.standby_address}'}}\n"
        )

    async def start(self) -> None:
        self.write_config()
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "backupnode", "--config", str(self.config), cwd=ROOT
        )
        async with self.stub() as stub:
            await stub.GetStatus(common_pb2.Empty(), wait_for_ready=True, timeout=20)

    async def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        await self.process.wait()

    async def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return await self.process.wait()

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[grpc.aio.Channel]:
        channel = open_channel(self.grpc_address)
        try:
            yield channel
        finally:
            await channel.close()

    @asynccontextmanager
    async def stub(self) -> AsyncIterator[Any]:
        async with self.channel() as channel:
            make_stub: Any = backup_pb2_grpc.BackupServiceStub
            yield make_stub(channel)

    async def back_up(self) -> backup_pb2.Backup:
        async with self.stub() as stub:
            events = [event async for event in stub.RunBackup(backup_pb2.RunBackupRequest(volume="vol1"))]
        backup: backup_pb2.Backup = events[-1].backup
        return backup

    async def list_ids(self) -> list[str]:
        async with self.stub() as stub:
            listing = await stub.ListBackups(backup_pb2.ListBackupsRequest())
        assert not listing.damaged
        return [backup.id for backup in listing.backups]

    async def read(self, backup: str) -> bytes:
        image = bytearray(SIZE)
        async with self.channel() as channel:
            async for message in streams.read_backup(channel, backup_pb2.ReadBackupRequest(id=backup)):
                chunk = chunks.decode(message)
                image[chunk.offset : chunk.offset + len(chunk.data)] = chunk.data
        return bytes(image)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def with_node(folder: Path, body: Callable[[Node], Awaitable[None]]) -> None:
    async def main() -> None:
        device = FileDevice.create(folder / "volume", SIZE)
        source = random.Random(1)
        device.write(1000, [source.randbytes(9 << 20)])
        device.write(15 << 20, [b"some text, " * 700_000])
        standby = StandInStandby({"vol1": device})
        async with serving(standby) as address:
            node = Node(folder, standby, address, (folder / "volume").read_bytes())
            try:
                await node.start()
                await body(node)
            finally:
                if node.process is not None and node.process.returncode is None:
                    await node.kill()
                device.close()

    asyncio.run(main())


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
        assert [path.name for path in node.repository.iterdir()] == ["repository"]
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
        assert [path.name for path in node.repository.iterdir()] == ["repository"]

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
            await eventually(lambda: [path.name for path in node.repository.iterdir()] == ["repository"])
            node.standby.delay_s = 0
            await eventually_async(lambda: _is_idle(stub))
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
        assert [path.name for path in node.repository.iterdir()] == ["repository"]

    with_node(tmp_path, body)


@pytest.mark.slow
def test_killed_at_any_time_it_starts_again_and_nothing_incomplete_is_there(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    source = random.Random(seed)

    async def body(node: Node) -> None:
        complete: list[str] = []
        node.standby.delay_s = 0.004
        for _ in range(10):
            run = asyncio.create_task(node.back_up())
            await asyncio.sleep(source.uniform(0, 0.5))
            await node.kill()
            with contextlib.suppress(grpc.aio.AioRpcError):
                complete.append((await run).id)
            await node.start()
            listed = await node.list_ids()
            # One more may be there whose answer was lost on the way; then it must be whole, as the others.
            assert set(complete) <= set(listed) and len(listed) <= len(complete) + 1
            complete = listed
            for backup in listed:
                assert await node.read(backup) == node.image
            expected = {"repository"} | {f"{backup}{suffix}" for backup in listed for suffix in (".data", ".manifest")}
            assert {path.name for path in node.repository.iterdir()} == expected
            await eventually(lambda: not node.standby.snapshots)
        made = await node.back_up()
        assert await node.read(made.id) == node.image

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


async def output_of(*command: str) -> bytes:
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output


async def answer_to(call: Any) -> list[Any]:
    """The one message, or all of the stream."""
    return [message async for message in call] if hasattr(call, "__aiter__") else [await call]


async def _is_idle(stub: Any) -> bool:
    status: backup_pb2.BackupStatus = await stub.GetStatus(common_pb2.Empty())
    return status.running == 0


async def eventually(condition: Callable[[], bool]) -> None:
    async def met() -> bool:
        return condition()

    await eventually_async(met)


async def eventually_async(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + 10
    while not await condition():
        assert time.monotonic() < deadline, "it does not come true"
        await asyncio.sleep(0.02)
