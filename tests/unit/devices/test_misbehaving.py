"""The devices that tests use to stage faults and crashes do what they say."""

from __future__ import annotations

import errno
import random

import pytest

from stillpoint.devices import MemoryDevice
from stillpoint.errors import DeviceError
from tests.support.devices import SECTOR_SIZE, Fault, FaultyDevice, RecordingDevice

SIZE = 64 * 1024


def test_the_named_write_fails_and_changes_nothing() -> None:
    device = FaultyDevice(MemoryDevice(SIZE))
    device.writes = Fault(errno.ENOSPC, first=2, last=2)
    device.write(0, [b"one"])
    with pytest.raises(DeviceError) as raised:
        device.write(0, [b"two"])
    assert raised.value.errno == errno.ENOSPC
    device.write(10, [b"three"])
    buffer = bytearray(15)
    device.read_into(0, memoryview(buffer))
    assert buffer == b"one" + bytes(7) + b"three"
    device.close()


def test_a_failed_flush_of_the_faulty_device_stays_failed() -> None:
    device = FaultyDevice(MemoryDevice(SIZE))
    device.flushes = Fault(errno.EIO, first=2, last=2)
    device.flush()
    for _ in range(3):
        with pytest.raises(DeviceError):
            device.flush()
    device.close()


def test_a_crash_keeps_all_that_was_flushed_and_tears_the_rest_at_sectors() -> None:
    device = RecordingDevice(MemoryDevice(SIZE))
    device.write(0, [b"A" * SIZE])
    device.flush()
    device.write(1000, [b"B" * 4096])
    assert device.pending_count() == 1
    images = list(device.crash_images(random.Random(5), 50))
    assert images[0] == b"A" * SIZE
    assert images[1] == b"A" * 1000 + b"B" * 4096 + b"A" * (SIZE - 5096)
    assert len(set(images)) > 10
    for image in images:
        for start in range(0, SIZE, SECTOR_SIZE):
            sector = set(image[max(start, 1000) : min(start + SECTOR_SIZE, 5096)])
            assert len(sector) <= 1, "a sector is written whole or not at all"
    device.flush()
    assert device.pending_count() == 0
    device.close()
