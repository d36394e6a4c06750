"""What every kind of block device promises, run on every kind."""

from __future__ import annotations

import random
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stillpoint.devices import (
    BlockDevice,
    Buffer,
    ConcatDevice,
    FileDevice,
    MemoryDevice,
    OverlayDevice,
    WindowDevice,
    open_device,
)
from stillpoint.devices.overlay import storage_size
from stillpoint.errors import OutOfRange, PermissionRefused, Refused
from tests.support.devices import FaultyDevice, RecordingDevice
from tests.support.requirements import requires_loop_devices

SIZE = 4 << 20
KIB = 1024


def _concat(folder: Path) -> BlockDevice:
    sizes = (1 << 20, (1 << 20) + 512, SIZE - (2 << 20) - 512)
    return ConcatDevice([FileDevice.create(folder / f"part{index}", size) for index, size in enumerate(sizes)])


def _window(folder: Path) -> BlockDevice:
    around = FileDevice.create(folder / "around", SIZE + (1 << 20))
    around.write(0, [b"\xee" * around.size])
    around.write_zeroes(4096, SIZE)
    return WindowDevice(around, start=4096, length=SIZE)


def _overlay(folder: Path) -> BlockDevice:
    block_size = 64 * KIB
    storage = FileDevice.create(folder / "overlay", storage_size(SIZE, block_size))
    return OverlayDevice(MemoryDevice(SIZE), storage, base_uuid="base", block_size=block_size)


KINDS: dict[str, Callable[[Path], BlockDevice]] = {
    "file": lambda folder: FileDevice.create(folder / "disk", SIZE),
    "memory": lambda folder: MemoryDevice(SIZE),
    "concatenation": _concat,
    "concatenation of memory": lambda folder: ConcatDevice([MemoryDevice(SIZE // 2), MemoryDevice(SIZE // 2)]),
    "window": _window,
    "overlay": _overlay,
    "opened by paths": lambda folder: open_device([folder / "a", folder / "b"], size=SIZE, create=True),
    "faulty": lambda folder: FaultyDevice(FileDevice.create(folder / "disk", SIZE)),
    "recording": lambda folder: RecordingDevice(MemoryDevice(SIZE)),
}


@pytest.fixture(
    params=[
        *KINDS,
        "file on tmpfs",
        pytest.param("loop device", marks=requires_loop_devices),
        pytest.param("concatenation with a loop device", marks=requires_loop_devices),
    ]
)
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlockDevice]:
    if request.param == "file on tmpfs":
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield from _opened(KINDS["file"](Path(folder)))
    elif request.param == "loop device":
        with loop_device(tmp_path, SIZE) as path:
            yield from _opened(FileDevice(path))
    elif request.param == "concatenation with a loop device":
        with loop_device(tmp_path, SIZE // 2) as path:
            yield from _opened(ConcatDevice([FileDevice(path), FileDevice.create(tmp_path / "rest", SIZE // 2)]))
    else:
        yield from _opened(KINDS[request.param](tmp_path))


def _opened(device: BlockDevice) -> Iterator[BlockDevice]:
    try:
        yield device
    finally:
        device.close()


class loop_device:
    """A loop device of `size` bytes for the length of a `with`."""

    def __init__(self, folder: Path, size: int) -> None:
        self._image = folder / "loop.img"
        with self._image.open("wb") as image:
            image.truncate(size)

    def __enter__(self) -> Path:
        command = ["losetup", "--find", "--show", str(self._image)]
        self._path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        return Path(self._path)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["losetup", "--detach", self._path], check=True)


def read(device: BlockDevice, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    device.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def pattern(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def test_a_new_device_reads_as_zeroes(device: BlockDevice) -> None:
    assert device.size == SIZE
    assert read(device, 0, SIZE) == bytes(SIZE)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (0, SIZE), (SIZE - 1, 1), (511, 2), (4095, 4098), ((1 << 20) - 1, 600), ((1 << 20) - 3, 1 << 20)],
)
def test_what_was_written_is_read_and_its_surroundings_stay(device: BlockDevice, offset: int, length: int) -> None:
    before = pattern(SIZE)
    device.write(0, [before])
    data = pattern(length, seed=2)
    device.write(offset, [data])
    assert read(device, 0, SIZE) == before[:offset] + data + before[offset + length :]


def test_a_vector_of_buffers_is_written_end_to_end(device: BlockDevice) -> None:
    data = pattern(70_000)
    buffers: list[Buffer] = [data[:1], b"", bytearray(data[1:5000]), memoryview(data)[5000:]]
    device.write((1 << 20) - 6000, buffers)
    assert read(device, (1 << 20) - 6000, len(data)) == data


def test_a_vector_longer_than_the_system_takes_is_written_whole(device: BlockDevice) -> None:
    data = pattern(3000 * 512)
    device.write(512, [data[start : start + 512] for start in range(0, len(data), 512)])
    assert read(device, 512, len(data)) == data


def test_a_try_to_read_is_right_or_says_no(device: BlockDevice) -> None:
    data = pattern(256 * KIB)
    device.write((1 << 20) - 100, [data])
    for offset, length in [(0, 4096), ((1 << 20) - 100, len(data)), (SIZE - 1, 1), (SIZE, 0)]:
        buffer = bytearray(length)
        if device.try_read_into(offset, memoryview(buffer)):
            assert bytes(buffer) == read(device, offset, length)


@pytest.mark.parametrize("way", ["trim", "write zeroes", "write zeroes and keep the space"])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, SIZE), (0, 0), (SIZE, 0), (1, 1), (100, 300), (4096, 8192), (5000, 100_000), ((1 << 20) - 700, 5000)],
)
def test_cleared_bytes_read_as_zeroes_and_others_stay(device: BlockDevice, way: str, offset: int, length: int) -> None:
    before = pattern(SIZE)
    device.write(0, [before])
    if way == "trim":
        device.trim(offset, length)
    else:
        device.write_zeroes(offset, length, may_trim=way == "write zeroes")
    assert read(device, 0, SIZE) == before[:offset] + bytes(length) + before[offset + length :]


@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (SIZE - 1, 2), (-1, 1), (2**64 - 1, 1), (2**63 - 1, 4096)])
def test_a_range_outside_is_refused_and_changes_nothing(device: BlockDevice, offset: int, length: int) -> None:
    with pytest.raises(OutOfRange):
        device.read_into(offset, memoryview(bytearray(length)))
    with pytest.raises(OutOfRange):
        device.try_read_into(offset, memoryview(bytearray(length)))
    with pytest.raises(OutOfRange):
        device.write(offset, [b"x" * length])
    with pytest.raises(OutOfRange):
        device.trim(offset, length)
    with pytest.raises(OutOfRange):
        device.write_zeroes(offset, length)
    with pytest.raises(OutOfRange):
        list(device.extents(offset, length))
    assert device.size == SIZE
    assert read(device, 0, SIZE) == bytes(SIZE)


def test_empty_requests_do_nothing(device: BlockDevice) -> None:
    device.write(0, [])
    device.write(SIZE, [b""])
    device.trim(SIZE, 0)
    device.write_zeroes(0, 0)
    device.read_into(SIZE, memoryview(bytearray()))
    assert list(device.extents(10, 0)) == []
    assert read(device, 0, SIZE) == bytes(SIZE)


def test_extents_cover_the_range_in_order_and_holes_are_zeroes(device: BlockDevice) -> None:
    device.write(0, [pattern(64 * KIB)])
    device.write((1 << 20) - 4096, [pattern(8192)])
    device.write(2 << 20, [pattern(1 << 20)])
    device.trim((2 << 20) + 256 * KIB, 256 * KIB)
    device.flush()
    contents = read(device, 0, SIZE)
    for offset, length in [(0, SIZE), (100, SIZE - 100), (1 << 20, 12345), (SIZE - 1, 1)]:
        position = offset
        for extent in device.extents(offset, length):
            assert extent.offset == position
            assert extent.length > 0
            position = extent.end
            if extent.hole:
                assert contents[extent.offset : extent.end] == bytes(extent.length)
        assert position == offset + length


def test_a_flush_succeeds_and_may_run_in_threads(device: BlockDevice) -> None:
    device.write(0, [pattern(1 << 20)])
    threads = [threading.Thread(target=device.flush) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    device.flush()
    assert read(device, 0, 1 << 20) == pattern(1 << 20)


def test_growing_adds_zeroes_or_is_refused(device: BlockDevice) -> None:
    device.write(0, [pattern(SIZE)])
    with pytest.raises(Refused):
        device.resize(SIZE - 1)
    try:
        device.resize(SIZE + 65536)
    except Refused:
        assert device.size == SIZE
        return
    assert device.size == SIZE + 65536
    assert read(device, 0, device.size) == pattern(SIZE) + bytes(65536)
    device.write(device.size - 1, [b"!"])


def test_closing_twice_is_harmless(device: BlockDevice) -> None:
    device.close()
    device.close()


def test_random_operations_agree_with_an_array_of_bytes(device: BlockDevice) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    model = bytearray(SIZE)
    for _ in range(150):
        length = choose.choice([1, 17, 512, 4096, 65536, choose.randrange(200_000)])
        offset = choose.randrange(SIZE - length)
        match choose.randrange(5):
            case 0 | 1:
                data = choose.randbytes(length)
                cut = choose.randrange(length + 1)
                device.write(offset, [data[:cut], data[cut:]])
                model[offset : offset + length] = data
            case 2:
                device.trim(offset, length)
                model[offset : offset + length] = bytes(length)
            case 3:
                device.write_zeroes(offset, length, may_trim=choose.random() < 0.5)
                model[offset : offset + length] = bytes(length)
            case _:
                assert read(device, offset, length) == model[offset : offset + length]
    assert read(device, 0, SIZE) == model


def test_read_only_devices_refuse_every_change(tmp_path: Path) -> None:
    FileDevice.create(tmp_path / "disk", SIZE).close()
    device = FileDevice(tmp_path / "disk", read_only=True)
    with pytest.raises(PermissionRefused):
        device.write(0, [b"x"])
    with pytest.raises(PermissionRefused):
        device.trim(0, 1)
    with pytest.raises(PermissionRefused):
        device.write_zeroes(0, 1)
    with pytest.raises(PermissionRefused):
        device.resize(SIZE * 2)
    device.flush()
    assert read(device, 0, SIZE) == bytes(SIZE)
    device.close()
