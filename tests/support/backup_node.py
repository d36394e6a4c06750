"""A backup node as a process of its own, between a stand-in for the standby and a client."""

from __future__ import annotations

import asyncio
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

from stillpoint.config import Address
from stillpoint.devices import FileDevice
from stillpoint.wire import chunks, streams
from stillpoint.wire.channel import open_channel
from stillpoint.wire.v1 import backup_pb2, backup_pb2_grpc, common_pb2
from tests.support.standby import StandInStandby, serving

SIZE = (24 << 20) + 4096
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Node:
    """A backup node process and what it works on. `start` may be called again after `kill`."""

    folder: Path
    standby: StandInStandby
    standby_address: Address
    image: bytes
    more_config: str = ""
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
            f"{self.more_config}"
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

    def change(self, source: random.Random) -> None:
        """The volume gets something else in a few places."""
        device = self.standby.volumes["vol1"]
        for _ in range(source.randrange(1, 6)):
            offset = source.randrange(SIZE // 65536) * 65536
            data = source.randbytes(min(source.choice([65536, 1 << 20]), SIZE - offset))
            device.write(offset, [data])
            self.standby.note_changed(offset, len(data))
            self.image = self.image[:offset] + data + self.image[offset + len(data) :]

    async def back_up(self, volume: str = "vol1") -> backup_pb2.Backup:
        async with self.stub() as stub:
            events = [event async for event in stub.RunBackup(backup_pb2.RunBackupRequest(volume=volume))]
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


def with_node(folder: Path, body: Callable[[Node], Awaitable[None]], *, config: str = "") -> None:
    """config: more lines of YAML."""

    async def main() -> None:
        device = FileDevice.create(folder / "volume", SIZE)
        source = random.Random(1)
        device.write(1000, [source.randbytes(9 << 20)])
        device.write(15 << 20, [b"some text, " * 700_000])
        standby = StandInStandby({"vol1": device})
        async with serving(standby) as address:
            node = Node(folder, standby, address, (folder / "volume").read_bytes(), config)
            try:
                await node.start()
                await body(node)
            finally:
                if node.process is not None and node.process.returncode is None:
                    await node.kill()
                device.close()

    asyncio.run(main())


async def output_of(*command: str) -> bytes:
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output


async def answer_to(call: Any) -> list[Any]:
    """The one message, or all of the stream."""
    return [message async for message in call] if hasattr(call, "__aiter__") else [await call]


async def is_idle(stub: Any) -> bool:
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
