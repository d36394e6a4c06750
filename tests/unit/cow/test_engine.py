"""The engine on real files, against a plain byte array."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from standby.cow import SnapshotState, create_snapshots
from stillpoint.errors import (
    AlreadyExists,
    InvalidRequest,
    NotFound,
    OutOfRange,
    PermissionRefused,
    Refused,
    SnapshotInvalid,
)
from stillpoint.extents import Extent, MappedExtent
from tests.support.cow import KIB, MIB, Rig, read, run
from tests.support.devices import PassingDevice


def _noise(choose: random.Random, length: int) -> memoryview:
    return memoryview(choose.randbytes(length))


def test_write_during_snapshot_keeps_old_block(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        rig.engine.write(0, memoryview(b"old" * 100))
        await rig.snapshot("s1")
        rig.engine.write(1, memoryview(b"new"))
        assert rig.engine.staged_bytes > 0
        assert rig.engine.read(0, 6) == b"onewld"
        await rig.engine.flush()
        assert rig.engine.staged_bytes == 0
        assert rig.image("s1")[:300] == b"old" * 100
        assert rig.mirror_path.read_bytes()[:6] == b"onewld"
        await rig.close()

    run(main)


@pytest.mark.parametrize(
    ("block_size", "form"), [(512, "ordered"), (4 * KIB, "hash"), (64 * KIB, "array"), (MIB, "unordered")]
)
@pytest.mark.parametrize("store", [None, "memory"])
@pytest.mark.parametrize("seed", [1])
def test_random_life_matches_a_byte_array(
    tmp_path: Path, block_size: int, form: str, store: str | None, seed: int
) -> None:
    async def main() -> None:
        choose = random.Random(seed)
        size = max(MIB, 4 * block_size)
        rig = Rig(tmp_path, size=size, block_size=block_size)
        rig.stores.create("default", kind="file", size=64 * MIB, map_form=form)
        rig.stores.create("memory", kind="memory", size=64 * MIB, map_form=form)
        truth = bytearray(size)
        shots: dict[str, bytes] = {}
        for number in range(300 if block_size < MIB else 120):
            draw = choose.random()
            offset = choose.randrange(size)
            if draw < 0.6:
                data = _noise(choose, min(size - offset, choose.choice((1, 512, 1000, 4096, 70_000))))
                rig.engine.write(offset, data)
                truth[offset : offset + len(data)] = data
            elif draw < 0.7:
                length = min(size - offset, choose.randrange(300_000))
                choose.choice((rig.engine.trim, rig.engine.write_zeroes))(offset, length)
                truth[offset : offset + length] = bytes(length)
            elif draw < 0.8:
                await choose.choice((rig.engine.commit, rig.engine.flush))()
            elif draw < 0.87:
                shots[f"s{number}"] = bytes(truth)
                await rig.snapshot(f"s{number}", store)
            elif draw < 0.92 and shots:
                name = choose.choice(list(shots))
                await rig.engine.delete(name)
                del shots[name]
            elif draw < 0.95 and store is None:
                await rig.engine.close()
                rig.reopen()
            elif shots:
                name = choose.choice(list(shots))
                assert rig.image(name) == shots[name], number
            assert rig.engine.read(0, size) == truth, number
        for name, image in shots.items():
            assert rig.image(name) == image
            await rig.engine.delete(name)
        assert all(store.used_size == 0 for store in rig.stores.list())
        await rig.close()

    run(main)


def test_snapshots_of_several_volumes_are_one_instant_and_share_a_store(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        one, two = Rig(tmp_path / "a"), Rig(tmp_path / "b")
        two.stores.close()
        # The second volume uses the first one's stores, with another block size.
        two.engine._volume.stores = one.stores
        one.engine.write(0, memoryview(b"one"))
        two.engine.write(0, memoryview(b"two"))
        snapshots = await create_snapshots([one.engine, two.engine], "both")
        assert [snapshot.state for snapshot in snapshots] == [SnapshotState.ACTIVE] * 2
        for rig in (one, two):
            rig.engine.write(0, memoryview(b"xxx"))
            await rig.engine.flush()
        assert one.image("both")[:3] == b"one"
        assert two.image("both")[:3] == b"two"
        with pytest.raises(AlreadyExists):
            await create_snapshots([one.engine, two.engine], "both")
        await one.snapshot("mine")
        with pytest.raises(AlreadyExists):
            await create_snapshots([two.engine, one.engine], "mine")
        assert [snapshot.name for snapshot in two.engine.snapshots()] == ["both"]

    run(main)


def test_a_trim_of_unwritten_space_costs_no_room(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        await rig.snapshot("s")
        rig.engine.trim(0, rig.size)
        await rig.engine.flush()
        statistics = rig.engine.statistics("s")
        assert statistics.blocks_preserved == rig.size // rig.block_size
        assert statistics.reclaimable_size == 0
        assert next(iter(rig.device("s").extents(0, rig.size))).hole
        await rig.close()

    run(main)


def test_one_block_is_preserved_once_whatever_the_number_of_snapshots(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        rig.engine.write(0, memoryview(b"x" * rig.block_size))
        for number in range(20):
            await rig.snapshot(f"s{number}")
        rig.engine.write(0, memoryview(b"y"))
        rig.engine.write(5, memoryview(b"z"))
        await rig.engine.flush()
        assert rig.stores.list()[0].used_size == rig.block_size
        for number in range(20):
            assert rig.image(f"s{number}")[:2] == b"xx"
        await rig.close()

    run(main)


def test_statistics_say_exactly_what_a_deletion_gives_back(tmp_path: Path) -> None:
    async def main() -> None:
        choose = random.Random(5)
        rig = Rig(tmp_path)
        names = []
        for number in range(8):
            for _ in range(20):
                rig.engine.write(choose.randrange(rig.size - 5000), _noise(choose, 5000))
            await rig.snapshot(f"s{number}")
            names.append(f"s{number}")
        rig.engine.write(0, _noise(choose, rig.size // 2))
        await rig.engine.flush()
        choose.shuffle(names)
        for name in names:
            before = rig.stores.list()[0].used_size
            expected = rig.engine.statistics(name).reclaimable_size
            await rig.engine.delete(name)
            assert before - rig.stores.list()[0].used_size == expected
        assert rig.stores.list()[0].used_size == 0
        await rig.close()

    run(main)


def test_changed_extents_are_exactly_the_blocks_that_were_touched(tmp_path: Path) -> None:
    async def main() -> None:
        choose = random.Random(9)
        rig = Rig(tmp_path)
        touched: list[set[int]] = []
        for number in range(8):
            blocks: set[int] = set()
            for _ in range(10):
                offset, length = choose.randrange(rig.size - 9000), choose.randrange(1, 9000)
                choose.choice(
                    (
                        lambda o, n: rig.engine.write(o, _noise(choose, n)),
                        rig.engine.trim,
                        rig.engine.write_zeroes,
                    )
                )(offset, length)
                blocks |= set(range(offset // rig.block_size, (offset + length - 1) // rig.block_size + 1))
            touched.append(blocks)
            await rig.snapshot(f"s{number}")
            await rig.engine.bookmark(f"b{number}", f"s{number}")
        await rig.engine.delete("s3")
        await rig.engine.close()
        rig.reopen()
        marks = rig.engine.bookmarks()
        for base in range(8):
            for target in {*range(base, 8)} - {3}:
                answer = await rig.engine.changed(
                    f"s{target}", base=marks[base].generation, incarnation=marks[base].incarnation
                )
                assert answer.known
                blocks = {
                    block
                    for extent in answer.extents
                    for block in range(extent.offset // rig.block_size, extent.end // rig.block_size)
                }
                assert blocks == set().union(*touched[base + 1 : target + 1])
        await rig.close()

    run(main)


def test_a_base_of_another_incarnation_is_unknown_and_means_everything(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        await rig.snapshot("s")
        answer = await rig.engine.changed("s", base=1, incarnation=uuid4())
        assert not answer.known
        assert list(answer.extents) == [Extent(0, rig.size)]
        await rig.close()

    run(main)


def test_growth_keeps_old_snapshots_their_size_and_counts_as_written(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        rig.engine.write(0, memoryview(b"before"))
        await rig.snapshot("small")
        base = rig.engine.get("small").generation
        await rig.engine.resize(2 * rig.size)
        rig.engine.write(2 * rig.size - 3, memoryview(b"end"))
        rig.engine.write(0, memoryview(b"after!"))
        await rig.snapshot("large")
        answer = await rig.engine.changed("large", base=base, incarnation=rig.engine.incarnation)
        assert list(answer.extents) == [Extent(0, rig.block_size), Extent(rig.size, rig.size)]
        rig.engine.write(2 * rig.size - 3, memoryview(b"END"))
        await rig.engine.close()
        rig.reopen()
        assert rig.engine.size == 2 * rig.size
        assert rig.image("small") == b"before" + bytes(rig.size - 6)
        assert rig.image("large") == b"after!" + bytes(2 * rig.size - 9) + b"end"
        await rig.engine.delete("large")
        assert rig.image("small")[:6] == b"before"
        with pytest.raises(InvalidRequest):
            await rig.engine.resize(rig.size)
        await rig.close()

    run(main)


def test_requests_that_make_no_sense_change_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        engine = rig.engine
        for name in ("", "a/b", ".x", "x" * 65, "a b"):
            with pytest.raises(InvalidRequest):
                engine.cut(name)
        with pytest.raises(NotFound):
            engine.cut("s", "nowhere")
        await rig.snapshot("s")
        with pytest.raises(AlreadyExists):
            engine.cut("s")
        with pytest.raises(NotFound):
            await engine.delete("t")
        with pytest.raises(OutOfRange):
            engine.write(rig.size - 1, memoryview(b"ab"))
        with pytest.raises(OutOfRange):
            engine.write(-1, memoryview(b"ab"))
        with pytest.raises(OutOfRange):
            engine.trim(0, rig.size + 1)
        engine.write(rig.size, memoryview(b""))
        with pytest.raises(Refused, match="need it"):
            rig.stores.delete("default")
        device = rig.device("s")
        with pytest.raises(PermissionRefused):
            device.write(0, [b"x"])
        device.close()
        await engine.protect("s", True)
        with pytest.raises(Refused, match="protected"):
            await engine.delete("s")
        await rig.engine.close()
        rig.reopen()
        assert rig.engine.get("s").protected
        await rig.engine.protect("s", False)
        await rig.engine.delete("s")
        rig.stores.delete("default")
        await rig.close()

    run(main)


def test_a_snapshot_in_memory_is_invalid_after_a_restart_and_older_durable_ones_are_not(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        rig.stores.create("memory", kind="memory", size=4 * MIB)
        rig.engine.write(0, memoryview(b"one"))
        await rig.snapshot("durable")
        rig.engine.write(rig.block_size, memoryview(b"two"))
        await rig.snapshot("fleeting", "memory")
        rig.engine.write(0, memoryview(b"xxx"))
        rig.engine.write(rig.block_size, memoryview(b"yyy"))
        await rig.engine.flush()
        assert rig.image("fleeting")[rig.block_size : rig.block_size + 3] == b"two"
        await rig.engine.close()
        rig.reopen()
        assert rig.engine.get("fleeting").state is SnapshotState.INVALID
        with pytest.raises(SnapshotInvalid):
            rig.device("fleeting")
        assert rig.image("durable") == b"one" + bytes(rig.size - 3)
        await rig.engine.delete("fleeting")
        await rig.close()

    run(main)


def test_memory_for_staged_changes_has_a_bound(tmp_path: Path) -> None:
    async def main() -> None:
        calls = []
        rig = Rig(tmp_path, stage_size_max=64 * KIB, on_staged=lambda: calls.append(1))
        await rig.snapshot("s")
        block = memoryview(b"x" * rig.block_size)
        written = 0
        while not rig.engine.wants_commit:
            rig.engine.write(written, block)
            written += len(block)
        assert 64 * KIB <= rig.engine.staged_bytes < 64 * KIB + 2 * rig.block_size
        assert calls == [1]
        await rig.engine.commit()
        assert rig.engine.staged_bytes == 0
        await rig.close()

    run(main)


def test_a_commit_is_worth_it_long_before_the_bound_and_more_is_staged_meanwhile(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path, stage_size_max=1 * MIB)
        await rig.snapshot("s")
        assert not rig.engine.is_worth_commit
        while not rig.engine.is_worth_commit:
            rig.engine.write(rig.engine.staged_bytes // KIB * KIB, memoryview(b"early" * 200))
        assert rig.engine.staged_bytes < MIB // 8
        commit = asyncio.get_running_loop().create_task(rig.engine.commit())
        while not rig.engine.staged()[1:]:
            await asyncio.sleep(0)
            rig.engine.write(0, memoryview(b"later"))
        assert not rig.engine.is_worth_commit  # what is being committed does not call for another commit
        await commit
        assert rig.engine.staged_bytes > 0
        await rig.engine.commit()
        assert rig.engine.read(0, 10) == rig.mirror_path.read_bytes()[:10] == b"laterearly"
        assert rig.image("s") == bytes(rig.size)
        await rig.close()

    run(main)


class WatchedDevice(PassingDevice):
    """Notes how much it is asked about at once."""

    asked: list[int]

    def extents(self, offset: int, length: int) -> Iterator[MappedExtent]:
        self.asked.append(length)
        return super().extents(offset, length)


def test_the_mirror_is_not_asked_where_its_data_ends(tmp_path: Path) -> None:
    # A system may have to walk a full file of a terabyte to its end for that, for each piece that is preserved.
    async def main() -> None:
        WatchedDevice.asked = []
        rig = Rig(tmp_path, wrap_mirror=WatchedDevice)
        rig.engine.write(0, memoryview(b"d" * (rig.size // 2)))
        await rig.snapshot("s")
        rig.engine.write(0, memoryview(b"e" * (rig.size // 2)))
        await rig.engine.commit()
        assert WatchedDevice.asked == [1]
        rig.engine.trim(rig.size // 2, rig.size // 2)
        await rig.engine.commit()
        assert WatchedDevice.asked[1:] == [1, rig.size // 2]  # a hole is not read
        assert rig.image("s") == b"d" * (rig.size // 2) + bytes(rig.size // 2)
        await rig.close()

    run(main)


def test_a_deleted_volume_leaves_nothing_in_its_store(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        rig.engine.write(0, memoryview(b"x" * rig.size))
        await rig.snapshot("s")
        rig.engine.write(0, memoryview(b"y" * rig.size))
        await rig.engine.flush()
        await rig.engine.destroy()
        assert not (tmp_path / "state").exists()
        assert rig.stores.list()[0].used_size == 0
        rig.stores.delete("default")
        rig.stores.close()
        rig.mirror.close()

    run(main)


def test_a_reader_notices_that_its_snapshot_or_its_engine_has_gone(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        await rig.snapshot("s")
        await rig.snapshot("t")
        device, other = rig.device("s"), rig.device("t")
        await rig.engine.delete("s")
        with pytest.raises(SnapshotInvalid, match="deleted"):
            read(device, 0, 1)
        assert read(other, 0, 1) == b"\0"
        await rig.engine.close()
        rig.reopen()
        with pytest.raises(SnapshotInvalid, match="stopped"):
            read(other, 0, 1)
        assert rig.image("t")[:1] == b"\0"
        device.close()
        other.close()
        await rig.close()

    run(main)
