"""What every form of association map promises, whatever way it finds a block."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from standby.cow.association import NOT_PRESERVED, PIECE_ENTRIES, Addresses, AssociationMap
from standby.cow.association_forms import FORMS, create_map, open_map
from standby.cow.birth import Blocks, Generations
from standby.cow.hash_map import HashMap
from standby.cow.mapped_file import MappedFile
from standby.cow.ordered_map import OrderedMap
from stillpoint.errors import DataCorrupt

BLOCK_COUNT = 40_000
_FAR = 7
_RECORDS = 20_000

Make = Callable[[int], AssociationMap]


@pytest.fixture(params=FORMS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    made: list[AssociationMap] = []

    def create(block_count: int) -> AssociationMap:
        made.append(create_map(request.param, tmp_path / "4.map", generation=4, block_count=block_count))
        return made[-1]

    yield create
    for one in made:
        one.close()


def _records(blocks: list[int]) -> tuple[Blocks, Addresses, Generations]:
    array = np.array(sorted(blocks), dtype=np.int64)
    return array, _address_of(array), _born_of(array)


def _address_of(blocks: Blocks) -> Addresses:
    return (blocks * 128 + 8208).astype(np.uint64)


def _born_of(blocks: Blocks) -> Generations:
    return (blocks % 4).astype(np.uint32)


def _check(records: AssociationMap, truth: set[int], first: int, count: int) -> None:
    found = records.lookup(first, count)
    there = np.array([block in truth for block in range(first, first + count)])
    if found is None:
        assert not there.any()
        return
    addresses, born = found
    blocks = np.arange(first, first + count)
    assert addresses.dtype == np.uint64
    assert born.dtype == np.uint32
    assert ((addresses != NOT_PRESERVED) == there).all()
    assert (addresses[there] == _address_of(blocks[there])).all()
    assert (born[there] == _born_of(blocks[there])).all()


def test_an_empty_map_has_nothing(make: Make) -> None:
    records = make(BLOCK_COUNT)
    assert records.generation == 4
    assert records.lookup(0, BLOCK_COUNT) is None
    assert list(records.pieces()) == []


def test_every_record_is_found_by_engine_and_reader_alone_and_in_ranges(make: Make, tmp_path: Path) -> None:
    choose = random.Random(3)
    records = make(BLOCK_COUNT)
    reader = open_map(tmp_path / "4.map")
    truth: set[int] = set()
    while len(truth) < _RECORDS:
        size = choose.choice((1, 1, 3, 300, 3000))
        batch = [block for block in choose.sample(range(BLOCK_COUNT), size) if block not in truth]
        records.put_many(*_records(batch))
        truth.update(batch)
        for looking in (records, reader):
            _check(looking, truth, choose.randrange(BLOCK_COUNT), 1)
            first = choose.randrange(BLOCK_COUNT - 1)
            _check(looking, truth, first, choose.randrange(1, min(2000, BLOCK_COUNT - first)))
    _check(reader, truth, 0, BLOCK_COUNT)
    late = open_map(tmp_path / "4.map")
    _check(late, truth, 0, BLOCK_COUNT)
    late.close()
    reader.close()


def test_pieces_are_all_records_ascending_and_of_bounded_size(make: Make) -> None:
    choose = random.Random(4)
    records = make(BLOCK_COUNT)
    every = choose.sample(range(BLOCK_COUNT), _RECORDS)
    for start in range(0, _RECORDS, 900):
        records.put_many(*_records(every[start : start + 900]))
    pieces = list(records.pieces())
    assert max(len(blocks) for blocks, _, _ in pieces) <= PIECE_ENTRIES
    assert np.concatenate([blocks for blocks, _, _ in pieces]).tolist() == sorted(every)
    for blocks, addresses, born in pieces:
        assert (addresses == _address_of(blocks)).all()
        assert (born == _born_of(blocks)).all()


def test_a_record_for_every_block_fits_whatever_their_number(make: Make) -> None:
    for block_count in (1, 3, 1024, 1025, 9000):
        records = make(block_count)
        records.put_many(*_records([block_count - 1]))
        records.put_many(*_records(list(range(block_count - 1))))
        _check(records, set(range(block_count)), 0, block_count)
        records.close()


def test_a_put_that_rearranges_much_is_announced_as_slow(make: Make) -> None:
    records = make(BLOCK_COUNT)
    assert records.is_quick(1)
    assert not records.is_quick(PIECE_ENTRIES + 1)
    slow = 0
    for block in range(0, BLOCK_COUNT, 200):
        slow += not records.is_quick(200)
        records.put_many(*_records(list(range(block, block + 200))))
    rearranges = type(records) in (HashMap, OrderedMap)
    assert (slow > 0) == rearranges
    assert slow < BLOCK_COUNT // 200 // 10


def test_blocks_of_a_huge_volume_are_told_apart(make: Make) -> None:
    records = make(1 << 30)
    blocks = [0, 1, (1 << 30) - 1, 1 << 29, 123_456_789]
    records.put_many(*_records(blocks))
    for block in blocks:
        _check(records, set(blocks), max(0, block - 1), 2 if block else 1)


def test_a_full_disk_puts_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    records = make(BLOCK_COUNT)
    records.put_many(*_records([1, 2, 3]))

    def full(self: MappedFile, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rest = list(range(10, BLOCK_COUNT))
    with monkeypatch.context() as patch:
        patch.setattr(MappedFile, "reserve", full)
        with pytest.raises(OSError, match="No space"):
            records.put_many(*_records(rest))
    _check(records, {1, 2, 3}, 0, BLOCK_COUNT)
    records.put_many(*_records(rest))
    _check(records, {1, 2, 3, *rest}, 0, BLOCK_COUNT)


def test_what_was_put_before_a_lookup_is_found_by_another_process_while_more_is_put(make: Make, tmp_path: Path) -> None:
    """The other process follows a counter in a file: records up to it have been put."""
    records = make(BLOCK_COUNT)
    order = [block * _FAR % BLOCK_COUNT for block in range(BLOCK_COUNT)]
    counter = MappedFile.create(tmp_path / "counter", 4096)
    counter.reserve(0, 4096)
    word = counter.view[:8].cast("Q")
    code = (
        "import sys; from pathlib import Path; from tests.conformance.test_association_maps import follow;"
        f"sys.exit(follow(Path({str(tmp_path)!r})))"
    )
    root = Path(__file__).resolve().parents[2]
    reader = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    assert reader.stdout.readline() == "looking\n"
    position = 0
    choose = random.Random(5)
    while position < len(order):
        size = choose.choice((1, 2, 40, 400))
        records.put_many(*_records(order[position : position + size]))
        position = min(position + size, len(order))
        word[0] = position
    output, _ = reader.communicate(timeout=60)
    assert reader.returncode == 0, output
    word.release()
    counter.close()


def follow(folder: Path) -> int:
    """In a process of its own: look while records are put. 0: everything that had to be there was, and was right."""
    counter = MappedFile.open(folder / "counter", writable=False).view[:8].cast("Q")
    records = open_map(folder / "4.map")
    inverse = pow(_FAR, -1, BLOCK_COUNT)
    choose = random.Random(6)
    print("looking", flush=True)
    while True:
        count = choose.choice((1, 1, 50, 4000))
        first = choose.randrange(BLOCK_COUNT - count)
        put = counter[0]
        found = records.lookup(first, count)
        blocks = np.arange(first, first + count)
        position = blocks * inverse % BLOCK_COUNT
        addresses, born = found if found is not None else (np.zeros(count, np.uint64), np.zeros(count, np.uint32))
        there = addresses != NOT_PRESERVED
        if not there[position < put].all():
            print(f"of {put} records those of {blocks[(position < put) & ~there]} are missing")
            return 1
        if (addresses[there] != _address_of(blocks[there])).any() or (born[there] != _born_of(blocks[there])).any():
            print(f"records in {first}+{count} are wrong")
            return 1
        if put == BLOCK_COUNT:
            return 0


def test_a_file_of_another_kind_is_refused(make: Make, tmp_path: Path) -> None:
    make(BLOCK_COUNT).put_many(*_records([1]))
    path = tmp_path / "4.map"
    for position in (0, 9, 13, 17):
        data = bytearray(path.read_bytes()[:64])
        data[position] ^= 1
        damaged = tmp_path / "damaged.map"
        damaged.write_bytes(bytes(data).ljust(path.stat().st_size if path.stat().st_size < 1 << 24 else 4096, b"\0"))
        with pytest.raises(DataCorrupt):
            open_map(damaged)
