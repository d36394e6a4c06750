"""Backups served over NBD by a node of its own: writable on overlays that outlive it and never reach the backup."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from stillpoint.nbd.client import NbdClient
from stillpoint.wire.v1 import backup_pb2
from tests.support.backup_node import Node, with_node


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
