"""The bytes of a log of hot extents, as primary/README.md describes them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from primary.intent_log import IntentLog
from stillpoint.errors import DataCorrupt
from stillpoint.extents import Extent

MIB = 1 << 20


def record(sequence: int, extents: list[int], version: int = 1) -> bytes:
    head = b"SPINTENT" + struct.pack("<IIQQ", version, len(extents), sequence, 4 * MIB)
    body = struct.pack(f"<{len(extents)}I", *extents)
    return (head + struct.pack("<I", zlib.crc32(head + body)) + bytes(4) + body).ljust(4096, b"\0")


def test_golden_bytes(tmp_path: Path) -> None:
    log = IntentLog(tmp_path / "intent.log")
    assert log.hot is None
    log.append([3, 7, 0x01020304])
    log.append([7])
    log.append([])
    log.close()
    data = (tmp_path / "intent.log").read_bytes()
    assert data[:4096] == record(2, [7])
    assert data[4096:] == record(3, [])


def test_the_newest_whole_record_counts_and_a_torn_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "intent.log"
    newest = record(9, [1, 2])
    path.write_bytes(record(8, [5]) + newest)
    assert IntentLog(path).hot == (1, 2)
    for cut in (1, 31, 41, 44):
        path.write_bytes(record(8, [5]) + newest[:cut] + record(7, [5, 6, 7])[cut:])
        assert IntentLog(path).hot == (5,), cut
    path.write_bytes(bytes(4096) + newest[:20] + bytes(4076))
    log = IntentLog(path)
    assert (log.hot, log.suspects(64 * MIB)) == (None, None)


def test_the_suspects_are_the_named_extents_within_the_volume(tmp_path: Path) -> None:
    path = tmp_path / "intent.log"
    path.write_bytes(record(1, [0, 2, 9]) + bytes(4096))
    assert IntentLog(path).suspects(10 * MIB) == [Extent(0, 4 * MIB), Extent(8 * MIB, 2 * MIB)]


def test_a_log_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "intent.log"
    path.write_bytes(record(1, [0], version=2) + bytes(4096))
    with pytest.raises(DataCorrupt):
        IntentLog(path)
