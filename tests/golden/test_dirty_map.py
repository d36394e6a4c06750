"""The bytes of a dirty map, as primary/README.md describes them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from primary.dirty_map import CHUNK_SIZE, DirtyMap

BOOT = "01234567-89ab-cdef-0123-456789abcdef"


def test_golden_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("primary.dirty_map.boot_id", lambda: BOOT)
    dirty = DirtyMap(tmp_path / "dirty.map", 5 * CHUNK_SIZE - 1, create=True)
    dirty.mark(CHUNK_SIZE, 1)
    dirty.connect()
    dirty.mark(3 * CHUNK_SIZE, CHUNK_SIZE)
    data = (tmp_path / "dirty.map").read_bytes()
    head = b"SPDIRTY1" + struct.pack("<IIQQ", 1, 0, 65536, 5) + BOOT.encode()
    assert data[:68] == head
    assert data[68:72] == struct.pack("<I", zlib.crc32(head))
    assert not any(data[72:4096])
    assert data[4096:].hex() == "00ff000100"
    dirty.close(clean=True)
    closed = (tmp_path / "dirty.map").read_bytes()
    assert closed[:16] == b"SPDIRTY1" + struct.pack("<II", 1, 1)
    assert closed[4096:].hex() == "00ff00ff00"
