"""What goes wrong around the node process: damage on its disk, clients that leave, volumes that are huge."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from pathlib import Path

import grpc
import pytest

from stillpoint.devices import FileDevice
from stillpoint.wire import chunks, streams
from stillpoint.wire.v1 import backup_pb2, common_pb2
from tests.support.backup_node import SIZE, Node, answer_to, eventually, eventually_async, is_idle, with_node
from tests.support.standby import breaks_at

TIB = 1 << 40


def damage(node: Node) -> None:
    """Change one byte in the middle of the only pack."""
    (path,) = (node.repository / "packs").iterdir()
    position = path.stat().st_size // 2
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))


def test_damage_is_told_by_verify_restore_and_read_and_the_next_backup_is_whole(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        made = await node.back_up()
        damage(node)
        name = backup_pb2.BackupId(id=made.id)
        target = tmp_path / "restored.img"
        async with node.stub() as stub:
            for call in (
                stub.VerifyBackup(name),
                stub.RestoreBackup(backup_pb2.RestoreBackupRequest(id=made.id, target=str(target))),
                stub.ReadBackup(backup_pb2.ReadBackupRequest(id=made.id)),
            ):
                with pytest.raises(grpc.aio.AioRpcError, match=f"backup {made.id} is damaged: chunk") as raised:
                    await answer_to(call)
                assert raised.value.code() is grpc.StatusCode.DATA_LOSS
            assert (await stub.GetBackup(name)).verified_ns == 0
        assert not target.exists() and not list(tmp_path.glob("*.partial"))
        assert await node.read((await node.back_up()).id) == node.image

    with_node(tmp_path, body)


def test_a_damaged_manifest_is_listed_as_damaged_also_after_a_restart_and_can_be_deleted(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        damaged, kept = (await node.back_up()).id, (await node.back_up()).id
        manifest = node.repository / "manifests" / damaged
        manifest.write_bytes(manifest.read_bytes()[:-1])
        await node.kill()
        await node.start()
        async with node.stub() as stub:
            listing = await stub.ListBackups(backup_pb2.ListBackupsRequest())
            assert [backup.id for backup in listing.backups] == [kept]
            assert list(listing.damaged) == [damaged]
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.GetBackup(backup_pb2.BackupId(id=damaged))
            assert raised.value.code() is grpc.StatusCode.DATA_LOSS
            await stub.DeleteBackup(backup_pb2.BackupId(id=damaged))
        assert await node.list_ids() == [kept]
        assert await node.read(kept) == node.image

    with_node(tmp_path, body)


def test_a_restore_refuses_what_would_be_overwritten(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        made = await node.back_up()
        target = tmp_path / "precious.img"
        target.write_bytes(b"precious")
        request = backup_pb2.RestoreBackupRequest(id=made.id, target=str(target))
        async with node.stub() as stub:
            with pytest.raises(grpc.aio.AioRpcError, match="use --force") as raised:
                await answer_to(stub.RestoreBackup(request))
            assert raised.value.code() is grpc.StatusCode.ALREADY_EXISTS
            assert target.read_bytes() == b"precious"
            request.force = True
            await answer_to(stub.RestoreBackup(request))
        assert target.read_bytes() == node.image

    with_node(tmp_path, body)


def test_a_restore_that_is_cancelled_leaves_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "target"
    folder.mkdir()

    async def body(node: Node) -> None:
        device = node.standby.volumes["big"] = FileDevice.create(tmp_path / "big", 1 << 30)
        device.write(0, [random.Random(1).randbytes(64 << 20)] * 6)
        made = await node.back_up("big")
        request = backup_pb2.RestoreBackupRequest(id=made.id, target=str(folder / "out.img"))
        async with node.stub() as stub:
            call = stub.RestoreBackup(request)
            async for _ in call:
                break
            assert os.listdir(folder) == ["out.img.partial"]
            call.cancel()
            await eventually(lambda: not os.listdir(folder))
        device.close()

    with_node(tmp_path, body)


def test_clients_that_leave_in_the_middle_of_a_stream_cost_nothing(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        made = await node.back_up()
        assert node.process is not None
        descriptors = Path(f"/proc/{node.process.pid}/fd")

        async def read_a_little() -> None:
            async with node.channel() as channel:
                async for _ in streams.read_backup(channel, backup_pb2.ReadBackupRequest(id=made.id)):
                    break

        def open_packs() -> int:
            count = 0
            for path in descriptors.iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed while we looked
                    count += "/packs/" in os.readlink(path)
            return count

        for _ in range(10):
            await read_a_little()
        await eventually(lambda: open_packs() == 0)
        assert await node.read(made.id) == node.image

    with_node(tmp_path, body)


def test_more_readers_than_there_is_memory_for_are_refused(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        made = await node.back_up()
        request = backup_pb2.ReadBackupRequest(id=made.id)
        async with node.channel() as channel:
            waiting = [aiter(streams.read_backup(channel, request)) for _ in range(8)]
            for messages in waiting:
                await anext(messages)
            with pytest.raises(grpc.aio.AioRpcError, match="reading 8 backups already"):
                await node.read(made.id)
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    assert await node.read(made.id) == node.image
                    break
                await asyncio.sleep(0.1)

    with_node(tmp_path, body)


def test_a_sparse_volume_of_a_tebibyte_is_quick_and_takes_no_memory(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        device = node.standby.volumes["huge"] = FileDevice.create(tmp_path / "huge", TIB)
        places = [0, TIB // 3, TIB - 512]
        for place in places:
            device.write(place, [b"x" * 512])
        async with asyncio.timeout(20):
            made = await node.back_up("huge")
            assert made.size == TIB and made.stored_bytes < 1 << 20
            async with node.stub() as stub:
                await answer_to(stub.VerifyBackup(backup_pb2.BackupId(id=made.id)))
                request = backup_pb2.RestoreBackupRequest(id=made.id, target=str(tmp_path / "restored"))
                await answer_to(stub.RestoreBackup(request))
                status = await stub.GetStatus(common_pb2.Empty())
        assert status.info.resident_bytes < 200 << 20
        restored = FileDevice(tmp_path / "restored", read_only=True)
        buffer = bytearray(512)
        for place in places:
            restored.read_into(place, memoryview(buffer))
            assert buffer == b"x" * 512
        assert (tmp_path / "restored").stat().st_blocks < 2000  # a chunk of 256 KiB for each place
        restored.close()
        device.close()

    with_node(tmp_path, body)


def test_memory_stays_bounded_over_a_large_backup_and_its_reading(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        device = node.standby.volumes["large"] = FileDevice.create(tmp_path / "large", 1 << 30)
        noise = random.Random(1).randbytes(32 << 20)
        for offset in range(0, 1 << 30, len(noise)):
            device.write(offset, [offset.to_bytes(8, "big"), noise[8:]])
        made = await node.back_up("large")
        async with node.channel() as channel:
            # A client that reads slowly: what it does not take must wait in the node's repository.
            count = 0
            async for message in streams.read_backup(channel, backup_pb2.ReadBackupRequest(id=made.id)):
                count += len(chunks.decode(message).data)
                if count < 16 << 20:
                    await asyncio.sleep(0.05)
        assert count == 1 << 30
        assert node.process is not None
        status = Path(f"/proc/{node.process.pid}/status").read_text()
        peak_kib = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
        assert peak_kib < 200 << 10
        device.close()

    with_node(tmp_path, body)


def test_the_standby_going_away_for_a_while_is_survived(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.standby.faults = [breaks_at(3), breaks_at(0), breaks_at(1)]
        assert await node.read((await node.back_up()).id) == node.image
        assert node.standby.stream_count == 4
        assert not node.standby.snapshots

    with_node(tmp_path, body)


def test_a_snapshot_left_by_a_kill_goes_when_the_node_starts(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        node.standby.delay_s = 0.05
        run = asyncio.create_task(node.back_up())
        await eventually(lambda: node.standby.stream_count == 1)
        await node.kill()
        with pytest.raises(grpc.aio.AioRpcError):
            await run
        assert node.standby.snapshots
        await node.start()
        await eventually(lambda: not node.standby.snapshots)
        async with node.stub() as stub:
            await eventually_async(lambda: is_idle(stub))
        assert await node.list_ids() == []

    with_node(tmp_path, body)


def test_a_size_of_the_volume_that_is_no_multiple_of_anything_is_kept(tmp_path: Path) -> None:
    async def body(node: Node) -> None:
        device = node.standby.volumes["odd"] = FileDevice.create(tmp_path / "odd", 1_000_001)
        device.write(999_990, [b"the end, so"])
        made = await node.back_up("odd")
        assert made.size == 1_000_001 != SIZE
        async with node.stub() as stub:
            request = backup_pb2.RestoreBackupRequest(id=made.id, target=str(tmp_path / "restored"))
            await answer_to(stub.RestoreBackup(request))
        assert (tmp_path / "restored").read_bytes() == (tmp_path / "odd").read_bytes()
        device.close()

    with_node(tmp_path, body)
