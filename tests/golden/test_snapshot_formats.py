"""The snapshot engine's formats, byte for byte: tables in standby/cow/README.md, bytes in tests/golden/cow/.

`python -m tests.golden.test_snapshot_formats` writes the files; only a new format version is a reason to.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from standby.cow import catalog, record_log, shared_header, store_directory
from standby.cow.association import AssociationMap
from standby.cow.association_forms import create_map, open_map
from standby.cow.birth import BirthMap
from standby.cow.catalog import Event
from standby.cow.record_log import RECORD, Batch, BatchType, Superblock
from standby.cow.shared_header import SharedHeader
from standby.cow.store_directory import StoreDefinition
from standby.cow.values import SnapshotState
from tests.support.listing import from_listing, listing

FOLDER = Path(__file__).parent / "cow"
VOLUME = UUID("00112233-4455-6677-8899-aabbccddeeff")
STORE = UUID("0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0")

SUPERBLOCK = Superblock(
    uuid=STORE,
    sequence=7,
    device_size=64 << 20,
    data_offset=4202496,
    log_size=2 << 20,
    active_half=1,
    first_batch=42,
    number=3,
)
RECORDS = np.array(
    [(5, 8208, 3, 1, 4, 5, 0xDEADBEEF, 0), (1 << 33, 1, 1000, 0, 4, 5, 0, 0)],
    dtype=RECORD,
)
BATCH = Batch(BatchType.PRESERVE, 42, 41, VOLUME, 4096, RECORDS)
EVENTS: tuple[tuple[Event, dict[str, Any]], ...] = (
    (Event.VOLUME, {"name": "vol1", "incarnation": str(VOLUME), "block_size": 65536, "size": 1 << 30}),
    (Event.OPENED, {"boot": "b0"}),
    (
        Event.SNAPSHOT_CREATED,
        {
            "generation": 1,
            "name": "monday",
            "uuid": str(VOLUME),
            "store": str(STORE),
            "durable": True,
            "created_ns": 1234567890,
            "size": 1 << 30,
        },
    ),
    (Event.SNAPSHOT_INVALID, {"generation": 1, "reason": "store default: full"}),
    (Event.LIMITS, {"expires": True, "count_max": 7}),
    (Event.CLOSED, {}),
)
DEFINITION = StoreDefinition(
    1, "default", "file", str(STORE), 1 << 30, ("/var/lib/stillpoint/stores/default.store",), "hash"
)


def _superblock(folder: Path) -> bytes:
    return record_log.encode_superblock(SUPERBLOCK)


def _batch(folder: Path) -> bytes:
    return record_log.encode_batch(BATCH, superblock_sequence=7)


def _catalog(folder: Path) -> bytes:
    return b"".join(catalog.encode_record(event, fields, sequence=i) for i, (event, fields) in enumerate(EVENTS))


def _shared_header(folder: Path) -> bytes:
    header = SharedHeader.create(folder / "header", uuid=VOLUME, block_size=65536, size=1 << 30)
    header.publish([(1, SnapshotState.INVALID), (4, SnapshotState.ACTIVE), (5, SnapshotState.CREATING)])
    header.close()
    return (folder / "header").read_bytes()[:128]


def _association_map(form: str, folder: Path) -> bytes:
    records: AssociationMap = create_map(form, folder / "map", generation=4, block_count=10)
    for block, address, born in ((9, 1, 0), (2, (3 << 48) | 8208, 1)):
        records.put_many(np.array([block]), np.array([address], dtype=np.uint64), np.array([born], dtype=np.uint32))
    records.close()
    data = (folder / "map").read_bytes()
    return data[:64] if form == "array" else listing(data)


def _birth_map(folder: Path) -> bytes:
    births = BirthMap.create(folder / "birth", 4)
    births.array[:] = (0, 1, 2, 0x01020304)
    births.close()
    return (folder / "birth").read_bytes()[:16]


def _stores(folder: Path) -> bytes:
    return store_directory.encode_definitions(2, [DEFINITION])


FORMATS: dict[str, Callable[[Path], bytes]] = {
    "superblock.bin": _superblock,
    "batch.bin": _batch,
    "catalog.bin": _catalog,
    "shared_header.bin": _shared_header,
    "association_map.bin": functools.partial(_association_map, "array"),
    "hash_map.txt": functools.partial(_association_map, "hash"),
    "ordered_map.txt": functools.partial(_association_map, "ordered"),
    "unordered_map.txt": functools.partial(_association_map, "unordered"),
    "birth_map.bin": _birth_map,
    "stores.json": _stores,
}


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_the_golden_file(name: str, tmp_path: Path) -> None:
    assert FORMATS[name](tmp_path) == (FOLDER / name).read_bytes()


def test_a_superblock_is_read_back_and_any_damage_is_seen() -> None:
    data = (FOLDER / "superblock.bin").read_bytes()
    assert record_log.decode_superblock(data) == SUPERBLOCK
    for position in (0, 9, 13, 20, 80, 4095):
        damaged = bytearray(data)
        damaged[position] ^= 1
        assert record_log.decode_superblock(bytes(damaged)) is None


def test_a_batch_is_read_back_and_any_damage_or_cut_is_seen() -> None:
    data = (FOLDER / "batch.bin").read_bytes()
    batch = record_log.decode_batch(data + b"more", sequence=42, superblock_sequence=7)
    assert batch is not None
    assert (batch.sequence, batch.durable, batch.volume, batch.block_size) == (42, 41, VOLUME, 4096)
    assert batch.records.tolist() == RECORDS.tolist()
    assert record_log.decode_batch(data, sequence=43, superblock_sequence=7) is None
    assert record_log.decode_batch(data, sequence=42, superblock_sequence=6) is None
    for length in range(len(data)):
        assert record_log.decode_batch(data[:length], sequence=42, superblock_sequence=7) is None
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x40
        assert record_log.decode_batch(bytes(damaged), sequence=42, superblock_sequence=7) is None


def test_a_catalog_is_read_back_up_to_the_damage() -> None:
    data = (FOLDER / "catalog.bin").read_bytes()
    assert [(event, fields) for _, event, fields in catalog.read_records(data)] == list(EVENTS)
    ends = [end for end, _, _ in catalog.read_records(data)]
    for length in range(len(data)):
        assert len(list(catalog.read_records(data[:length]))) == sum(end <= length for end in ends)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        assert len(list(catalog.read_records(bytes(damaged)))) == sum(end <= position for end in ends)


def test_a_catalog_of_version_1_is_read_and_goes_on_in_version_2(tmp_path: Path) -> None:
    path = tmp_path / "catalog.log"
    path.write_bytes((FOLDER / "catalog-1.bin").read_bytes())
    for limits in ({}, {"count_max": 7}):
        found = catalog.Catalog.open(path)
        assert found.state.limits == limits
        found.append(Event.LIMITS, count_max=7)
        found.close()
    before = [each for each in EVENTS if each[0] is not Event.LIMITS]
    records = [(event, fields) for _, event, fields in catalog.read_records(path.read_bytes())]
    assert records == [*before, *2 * [(Event.LIMITS, {"count_max": 7})]]


def test_a_shared_header_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "header"
    path.write_bytes((FOLDER / "shared_header.bin").read_bytes().ljust(shared_header.FILE_SIZE, b"\0"))
    state = SharedHeader.open(path).read()
    assert state is not None
    assert state.sequence == 2
    assert state.states == {1: SnapshotState.INVALID, 4: SnapshotState.ACTIVE, 5: SnapshotState.CREATING}


def test_the_list_of_stores_is_read_back_and_that_of_version_1_too(tmp_path: Path) -> None:
    assert store_directory.read_definitions(FOLDER / "stores.json") == (2, [DEFINITION])
    before = replace(DEFINITION, map="array")
    assert store_directory.read_definitions(FOLDER / "stores-1.json") == (2, [before])


@pytest.mark.parametrize("form", ["hash", "ordered", "unordered"])
def test_association_maps_are_read_back(form: str, tmp_path: Path) -> None:
    path = tmp_path / "map"
    path.write_bytes(from_listing((FOLDER / f"{form}_map.txt").read_bytes()))
    records = open_map(path)
    found = records.lookup(0, 10)
    records.close()
    assert found is not None
    addresses, born = found
    assert addresses.tolist() == [0, 0, (3 << 48) | 8208, 0, 0, 0, 0, 0, 0, 1]
    assert born[[2, 9]].tolist() == [1, 0]


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file_name, make in FORMATS.items():
        with tempfile.TemporaryDirectory() as scratch:
            (FOLDER / file_name).write_bytes(make(Path(scratch)))
