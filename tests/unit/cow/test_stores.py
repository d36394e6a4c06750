"""Preservation stores and what is free in them."""

from __future__ import annotations

import contextlib
import itertools
import random
from pathlib import Path
from uuid import UUID, uuid4

import numpy as np
import pytest

from standby.cow.association import ALL_ZEROES, offset_of
from standby.cow.logged_store import LoggedStore
from standby.cow.preservation import PreImages
from standby.cow.slots import SEGMENT_SIZE, SlotAllocator
from standby.cow.store_directory import StoreDirectory
from stillpoint.devices import FileDevice, MemoryDevice
from stillpoint.errors import AlreadyExists, DataCorrupt, InvalidRequest, NotFound, Refused, StoreFull
from tests.support.cow import KIB, MIB, read

VOLUME = UUID(int=7)


def _images(blocks: list[int], data: bytes, *, to: int = 1, volume: UUID = VOLUME) -> PreImages:
    born = np.zeros(len(blocks), dtype=np.uint32)
    return PreImages(volume, 4 * KIB, np.array(blocks), born, to, to + 1, memoryview(bytearray(data)))


def test_slots_of_all_sizes_never_overlap_and_all_come_back() -> None:
    choose = random.Random(2)
    allocator = SlotAllocator(data_offset=8192, data_size=8 * SEGMENT_SIZE)
    taken: dict[int, list[np.ndarray[tuple[int], np.dtype[np.uint64]]]] = {512: [], 4096: [], 65536: [], 1 << 20: []}
    for _ in range(2000):
        size = choose.choice(list(taken))
        if choose.random() < 0.6:
            with contextlib.suppress(StoreFull):
                taken[size].append(allocator.allocate(choose.randrange(1, 20), size))
        elif taken[size]:
            allocator.free(taken[size].pop(choose.randrange(len(taken[size]))), size)
        spans = sorted(
            (int(slot) * 512, int(slot) * 512 + size)
            for size, parts in taken.items()
            for part in parts
            for slot in part
        )
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert all(start >= 8192 and end <= 8192 + 8 * SEGMENT_SIZE for start, end in spans)
        assert allocator.used_size == sum(end - start for start, end in spans)
    for size, parts in taken.items():
        for part in parts:
            allocator.free(part, size)
    assert allocator.used_size == 0
    assert len(allocator.allocate(8, 1 << 20)) == 8


def test_a_store_made_over_an_old_one_knows_nothing_of_it() -> None:
    device = MemoryDevice(4 * MIB)
    old = LoggedStore.create(device, name="old", number=1)
    for block in range(20):
        old.preserve(_images([block], b"o" * 4096))
    old.synchronize()
    new = LoggedStore.create(device, name="new", number=2)
    new.preserve(_images([3], b"n" * 4096))
    new.synchronize()
    again = LoggedStore.open(device, name="new")
    assert again.uuid == new.uuid
    assert again.recovered(VOLUME)["block"].tolist() == [3]


def test_records_come_back_with_their_blocks_and_dead_ones_free_their_slots() -> None:
    device = MemoryDevice(4 * MIB)
    store = LoggedStore.create(device, name="s", number=5)
    data = b"a" * 4096 + bytes(4096) + b"c" * 4096
    addresses = store.preserve(_images([10, 11, 12], data))
    store.preserve(_images([10], b"d" * 4096, to=2))
    store.synchronize()
    assert addresses[1] == ALL_ZEROES
    assert read(device, offset_of(int(addresses[2])), 4096) == b"c" * 4096
    again = LoggedStore.open(device, name="s")
    assert again.recovered(VOLUME)["to"].tolist() == [1, 1, 1, 2]
    again.adopt(VOLUME, lambda: (1,))
    again.preserve(_images([99], b"e" * 4096))
    # Born in generation 0, so snapshot 1 sees the records of snapshot 2 as well.
    assert again.used_size == 4 * 4096


def test_a_deleted_volume_is_forgotten_for_good() -> None:
    device = MemoryDevice(4 * MIB)
    store = LoggedStore.create(device, name="s", number=5)
    other = uuid4()
    store.preserve(_images([1], b"a" * 4096))
    store.preserve(_images([1], b"b" * 4096, volume=other))
    store.forget(VOLUME)
    again = LoggedStore.open(device, name="s")
    assert again.volumes_recovered() == {other}


def test_blocks_of_a_volume_that_is_not_open_are_left_alone() -> None:
    device = MemoryDevice(3 * MIB)
    store = LoggedStore.create(device, name="s", number=5)
    address = int(store.preserve(_images([1], b"a" * 4096))[0])
    store.synchronize()
    again = LoggedStore.open(device, name="s")
    again.adopt(uuid4(), lambda: ())
    count = again.size // 4096
    with pytest.raises(StoreFull):
        again.preserve(_images(list(range(count)), b"x" * 4096 * count, volume=uuid4()))
    again.preserve(_images(list(range(256)), b"x" * 4096 * 256, volume=uuid4()))
    assert read(device, offset_of(address), 4096) == b"a" * 4096


def test_a_full_log_is_rewritten_with_what_is_needed() -> None:
    device = MemoryDevice(4 * MIB)
    store = LoggedStore.create(device, name="s", number=1, log_size=4096)
    live = (1,)
    store.adopt(VOLUME, lambda: live)
    kept = store.preserve(_images([5], b"k" * 4096))
    for to in range(2, 300):
        born = np.full(1, to, dtype=np.uint32)
        images = PreImages(VOLUME, 4 * KIB, np.array([6]), born, to, to + 1, memoryview(bytearray(b"t" * 4096)))
        address = store.preserve(images)
        store.synchronize()
        store.release(address, 4096)
    again = LoggedStore.open(device, name="s")
    records = again.recovered(VOLUME)
    assert records["block"].tolist().count(5) == 1
    assert len(records) < 100
    assert read(device, offset_of(int(kept[0])), 4096) == b"k" * 4096


def test_the_directory_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    directory = StoreDirectory(tmp_path / "stores")
    with pytest.raises(InvalidRequest):
        directory.create("a/b", kind="memory", size=4 * MIB)
    with pytest.raises(InvalidRequest):
        directory.create("a", kind="paper", size=4 * MIB)
    with pytest.raises(InvalidRequest):
        directory.create("tiny", kind="memory", size=4096)
    with pytest.raises(NotFound):
        directory.get("a")
    with pytest.raises(NotFound):
        directory.delete("a")
    two = [tmp_path / "one", tmp_path / "two"]
    directory.create("joined", kind="file", size=8 * MIB, paths=two)
    with pytest.raises(AlreadyExists):
        directory.create("joined", kind="memory", size=4 * MIB)
    with pytest.raises(Refused):
        directory.create("thief", kind="file", paths=[two[0]])
    directory.close()
    again = StoreDirectory(tmp_path / "stores")
    assert [store.name for store in again.list()] == ["joined"]
    assert not again.list()[0].failed
    again.close()


def test_a_device_without_a_store_is_not_taken_for_one(tmp_path: Path) -> None:
    device = FileDevice.create(tmp_path / "empty", 4 * MIB)
    with pytest.raises(DataCorrupt):
        LoggedStore.open(device, name="s")
    device.close()
