"""A full store, a store or a mirror that fails, a full state folder: snapshots go, the mirror loses nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

from standby.cow import SnapshotState
from standby.cow.birth import BirthMap
from standby.cow.catalog import Catalog
from standby.cow.mapped_file import MappedFile
from stillpoint.devices import BlockDevice
from stillpoint.errors import DeviceError, SnapshotInvalid
from tests.support.cow import KIB, MIB, Rig, read, run
from tests.support.devices import Fault, FaultyDevice


def _fill(rig: Rig, choose: random.Random) -> bytes:
    data = choose.randbytes(rig.size)
    rig.engine.write(0, memoryview(data))
    return data


@pytest.mark.parametrize("store", [None, "memory"])
def test_a_full_store_takes_the_oldest_snapshots_and_never_a_write(tmp_path: Path, store: str | None) -> None:
    async def main() -> None:
        choose = random.Random(3)
        rig = Rig(tmp_path, size=4 * MIB, store_size=6 * MIB)
        rig.stores.create("memory", kind="memory", size=6 * MIB)
        images: dict[str, bytes] = {}
        for number in range(5):
            images[f"s{number}"] = _fill(rig, choose)
            await rig.engine.commit()
            await rig.snapshot(f"s{number}", store)
        last = _fill(rig, choose)
        await rig.engine.flush()
        assert rig.mirror_path.read_bytes() == last
        states = [snapshot.state for snapshot in rig.engine.snapshots()]
        assert states[-1] is SnapshotState.ACTIVE
        assert states[0] is SnapshotState.INVALID
        assert "no room" in rig.engine.get("s0").invalid_reason
        for snapshot in rig.engine.snapshots():
            if snapshot.state is SnapshotState.ACTIVE:
                assert rig.image(snapshot.name) == images[snapshot.name]
            else:
                with pytest.raises(SnapshotInvalid, match="invalid"):
                    rig.device(snapshot.name)
        if store is None:
            await rig.engine.close()
            rig.reopen()
            assert [snapshot.state for snapshot in rig.engine.snapshots()] == states
            assert rig.image("s4") == images["s4"]
        for snapshot in rig.engine.snapshots():
            await rig.engine.delete(snapshot.name)
        assert all(store.used_size == 0 for store in rig.stores.list())
        await rig.snapshot("again", store)
        rig.engine.write(0, memoryview(b"x" * MIB))
        await rig.engine.flush()
        assert rig.image("again") == last
        await rig.close()

    run(main)


def test_a_reader_of_a_displaced_snapshot_gets_an_error_and_never_wrong_bytes(tmp_path: Path) -> None:
    async def main() -> None:
        choose = random.Random(4)
        rig = Rig(tmp_path, size=4 * MIB, store_size=3 * MIB)
        _fill(rig, choose)
        await rig.snapshot("s")
        device = rig.device("s")
        last = _fill(rig, choose)
        await rig.engine.flush()
        with pytest.raises(SnapshotInvalid):
            read(device, 0, 512)
        device.close()
        assert rig.engine.read(0, rig.size) == last
        await rig.close()

    run(main)


@pytest.mark.parametrize("what", ["writes", "flushes"])
@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_failing_store_costs_its_snapshots_and_no_write(tmp_path: Path, what: str, first: int) -> None:
    async def main() -> None:
        faulty: list[FaultyDevice] = []

        def wrap(device: BlockDevice) -> BlockDevice:
            faulty.append(FaultyDevice(device))
            return faulty[-1]

        choose = random.Random(first)
        rig = Rig(tmp_path, wrap_store=wrap)
        _fill(rig, choose)
        await rig.snapshot("s")
        count = faulty[0].write_count if what == "writes" else faulty[0].flush_count
        setattr(faulty[0], what, Fault(errno.EIO, first=count + first))
        last = b""
        for _ in range(4):
            last = _fill(rig, choose)
            await rig.engine.flush()
            await rig.snapshot(f"t{choose.random()}"[:20]) if not rig.stores.list()[0].failed else None
        assert rig.mirror_path.read_bytes() == last
        assert rig.engine.get("s").state is SnapshotState.INVALID
        assert rig.stores.list()[0].failed
        with pytest.raises(DeviceError):
            rig.engine.cut("new")
        rig.stores.create("memory", kind="memory", size=4 * MIB)
        await rig.snapshot("fresh", "memory")
        rig.engine.write(0, memoryview(b"x"))
        await rig.engine.flush()
        assert rig.image("fresh") == last

    run(main)


@pytest.mark.parametrize("store", [None, "memory"])
def test_a_mirror_that_cannot_be_read_costs_the_snapshots_and_no_write(tmp_path: Path, store: str | None) -> None:
    async def main() -> None:
        faulty: list[FaultyDevice] = []

        def wrap(device: BlockDevice) -> BlockDevice:
            faulty.append(FaultyDevice(device))
            return faulty[-1]

        rig = Rig(tmp_path, wrap_mirror=wrap)
        rig.stores.create("memory", kind="memory", size=4 * MIB)
        await rig.snapshot("s", store)
        faulty[0].reads = Fault(errno.EIO)
        rig.engine.write(0, memoryview(b"x" * 100))
        await rig.engine.flush()
        assert rig.engine.get("s").state is SnapshotState.INVALID
        assert rig.mirror_path.read_bytes()[:100] == b"x" * 100

    run(main)


def test_a_mirror_that_refuses_a_staged_write_stops_the_engine(tmp_path: Path) -> None:
    async def main() -> None:
        faulty: list[FaultyDevice] = []

        def wrap(device: BlockDevice) -> BlockDevice:
            faulty.append(FaultyDevice(device))
            return faulty[-1]

        rig = Rig(tmp_path, wrap_mirror=wrap)
        rig.engine.write(0, memoryview(b"old"))
        await rig.snapshot("s")
        faulty[0].writes = Fault(errno.EIO)
        rig.engine.write(0, memoryview(b"new"))
        with pytest.raises(DeviceError):
            await rig.engine.flush()
        faulty[0].writes = None
        with pytest.raises(DeviceError):
            rig.engine.write(9000, memoryview(b"x"))
        with pytest.raises(DeviceError):
            rig.engine.trim(0, 1)
        with pytest.raises(DeviceError):
            await rig.engine.flush()
        await rig.engine.close(clean=False)
        rig.reopen()
        assert rig.image("s")[:3] == b"old"
        await rig.close()

    run(main)


def test_a_failed_mirror_flush_is_never_forgotten(tmp_path: Path) -> None:
    async def main() -> None:
        faulty: list[FaultyDevice] = []

        def wrap(device: BlockDevice) -> BlockDevice:
            faulty.append(FaultyDevice(device))
            return faulty[-1]

        rig = Rig(tmp_path, wrap_mirror=wrap)
        faulty[0].flushes = Fault(errno.EIO, first=1, last=1)
        for _ in range(2):
            with pytest.raises(DeviceError):
                await rig.engine.flush()
        with pytest.raises(DeviceError):
            await rig.snapshot("s")
        assert rig.engine.snapshots() == []

    run(main)


def test_no_space_for_a_map_costs_snapshots_and_no_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        rig.engine.write(0, memoryview(b"old"))
        await rig.snapshot("s")
        with monkeypatch.context() as patch:
            patch.setattr(MappedFile, "reserve", _no_space)
            rig.engine.write(0, memoryview(b"new"))
            await rig.engine.flush()
            with pytest.raises(DeviceError):
                rig.engine.cut("t")
        assert rig.engine.get("s").state is SnapshotState.INVALID
        assert rig.engine.read(0, 3) == b"new"
        await rig.snapshot("u")
        await rig.close()

    run(main)


def _no_space(self: Any, offset: int, length: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("flush_fails", [False, True])
def test_a_catalog_that_cannot_say_a_snapshot_ended_still_never_serves_it_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flush_fails: bool
) -> None:
    async def main() -> None:
        choose = random.Random(1)
        rig = Rig(tmp_path, size=4 * MIB, store_size=3 * MIB)
        _fill(rig, choose)
        await rig.snapshot("s")
        with monkeypatch.context() as patch:
            patch.setattr(Catalog, "_write", _no_write)
            if flush_fails:
                patch.setattr(BirthMap, "synchronize", _no_flush)
            last = _fill(rig, choose)
            if flush_fails:
                with pytest.raises(DeviceError):
                    await rig.engine.flush()
            else:
                await rig.engine.commit()
                assert rig.engine.read(0, rig.size) == last
            await rig.engine.close(clean=False)
        # What the catalog says of the snapshot is not known; it may be valid in it.
        rig.reopen()
        if not flush_fails:
            assert rig.engine.get("s").state is SnapshotState.INVALID
        await rig.close()

    run(main)


def _no_write(self: Any, data: bytes) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _no_flush(self: Any) -> None:
    raise DeviceError("the birth map failed on purpose", errno.EIO)


def test_a_missing_store_costs_its_snapshots_and_not_the_volume(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        rig.engine.write(0, memoryview(b"data"))
        await rig.snapshot("s")
        rig.engine.write(0, memoryview(b"DATA"))
        await rig.close()
        rig.store_path.unlink()
        rig.reopen()
        assert rig.engine.get("s").state is SnapshotState.INVALID
        assert rig.engine.read(0, 4) == b"DATA"
        assert rig.stores.list()[0].failed
        rig.stores.delete("default")
        await rig.snapshot("t")
        await rig.close()

    run(main)


def test_a_store_full_of_another_volumes_blocks_is_given_back_by_deleting_them(tmp_path: Path) -> None:
    async def main() -> None:
        choose = random.Random(8)
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        one = Rig(tmp_path / "a", size=4 * MIB, store_size=6 * MIB, block_size=4 * KIB)
        two = Rig(tmp_path / "b", size=4 * MIB, block_size=64 * KIB)
        two.engine._volume.stores = one.stores
        image = _fill(two, choose)
        _fill(one, choose)
        await one.snapshot("s")
        _fill(one, choose)
        await one.engine.flush()
        await two.snapshot("s")
        _fill(two, choose)
        await two.engine.flush()
        assert two.engine.get("s").state is SnapshotState.INVALID
        await one.engine.delete("s")
        image = two.engine.read(0, two.size)
        await two.snapshot("t")
        _fill(two, choose)
        await two.engine.flush()
        assert two.image("t") == image

    run(main)


def test_a_cancelled_flush_leaves_the_work_to_be_finished(tmp_path: Path) -> None:
    async def main() -> None:
        faulty: list[FaultyDevice] = []

        def wrap(device: BlockDevice) -> BlockDevice:
            faulty.append(FaultyDevice(device))
            return faulty[-1]

        rig = Rig(tmp_path, wrap_store=wrap)
        rig.engine.write(0, memoryview(b"old"))
        await rig.snapshot("s")
        faulty[0].flush_delay_s = 0.2
        rig.engine.write(0, memoryview(b"new"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await rig.engine.flush()
        rig.engine.write(0, memoryview(b"NEW"))
        await rig.engine.flush()
        assert rig.mirror_path.read_bytes()[:3] == b"NEW"
        assert rig.image("s")[:3] == b"old"
        await rig.close()

    run(main)
