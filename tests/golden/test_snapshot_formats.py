"""The snapshot engine's formats, byte for byte: tables in standby/cow/README.md, bytes in tests/golden/cow/.

`python -m tests.golden.test_snapshot_formats` writes the files; only a new format version is a reason to.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from standby.cow import catalog, record_log, shared_header, store_directory
from standby.cow.association import ArrayMap
from standby.cow.birth import BirthMap
from standby.cow.catalog import Event
from standby.cow.record_log import RECORD, Batch, BatchType, Superblock
from standby.cow.shared_header import SharedHeader
from standby.cow.store_directory import StoreDefinition
from standby.cow.values import SnapshotState

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
    (Event.CLOSED, {}),
)
DEFINITION = StoreDefinition(1, "default", "file", str(STORE), 1 << 30, ("/var/lib/stillpoint/stores/default.store",))


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


def _association_map(folder: Path) -> bytes:
    records = ArrayMap.create(folder / "map", generation=4, block_count=10)
    records.put(2, (3 << 48) | 8208, 1)
    records.put(9, 1, 0)
    records.close()
    return (folder / "map").read_bytes()[:64]


def _birth_map(folder: Path) -> bytes:
    births = BirthMap.create(folder / "birth", 4)
    births.array[:] = (0, 1, 2, 0x01020304)
    births.close()
    return (folder / "birth").read_bytes()[:16]


def _stores(folder: Path) -> bytes:
    return store_directory.encode_definitions(2, [DEFINITION])


FORMATS = {
    "superblock.bin": _superblock,
    "batch.bin": _batch,
    "catalog.bin": _catalog,
    "shared_header.bin": _shared_header,
    "association_map.bin": _association_map,
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


def test_a_shared_header_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "header"
    path.write_bytes((FOLDER / "shared_header.bin").read_bytes().ljust(shared_header.FILE_SIZE, b"\0"))
    state = SharedHeader.open(path).read()
    assert state is not None
    assert state.sequence == 2
    assert state.states == {1: SnapshotState.INVALID, 4: SnapshotState.ACTIVE, 5: SnapshotState.CREATING}


def test_the_list_of_stores_is_read_back(tmp_path: Path) -> None:
    assert store_directory.read_definitions(FOLDER / "stores.json") == (2, [DEFINITION])


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file_name, make in FORMATS.items():
        with tempfile.TemporaryDirectory() as scratch:
            (FOLDER / file_name).write_bytes(make(Path(scratch)))
