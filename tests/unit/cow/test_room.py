"""Room for old blocks: stores that grow, what they say when they fill up, and what goes when there is none left."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from standby.cow import Limits, SnapshotState, create_snapshots, store_directory
from standby.cow.logged_store import LoggedStore
from standby.cow.store_directory import StoreDirectory
from stillpoint.devices import Buffer, FileDevice, MemoryDevice
from stillpoint.errors import DeviceError, InvalidRequest, Refused, StoreFull
from tests.support.cow import KIB, MIB, Rig, read, run
from tests.support.devices import RecordingDevice
from tests.unit.cow.test_stores import VOLUME, _images


class _Dying(RecordingDevice):
    """Refuses everything after a number of writes and flushes; below 0: never."""

    steps_left = -1

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._step()
        super().write(offset, buffers)

    def flush(self) -> None:
        self._step()
        super().flush()

    def _step(self) -> None:
        if not self.steps_left:
            raise DeviceError("the power failed", 5)
        self.steps_left -= 1


def _fill(rig: Rig, choose: random.Random) -> bytes:
    data = choose.randbytes(rig.size)
    rig.engine.write(0, memoryview(data))
    return data


@pytest.mark.parametrize("several", [False, True])
def test_a_store_grown_while_it_is_read_serves_old_and_new_blocks_also_after_a_restart(
    tmp_path: Path, several: bool
) -> None:
    async def main() -> None:
        choose = random.Random(1)
        rig = Rig(tmp_path, size=4 * MIB)
        rig.stores._open_file = store_directory._open_paths
        paths = [tmp_path / "one", tmp_path / "two"] if several else [tmp_path / "one"]
        rig.stores.create("growing", kind="file", size=6 * MIB, paths=paths)
        images = {"first": _fill(rig, choose)}
        await rig.snapshot("first", "growing")
        images["second"] = _fill(rig, choose)
        await rig.engine.commit()
        device = rig.device("first")
        assert read(device, 0, rig.size) == images["first"]
        with pytest.raises(Refused):
            rig.stores.resize("growing", 5 * MIB)
        rig.stores.resize("growing", 20 * MIB)
        assert rig.stores.list()[0].size >= 18 * MIB
        await rig.snapshot("second", "growing")
        last = _fill(rig, choose)
        await rig.engine.flush()
        second = rig.device("second")
        assert read(device, 0, rig.size) == images["first"]
        assert read(second, 0, rig.size) == images["second"]
        device.close()
        second.close()
        await rig.engine.close()
        rig.stores.close()
        assert sum(path.stat().st_size for path in paths) == 20 * MIB
        rig.stores = StoreDirectory(tmp_path / "stores")
        assert not rig.stores.list()[0].failed
        rig.engine = type(rig.engine).open(tmp_path / "state", rig.mirror, rig.stores, mirror_paths=[rig.mirror_path])
        for name, image in images.items():
            assert rig.image(name) == image
        assert rig.engine.read(0, rig.size) == last
        await rig.close()

    run(main)


def test_a_full_store_grows_up_to_its_cap_before_a_snapshot_goes(tmp_path: Path) -> None:
    async def main() -> None:
        choose = random.Random(2)
        rig = Rig(tmp_path, size=4 * MIB)
        rig.stores.create("capped", kind="file", size=2 * MIB, size_max=15 * MIB)
        images = []
        for number in range(3):
            images.append(_fill(rig, choose))
            await rig.snapshot(f"s{number}", "capped")
        _fill(rig, choose)
        await rig.engine.flush()
        assert [snapshot.state for snapshot in rig.engine.snapshots()] == [SnapshotState.ACTIVE] * 3
        assert [rig.image(f"s{number}") for number in range(3)] == images
        await rig.snapshot("s3", "capped")
        _fill(rig, choose)
        await rig.engine.flush()
        assert rig.engine.get("s0").state is SnapshotState.INVALID
        assert rig.engine.get("s3").state is SnapshotState.ACTIVE
        [store] = rig.stores.list()
        assert store.size_max == 15 * MIB
        assert (tmp_path / "stores" / "default.store").exists() is False
        assert rig.stores.get("capped").device.size == 15 * MIB
        await rig.close()

    run(main)


def test_only_stores_of_files_may_have_a_cap(tmp_path: Path) -> None:
    stores = StoreDirectory(tmp_path)
    with pytest.raises(InvalidRequest):
        stores.create("m", kind="memory", size=4 * MIB, size_max=8 * MIB)
    with pytest.raises(InvalidRequest):
        stores.create("f", kind="file", size=4 * MIB, size_max=3 * MIB)
    stores.create("m", kind="memory", size=4 * MIB)
    with pytest.raises(Refused):
        stores.resize("m", 8 * MIB)
    stores.close()


def test_a_crash_at_any_step_of_growing_keeps_every_record() -> None:
    """After each write and flush, with any part of what was not flushed."""
    choose = random.Random(3)
    states = 0
    for stop in range(12):
        device = _Dying(MemoryDevice(3 * MIB))
        store = LoggedStore.create(device, name="s", number=5)
        store.preserve(_images([10, 11], b"a" * 4096 + b"c" * 4096))
        store.synchronize()
        device.steps_left = stop
        try:
            store.grow(6 * MIB, lambda: None)
        except DeviceError:
            pass
        else:
            assert stop > 3
        for image in device.crash_images(choose, 20):
            left = MemoryDevice(len(image))
            left.write(0, (image,))
            again = LoggedStore.open(left, name="s")
            assert again.recovered(VOLUME)["block"].tolist() == [10]
            assert again.recovered(VOLUME)["count"].tolist() == [2]
            again.adopt(VOLUME, lambda: (1,))
            again.preserve(_images([99], b"e" * 4096))
            assert again.size > 4 * MIB
            left.close()
            states += 1
    print(f"{states} crash states")


def test_a_store_says_once_that_it_is_70_85_and_95_percent_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stores = StoreDirectory(tmp_path)
    store = stores.create("small", kind="file", size=12 * MIB)
    segments = store.size // MIB
    kept = []
    with caplog.at_level(logging.INFO):
        for number in range(segments):
            kept.append(store.preserve(_images(list(range(256)), bytes([number + 1]) * MIB)))
            percent = 100 * (number + 1) // segments
            assert stores.list()[0].used_percent == percent
            assert stores.list()[0].warning_percent == max((x for x in (70, 85, 95) if percent >= x), default=0)
    assert [record.getMessage() for record in caplog.records] == [
        f"preservation store is {percent} % full" for percent in (70, 85, 95)
    ]
    assert vars(caplog.records[0])["store"] == "small"
    store.synchronize()
    store.release(np.concatenate(kept) & np.uint64((1 << 48) - 1), 4 * KIB)
    assert stores.list()[0].warning_percent == 0
    stores.close()


def test_expiring_takes_the_oldest_snapshots_that_are_not_protected_and_loses_no_other(tmp_path: Path) -> None:
    async def main() -> None:
        choose = random.Random(4)
        rig = Rig(tmp_path, size=4 * MIB, store_size=14 * MIB, expires=True)
        images: dict[str, bytes] = {}
        for number in range(6):
            images[f"s{number}"] = _fill(rig, choose)
            await rig.snapshot(f"s{number}")
            if number == 0:
                await rig.engine.protect("s0", True)
        last = _fill(rig, choose)
        await rig.engine.flush()
        left = [snapshot.name for snapshot in rig.engine.snapshots()]
        assert left == ["s0", "s4", "s5"]
        assert all(snapshot.state is SnapshotState.ACTIVE for snapshot in rig.engine.snapshots())
        for name in left:
            assert rig.image(name) == images[name]
        await rig.engine.protect("s4", True)
        await rig.engine.protect("s5", True)
        await rig.snapshot("s6")
        await rig.engine.protect("s6", True)
        _fill(rig, choose)
        await rig.engine.flush()
        # Only protected ones are left, and the mirror goes on all the same.
        assert rig.engine.get("s0").state is SnapshotState.INVALID
        assert rig.image("s6") == last
        await rig.close()

    run(main)


@pytest.mark.parametrize("store", [None, "memory"])
def test_snapshots_of_a_volume_hold_no_more_bytes_than_they_may(tmp_path: Path, store: str | None) -> None:
    async def main() -> None:
        choose = random.Random(5)
        rig = Rig(tmp_path, size=4 * MIB, expires=True, preserved_size_max=9 * MIB)
        rig.stores.create("memory", kind="memory", size=64 * MIB)
        images: dict[str, bytes] = {}
        for number in range(5):
            images[f"s{number}"] = _fill(rig, choose)
            await rig.engine.commit()
            await rig.snapshot(f"s{number}", store)
        _fill(rig, choose)
        await rig.engine.flush()
        rig.engine.write(0, memoryview(choose.randbytes(4096)))
        await rig.engine.flush()
        left = [snapshot.name for snapshot in rig.engine.snapshots()]
        assert left[-1] == "s4"
        assert sum(each.used_size for each in rig.stores.list()) <= 13 * MIB
        for name in left:
            assert rig.image(name) == images[name]
        if store is None:
            held = rig.engine._volume.preserved_size
            await rig.engine.close()
            rig.reopen()
            assert rig.engine._volume.preserved_size == held == rig.stores.list()[-1].used_size
        for name in left:
            await rig.engine.delete(name)
        assert rig.engine._volume.preserved_size == 0
        await rig.close()

    run(main)


@pytest.mark.parametrize("expires", [False, True])
def test_whoever_serves_snapshots_is_told_of_each_that_the_engine_ends_and_of_no_other(
    tmp_path: Path, expires: bool
) -> None:
    async def main() -> None:
        choose = random.Random(7)
        ended: list[str] = []
        rig = Rig(
            tmp_path,
            size=4 * MIB,
            store_size=14 * MIB,
            expires=expires,
            on_ended=lambda snapshot: ended.append(snapshot.name),
        )
        await rig.snapshot("deleted")
        await rig.engine.delete("deleted")
        for number in range(5):
            _fill(rig, choose)
            await rig.engine.commit()
            await rig.snapshot(f"s{number}")
        _fill(rig, choose)
        await rig.engine.flush()
        active = {snapshot.name for snapshot in rig.engine.snapshots() if snapshot.state is SnapshotState.ACTIVE}
        assert ended == [name for name in ("s0", "s1", "s2", "s3", "s4") if name not in active]
        assert ended
        assert {snapshot.name for snapshot in rig.engine.snapshots()} - active == set(() if expires else ended)
        await rig.close()

    run(main)


def test_a_volume_has_no_more_snapshots_than_it_may(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path, count_max=2)
        await rig.snapshot("a")
        await rig.snapshot("b")
        with pytest.raises(Refused, match="delete one"):
            await rig.snapshot("c")
        await rig.engine.delete("a")
        await rig.snapshot("c")
        await rig.close()

    run(main)


def test_one_snapshot_more_than_may_be_takes_the_place_of_the_oldest_that_is_not_protected(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path, count_max=2, expires=True)
        await create_snapshots([rig.engine], "kept")
        await rig.engine.protect("kept", True)
        for name in ("b", "c", "d"):
            await create_snapshots([rig.engine], name)
            assert [each.name for each in rig.engine.snapshots()] == ["kept", name]
        await rig.engine.protect("d", True)
        with pytest.raises(Refused, match="delete one"):
            await create_snapshots([rig.engine], "e")
        assert [each.name for each in rig.engine.snapshots()] == ["kept", "d"]
        await rig.close()

    run(main)


def test_a_volume_keeps_limits_of_its_own_and_takes_others_from_the_node(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path, count_max=2, preserved_size_max=9 * MIB)
        await rig.snapshot("a")
        with pytest.raises(InvalidRequest):
            await rig.engine.set_limits({"count_max": -1})
        with pytest.raises(InvalidRequest):
            await rig.engine.set_limits({"size_max": 1})
        await rig.engine.set_limits({"count_max": 3})
        assert rig.engine.limits == Limits(count_max=3, preserved_size_max=9 * MIB)
        for clean in (True, False):
            await rig.engine.close(clean=clean)
            rig.options |= {"expires": True}  # as after a change of the node's configuration
            rig.reopen()
            assert rig.engine.limits == Limits(expires=True, count_max=3, preserved_size_max=9 * MIB)
        await rig.engine.set_limits({"count_max": 0, "expires": False})
        for name in ("b", "c", "d"):
            await create_snapshots([rig.engine], name)
        with pytest.raises(Refused, match="delete some first"):
            await rig.engine.set_limits({"count_max": 3})
        assert rig.engine.limits == Limits(preserved_size_max=9 * MIB)
        await rig.engine.delete("a")
        await rig.engine.set_limits({"count_max": 3})
        await rig.engine.delete("b")
        await rig.engine.set_limits({})
        assert rig.engine.limits == Limits(expires=True, count_max=2, preserved_size_max=9 * MIB)
        await rig.close()

    run(main)


@pytest.mark.parametrize("expires", [False, True])
def test_a_limit_on_room_never_costs_a_protected_snapshot(tmp_path: Path, expires: bool) -> None:
    async def main() -> None:
        choose = random.Random(8)
        rig = Rig(tmp_path, size=4 * MIB)
        image = _fill(rig, choose)
        await rig.snapshot("kept")
        await rig.engine.protect("kept", True)
        _fill(rig, choose)
        await rig.engine.commit()
        await rig.snapshot("other")
        with pytest.raises(Refused, match="delete some first"):
            await rig.engine.set_limits({"preserved_size_max": 3 * MIB})
        await rig.engine.set_limits({"preserved_size_max": 5 * MIB, "expires": expires})
        _fill(rig, choose)
        await rig.engine.flush()
        others = [each.state for each in rig.engine.snapshots() if each.name == "other"]
        assert others == ([] if expires else [SnapshotState.INVALID])
        await rig.snapshot("third")
        last = _fill(rig, choose)
        await rig.engine.flush()
        assert rig.engine.get("kept").state is SnapshotState.ACTIVE
        assert rig.image("kept") == image
        assert rig.engine.read(0, rig.size) == last
        await rig.close()

    run(main)


def test_a_store_on_a_disk_that_has_not_grown_stays_in_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = StoreDirectory(tmp_path)
    store = stores.create("s", kind="file", size=4 * MIB, size_max=8 * MIB)

    def refuse(self: FileDevice, size: int) -> None:
        raise Refused("the disk has its size")

    monkeypatch.setattr(FileDevice, "_grow", refuse)
    for number in range(store.size // MIB):
        store.preserve(_images(list(range(256)), bytes([number + 1]) * MIB))
    with pytest.raises(StoreFull):
        store.preserve(_images([1], b"x" * 4096))
    assert not store.failed
    stores.close()


@pytest.mark.parametrize("form", ["array", "hash", "ordered", "unordered"])
def test_what_is_reclaimable_is_what_deleting_all_but_protected_snapshots_gives_back(tmp_path: Path, form: str) -> None:
    async def main() -> None:
        choose = random.Random(6)
        rig = Rig(tmp_path)
        rig.stores.create("default", kind="file", size=64 * MIB, map_form=form)
        number = rig.stores.list()[0].number
        for name in ("a", "kept", "b", "c"):
            for _ in range(60):
                rig.engine.write(choose.randrange(rig.size - 9000), memoryview(choose.randbytes(9000)))
            await rig.snapshot(name)
        _fill(rig, choose)
        await rig.engine.flush()
        assert rig.engine.reclaimable()[number] == rig.stores.list()[0].used_size
        await rig.engine.protect("kept", True)
        expected = rig.engine.reclaimable()[number]
        before = rig.stores.list()[0].used_size
        for name in ("c", "a", "b"):
            await rig.engine.delete(name)
        assert 0 < before - rig.stores.list()[0].used_size == expected
        await rig.close()

    run(main)


def test_a_snapshot_that_is_being_made_does_not_pay_for_a_limit(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path, preserved_size_max=128 * KIB)
        rig.engine.write(0, memoryview(b"a" * 256 * KIB))
        await rig.snapshot("kept")
        await rig.engine.protect("kept", True)
        rig.engine.write(0, memoryview(b"b" * 256 * KIB))  # more than the limit, and not preserved before the next cut
        await rig.snapshot("new")
        assert [snapshot.state for snapshot in rig.engine.snapshots()] == [SnapshotState.ACTIVE] * 2
        assert rig.image("new")[: 256 * KIB] == b"b" * 256 * KIB
        await rig.close()

    run(main)
