"""While a snapshot of many blocks is deleted the mirror goes on."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest

from standby.cow import Snapshot, SnapshotState
from standby.cow.association import ALL_ZEROES, STORE_SHIFT
from standby.cow.association_forms import FORMS
from standby.cow.counted_map import CountedMap
from standby.cow.retiring import Retirement
from standby.cow.values import NO_GENERATION
from tests.support.cow import KIB, MIB, Rig, run
from tests.support.executors import HeldExecutor

_MOVING = f"{Retirement.__name__}._dissolve"


def _start_deleting(rig: Rig, name: str) -> asyncio.Task[None]:
    return asyncio.get_running_loop().create_task(rig.engine.delete(name))


def test_writes_are_preserved_and_applied_while_the_newest_snapshot_is_deleted(tmp_path: Path) -> None:
    async def main() -> None:
        executor = HeldExecutor(_MOVING)
        rig = Rig(tmp_path, executor=executor)
        engine, block = rig.engine, rig.block_size
        engine.write(0, memoryview(b"a" * 4 * block))
        await rig.snapshot("old")
        engine.write(block, memoryview(b"b" * 2 * block))
        await rig.snapshot("new")
        engine.write(2 * block, memoryview(b"c" * block))  # goes to the map of "new", and "old" has its own
        engine.write(3 * block, memoryview(b"c" * block))  # is handed on
        await engine.flush()
        executor.may_go.clear()
        deletion = _start_deleting(rig, "new")
        await executor.hold(deletion)
        engine.write(0, memoryview(b"d" * block))  # only "old" sees it
        engine.write(block, memoryview(b"d" * block))  # only "new" did
        engine.write(3 * block, memoryview(b"d" * block))
        await asyncio.wait_for(engine.flush(), 20)
        await rig.snapshot("newest")
        assert not deletion.done()
        assert rig.image("old")[: 4 * block] == b"a" * 4 * block
        engine.write(0, memoryview(b"e" * block))
        await engine.flush()
        executor.may_go.set()
        await deletion
        for _ in range(2):
            assert rig.image("old")[: 4 * block] == b"a" * 4 * block
            assert rig.image("newest")[: 4 * block] == b"d" * 2 * block + b"c" * block + b"d" * block
            assert (
                rig.mirror_path.read_bytes()[: 4 * block] == b"e" * block + b"d" * block + b"c" * block + b"d" * block
            )
            await rig.engine.close()
            rig.reopen()
        await rig.close()

    run(main)


def test_a_commit_without_room_waits_for_what_a_deletion_will_free(tmp_path: Path) -> None:
    async def main() -> None:
        ended: list[Snapshot] = []
        executor = HeldExecutor(_MOVING)
        rig = Rig(tmp_path, size=4 * MIB, store_size=4 * MIB, executor=executor, on_ended=ended.append)
        for name in ("kept", "leaving"):
            await rig.snapshot(name)
            rig.engine.write(0, memoryview(random.Random(name).randbytes(MIB)))
            await rig.engine.flush()
        await rig.snapshot("last")
        rig.engine.write(0, memoryview(b"x" * MIB))
        await rig.engine.flush()
        rig.engine.write(MIB, memoryview(b"y" * 3 * MIB))
        await rig.engine.flush()
        await rig.snapshot("filling")
        executor.may_go.clear()
        deletion = _start_deleting(rig, "last")
        await executor.hold(deletion)
        rig.engine.write(MIB, memoryview(b"z" * 2 * MIB))
        flush = asyncio.get_running_loop().create_task(rig.engine.flush())
        await asyncio.wait([flush], timeout=0.3)
        assert not flush.done()
        assert [snapshot.state for snapshot in rig.engine.snapshots()].count(SnapshotState.ACTIVE) == 3
        executor.may_go.set()
        await asyncio.gather(deletion, flush)
        assert rig.mirror_path.read_bytes()[MIB : 3 * MIB] == b"z" * 2 * MIB
        await rig.close()

    run(main)


def test_closing_waits_for_a_deletion_and_a_deletion_for_another(tmp_path: Path) -> None:
    async def main() -> None:
        executor = HeldExecutor(_MOVING)
        rig = Rig(tmp_path, executor=executor)
        rig.engine.write(0, memoryview(b"first"))
        for name in ("one", "two", "three"):
            await rig.snapshot(name)
            rig.engine.write(0, memoryview(name.encode()))
            await rig.engine.flush()
        executor.may_go.clear()
        first = _start_deleting(rig, "three")
        await executor.hold(first)
        second = _start_deleting(rig, "two")
        closing = asyncio.get_running_loop().create_task(rig.engine.close())
        await asyncio.wait([second, closing], timeout=0.2)
        assert not second.done()
        assert not closing.done()
        executor.may_go.set()
        await asyncio.gather(first, second, closing)
        rig.reopen()
        assert [snapshot.name for snapshot in rig.engine.snapshots()] == ["one"]
        assert rig.image("one")[:5] == b"first"
        await rig.close()

    run(main)


@pytest.mark.parametrize("form", FORMS)
def test_snapshots_are_right_whatever_is_deleted_while_writes_go_on(form: str, tmp_path: Path) -> None:
    seed = FORMS.index(form)
    choose = random.Random(seed)
    print(f"seed {seed}")

    async def main() -> None:
        rig = Rig(tmp_path, size=2 * MIB, block_size=KIB)
        rig.stores.create("formed", kind="file", size=64 * MIB, map_form=form)
        rig.stores.create("fleeting", kind="memory", size=64 * MIB, map_form=form)
        model = bytearray(rig.size)
        images: dict[str, bytes] = {}
        deletions: list[asyncio.Task[None]] = []
        for number in range(400):
            for _ in range(choose.randrange(12)):
                length = choose.choice((1, 700, 5000, 40_000))
                offset = choose.randrange(rig.size - length)
                data = choose.randbytes(length)
                rig.engine.write(offset, memoryview(data))
                model[offset : offset + length] = data
            if choose.random() < 0.3:
                await rig.engine.commit()
            if choose.random() < 0.2:
                await rig.snapshot(f"s{number}", choose.choice(("formed", "formed", "fleeting")))
                images[f"s{number}"] = bytes(model)
            if images and choose.random() < 0.2:
                name = choose.choice(sorted(images))
                del images[name]
                deletions.append(_start_deleting(rig, name))
            await asyncio.sleep(0)
            if images and choose.random() < 0.1:
                name = choose.choice(sorted(images))
                assert rig.image(name) == images[name]
        await asyncio.gather(*deletions)
        await rig.engine.flush()
        assert rig.mirror_path.read_bytes() == model
        for name, image in images.items():
            assert rig.image(name) == image
        for name in images:
            await rig.engine.delete(name)
        assert [store.used_size for store in rig.stores.list()] == [0, 0]
        await rig.close()

    run(main)


def test_a_deletion_gives_back_more_than_it_frees_in_one_step(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path, size=40 * MIB, block_size=MIB, store_size=80 * MIB)
        rig.engine.write(0, memoryview(b"x" * 40 * MIB))
        await rig.snapshot("s")
        rig.engine.write(0, memoryview(b"y" * 40 * MIB))
        await rig.engine.flush()
        taken = rig.store_path.stat().st_blocks * 512
        await rig.engine.delete("s")
        assert rig.stores.list()[0].used_size == 0
        assert rig.store_path.stat().st_blocks * 512 <= taken - 39 * MIB  # but for the log
        await rig.close()

    run(main)


def test_counts_of_a_map_are_those_of_its_records(tmp_path: Path) -> None:
    choose = np.random.default_rng(7)
    records = CountedMap.create("array", tmp_path / "1.map", generation=9, block_count=20_000)
    order = choose.permutation(20_000)
    for start in range(0, 20_000, 500):
        blocks = np.sort(order[start : start + 500])
        addresses = choose.integers(1, 4, 500).astype(np.uint64) << np.uint64(STORE_SHIFT) | np.uint64(8192)
        addresses[choose.random(500) < 0.2] = ALL_ZEROES
        records.put_many(blocks, addresses, choose.integers(0, 9, 500).astype(np.uint32))
    assert records.count == 20_000
    every = [np.concatenate(column) for column in zip(*records.pieces(), strict=True)]
    for born_after in (NO_GENERATION, 0, 4, 8):
        wanted = every[1][(every[1] != ALL_ZEROES) & (every[2].astype(np.int64) > born_after)]
        numbers, counts = np.unique(wanted >> np.uint64(STORE_SHIFT), return_counts=True)
        assert records.stored(born_after=born_after) == dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    records.close()
