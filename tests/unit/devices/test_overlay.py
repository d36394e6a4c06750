"""What a crash leaves of a writable device over another: every sector as it was flushed, or as it was written since."""

from __future__ import annotations

import random

import pytest

from stillpoint.devices import MemoryDevice, OverlayDevice
from stillpoint.devices.overlay import storage_size
from stillpoint.errors import DataCorrupt, SnapshotInvalid
from tests.support.devices import RecordingDevice

SECTOR = 512
BLOCK = 4 * SECTOR
SIZE = 16 * BLOCK


def over(content: bytes, storage: MemoryDevice | RecordingDevice, *, base_uuid: str = "base") -> OverlayDevice:
    base = MemoryDevice(len(content))
    base.write(0, [content])
    return OverlayDevice(base, storage, base_uuid=base_uuid, block_size=BLOCK)


def memory(content: bytes) -> MemoryDevice:
    device = MemoryDevice(len(content))
    device.write(0, [content])
    return device


def read(device: OverlayDevice) -> bytes:
    content = bytearray(device.size)
    device.read_into(0, memoryview(content))
    return bytes(content)


def sectors(content: bytes | bytearray) -> list[bytes]:
    return [bytes(content[at : at + SECTOR]) for at in range(0, len(content), SECTOR)]


@pytest.mark.parametrize("seed", range(40))
def test_every_crash_leaves_flushed_content_or_something_newer(seed: int) -> None:
    choose = random.Random(seed)
    base = choose.randbytes(SIZE)
    recording = RecordingDevice(MemoryDevice(storage_size(SIZE, BLOCK)))
    device = over(base, recording)
    truth = bytearray(base)
    allowed = [{sector} for sector in sectors(truth)]  # since the last flush
    for _ in range(60):
        # Whole sectors: a recording of parts of one knows states that no disk leaves.
        offset = choose.randrange(SIZE // SECTOR) * SECTOR
        length = min(SIZE - offset, choose.choice((SECTOR, 3 * SECTOR, BLOCK, 3 * BLOCK)))
        action = choose.random()
        if action < 0.6:
            data = choose.randbytes(length)
            device.write(offset, [data])
            truth[offset : offset + length] = data
        elif action < 0.75:
            device.write_zeroes(offset, length, may_trim=choose.random() < 0.5)
            truth[offset : offset + length] = bytes(length)
        else:
            device.flush()
            allowed = [{sector} for sector in sectors(truth)]
        for choice, sector in zip(allowed, sectors(truth), strict=True):
            choice.add(sector)
        assert read(device) == truth
        for image in recording.crash_images(choose, 3):
            again = over(base, memory(image))
            for number, sector in enumerate(sectors(read(again))):
                assert sector in allowed[number], f"seed {seed}, sector {number}"
            again.close()
    device.close()


def test_an_overlay_is_opened_over_its_own_base_only() -> None:
    storage = memory(bytes(storage_size(SIZE, BLOCK)))
    over(bytes(SIZE), storage)
    content = bytearray(storage.size)
    storage.read_into(0, memoryview(content))
    with pytest.raises(DataCorrupt):
        over(bytes(SIZE), memory(bytes(content)), base_uuid="another")


def test_once_its_base_is_lost_an_overlay_neither_reads_nor_takes_anything() -> None:
    is_lost = False

    def check() -> None:
        if is_lost:
            raise SnapshotInvalid("the base is lost")

    storage = MemoryDevice(storage_size(SIZE, BLOCK))
    device = OverlayDevice(MemoryDevice(SIZE), storage, base_uuid="base", block_size=BLOCK, check_base=check)
    device.write(0, [b"x" * BLOCK])
    device.flush()
    before = read(device)
    is_lost = True
    buffer = memoryview(bytearray(BLOCK))
    for attempt in (
        lambda: device.read_into(0, buffer),
        lambda: device.try_read_into(0, buffer),
        lambda: device.write(0, [b"y" * BLOCK]),
        lambda: device.write_zeroes(0, BLOCK),
        lambda: device.trim(0, BLOCK),
        lambda: list(device.extents(0, BLOCK)),
        device.flush,
    ):
        with pytest.raises(SnapshotInvalid):
            attempt()
    is_lost = False
    assert read(device) == before
