"""The index of chunks against a plain dict, and its cache's file."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest

from backupnode.repository.blobs import ChunkId
from backupnode.repository.index import ChunkIndex, Location, is_missing, offsets_of, packs_of, sizes_of
from backupnode.repository.marks import Marks
from stillpoint.errors import DataCorrupt

# Few segments, so that they have several ids each.
FIRST_BYTES = bytes([0, 1, 255])


def identity(source: random.Random) -> ChunkId:
    return ChunkId(bytes([source.choice(FIRST_BYTES)]) + source.randbytes(31))


def location(source: random.Random, packs: int) -> Location:
    return Location(source.randrange(packs), source.randrange(1 << 26), 1024 * source.randrange(1, 4097))


def load(data: bytes) -> ChunkIndex:
    return ChunkIndex.load(lambda offset, length: data[offset : offset + length], size=len(data))


def dump(index: ChunkIndex) -> bytes:
    index.merge()
    return b"".join(index.dump())


def check(index: ChunkIndex, model: dict[ChunkId, Location], absent: list[ChunkId]) -> None:
    for chunk, where in model.items():
        assert index.find(chunk) == where
    for chunk in absent:
        assert chunk in model or index.find(chunk) is None
    every = [*model, *absent]
    random.Random(1).shuffle(every)
    found = index.find_all(b"".join(every))
    assert is_missing(found).tolist() == [chunk not in model for chunk in every]
    present = found[~is_missing(found)]
    expected = [model[chunk] for chunk in every if chunk in model]
    assert list(zip(packs_of(present), offsets_of(present), sizes_of(present), strict=True)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_what_a_dict_finds(seed: int) -> None:
    source = random.Random(seed)
    index, model, known = ChunkIndex(), dict[ChunkId, Location](), list[ChunkId]()
    packs = [index.pack_number(f"pack {number}") for number in range(6)]
    for _ in range(400):
        action = source.random()
        if action < 0.8 or not known:
            chunk = source.choice(known) if known and action < 0.1 else identity(source)
            known.append(chunk)
            model[chunk] = location(source, len(packs))
            index.add(chunk, model[chunk])
        elif action < 0.9:
            chunk = source.choice(known)
            index.remove(chunk)
            model.pop(chunk, None)
        elif action < 0.95:
            index.merge()
        elif action < 0.97:
            pack = source.choice(packs)
            kept = {where.offset for where in model.values() if where.pack == pack and source.random() < 0.5}
            lost = index.remove_at(pack, frozenset(kept))
            gone = [each for each, where in model.items() if where.pack == pack and where.offset not in kept]
            assert sorted(lost) == sorted(model.pop(each).offset for each in gone)
        elif action < 0.98:
            chunk = source.choice(known)
            if chunk in model:
                index.remove_places([(index.pack_name(model[chunk].pack), model.pop(chunk).offset), ("unknown", 5)])
        else:
            index = load(dump(index))
    check(index, model, [*known, *(identity(source) for _ in range(50))])
    again = load(dump(index))
    assert len(again) == len(model)
    check(again, model, known)


def test_ids_of_one_key_are_told_apart_by_the_bits_beside_it() -> None:
    index = ChunkIndex()
    number = index.pack_number("pack")
    same = bytes(range(9))
    one, two = ChunkId(same + b"\x01" + bytes(22)), ChunkId(same + b"\x02" + bytes(22))
    for merges in (False, True):
        index.add(one, Location(number, 100, 1024))
        index.add(two, Location(number, 200, 1024))
        if merges:
            index.merge()
        assert index.find(one) == Location(number, 100, 1024)
        assert index.find(two) == Location(number, 200, 1024)
        assert index.find(ChunkId(same + b"\x03" + bytes(22))) is None
    index.remove(one)
    index.merge()
    assert index.find(one) is None and index.find(two) is not None


def test_packs_that_are_gone_leave_no_numbers_in_the_cache() -> None:
    index = ChunkIndex()
    source = random.Random(3)
    chunks = [identity(source) for _ in range(20)]
    for number, chunk in enumerate(chunks):
        index.add(chunk, Location(index.pack_number(f"pack {number}"), number, 1024))
    index.remove_packs(range(15))
    again = load(dump(index))
    assert again.pack_names == {f"pack {number}" for number in range(15, 20)}
    assert [again.pack_number(f"pack {number}") for number in range(15, 20)] == list(range(5))
    assert [found and again.pack_name(found.pack) for found in map(again.find, chunks)][14:17] == [
        None,
        "pack 15",
        "pack 16",
    ]


def test_a_cache_that_changed_anywhere_is_not_loaded() -> None:
    source = random.Random(4)
    index = ChunkIndex()
    for _ in range(500):
        index.add(identity(source), Location(index.pack_number("pack"), source.randrange(1 << 20), 1024))
    data = dump(index)
    for _ in range(200):
        position = source.randrange(len(data))
        damaged = bytearray(data)
        damaged[position] ^= 1 << source.randrange(8)
        with pytest.raises(DataCorrupt):
            load(bytes(damaged))
    for _ in range(50):
        with pytest.raises(DataCorrupt):
            load(data[: source.randrange(len(data))])


def test_marks_count_what_they_were_given_and_nothing_that_came_later() -> None:
    source = random.Random(5)
    index = ChunkIndex()
    packs = [index.pack_number(f"pack {number}") for number in range(3)]
    model = {identity(source): location(source, len(packs)) for _ in range(300)}
    for chunk, where in model.items():
        index.add(chunk, where)
    named, others = source.sample([*model], 100), source.sample([*model], 100)
    marks, rest = Marks(index.snapshot()), Marks(index.snapshot())
    late = identity(source)
    index.add(late, Location(packs[0], 0, 1 << 20))
    index.merge()
    marks.add(b"".join([*named, *named[:10], late, identity(source)]))
    rest.add(b"".join(others))
    by_pack = {pack: sum(model[each].size for each in named if model[each].pack == pack) for pack in packs}
    assert marks.bytes_by_pack() == by_pack
    assert marks.size() == sum(by_pack.values())
    assert marks.size(without=rest) == sum(model[each].size for each in set(named) - set(others))
    assert marks.offsets_in([1]) == {1: {model[each].offset for each in named if model[each].pack == 1}}


def test_lookups_during_a_merge_find_what_was_there() -> None:
    """What was found once is found until it is removed, in whichever thread."""
    source = random.Random(6)
    index = ChunkIndex()
    number = index.pack_number("pack")
    chunks = [identity(source) for _ in range(3000)]
    added: list[ChunkId] = []
    missed: list[ChunkId] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            missed.extend(chunk for chunk in tuple(added) if index.find(chunk) is None)
            if added and is_missing(index.find_all(b"".join(added[:50]))).any():
                missed.append(added[0])

    thread = threading.Thread(target=look)
    thread.start()
    for position, chunk in enumerate(chunks):
        index.add(chunk, Location(number, position, 1024))
        added.append(chunk)
        if position % 20 == 0:
            index.merge()
    done.set()
    thread.join()
    assert not missed
    assert np.count_nonzero(~is_missing(index.find_all(b"".join(chunks)))) == len(chunks)
