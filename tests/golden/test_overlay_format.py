"""The overlay of a writable virtual device, byte for byte: table in standby/cow/README.md, bytes in overlay.txt.

`python -m tests.golden.test_overlay_format` writes the file; only a new format version is a reason to.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from stillpoint.devices import MemoryDevice, OverlayDevice
from stillpoint.devices.overlay import storage_size
from stillpoint.errors import DataCorrupt
from tests.support.listing import from_listing, listing

FILE = Path(__file__).parent / "overlay.txt"
BASE = "00112233-4455-6677-8899-aabbccddeeff"
BLOCK = 512
SIZE = 5000 * BLOCK  # the map takes two pages


def open_overlay(storage: MemoryDevice, *, base_uuid: str = BASE, block_size: int = BLOCK) -> OverlayDevice:
    base = MemoryDevice(SIZE)
    base.write(0, [b"b" * SIZE])
    return OverlayDevice(base, storage, base_uuid=base_uuid, block_size=block_size)


def written() -> MemoryDevice:
    """Blocks 1 and 2 in part, block 4999 as zeroes, flushed; then block 7, not flushed."""
    storage = MemoryDevice(storage_size(SIZE, BLOCK))
    device = open_overlay(storage)
    device.write(2 * BLOCK - 16, [b"o" * 32])
    device.write_zeroes(4999 * BLOCK, BLOCK)
    device.flush()
    device.write(7 * BLOCK, [b"u" * BLOCK])
    return storage


def content(device: MemoryDevice | OverlayDevice) -> bytes:
    data = bytearray(device.size)
    device.read_into(0, memoryview(data))
    return bytes(data)


def test_bytes_are_those_of_the_golden_file() -> None:
    assert listing(content(written())) == FILE.read_bytes()


def test_an_overlay_is_read_back_without_what_was_not_flushed() -> None:
    storage = MemoryDevice(storage_size(SIZE, BLOCK))
    storage.write(0, [from_listing(FILE.read_bytes())])
    blocks = bytearray(b"b" * SIZE)
    blocks[2 * BLOCK - 16 : 2 * BLOCK + 16] = b"o" * 32
    blocks[4999 * BLOCK :] = bytes(BLOCK)
    assert content(open_overlay(storage)) == blocks


@pytest.mark.parametrize("position", [0, 8, 12, 16, 24, 59, 60])
def test_any_damage_to_the_header_is_seen(position: int) -> None:
    data = bytearray(from_listing(FILE.read_bytes()))
    data[position] ^= 1
    storage = MemoryDevice(len(data))
    storage.write(0, [data])
    with pytest.raises(DataCorrupt):
        open_overlay(storage)


if __name__ == "__main__":
    FILE.write_bytes(listing(content(written())))
