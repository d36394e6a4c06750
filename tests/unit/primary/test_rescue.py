"""A disk that cannot be read: a standby that has the range answers for it, and the range is written here again."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from primary.dirty_map import CHUNK_SIZE, DirtyMap
from primary.mirrored_device import AckMode, MirroredDevice
from stillpoint.devices import MemoryDevice
from stillpoint.errors import DeviceError
from stillpoint.extents import Extent
from tests.support.devices import Fault, FaultyDevice
from tests.support.mirror_link import MirrorLink

SIZE = 64 * CHUNK_SIZE


class Disk:
    """A volume in sync with one standby, whose disk fails reads from now on."""

    def __init__(self, folder: Path, executor: ThreadPoolExecutor) -> None:
        self.beneath = MemoryDevice(SIZE)
        self.beneath.write(0, [b"p" * SIZE])
        self.device = FaultyDevice(self.beneath)
        self.map = DirtyMap(folder / "dirty.map", SIZE, create=True)
        self.volume = MirroredDevice("vol", self.device, [self.map], executor, mode=AckMode.SYNC)
        self.link = MirrorLink(SIZE, image=bytearray(b"p" * SIZE))
        self.link.lost = lambda error: self.volume.detach(self.link.sender, error)
        self.volume.attach(self.link.sender, self.map, lambda error: None)
        self.volume.require(self.link.sender, self.link.sender.resync_end())
        self.link.sender.push()
        self.beneath.write(0, [bytes(SIZE)])  # what a repair has to bring back
        self.device.reads = Fault(errno.EIO)
        self.answers: dict[int, int] = {}

    def reply(self, cookie: int, number: int) -> None:
        self.answers[cookie] = number

    def write(self, offset: int, data: bytes) -> None:
        self.volume.write(offset, memoryview(data), False, False, self, 1)
        self.volume.end_batch()

    async def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        assert not self.volume.try_read_into(offset, memoryview(buffer))
        await asyncio.to_thread(self.volume.read_into, offset, memoryview(buffer))
        return bytes(buffer)

    def here(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.beneath.read_into(offset, memoryview(buffer))
        return bytes(buffer)


def on_a_disk(folder: Path, play: Callable[[Disk], Coroutine[None, None, None]]) -> None:
    async def run() -> None:
        with ThreadPoolExecutor(2) as executor:
            disk = Disk(folder, executor)
            await play(disk)
            disk.map.close(clean=False)

    asyncio.run(run())


def test_a_failed_read_is_served_from_the_standby_and_its_sectors_written_back(tmp_path: Path) -> None:
    async def play(disk: Disk) -> None:
        assert await disk.read(10_000, 100) == b"p" * 100
        assert disk.here(8192, 4096) == b"p" * 4096
        assert disk.here(0, 8192) == bytes(8192)
        assert (disk.volume.rescue.failure_count, disk.volume.rescue.repaired_bytes) == (1, 4096)
        assert await disk.read(0, SIZE) == b"p" * SIZE
        assert disk.here(0, SIZE) == b"p" * SIZE

    on_a_disk(tmp_path, play)


def test_a_range_that_the_standby_lacks_fails_as_the_disk_did(tmp_path: Path) -> None:
    async def play(disk: Disk) -> None:
        disk.map.mark_dirty(Extent(3 * CHUNK_SIZE, 1))
        with pytest.raises(DeviceError, match="failed on purpose"):
            await disk.read(3 * CHUNK_SIZE, 512)
        assert await disk.read(4 * CHUNK_SIZE, 512) == b"p" * 512
        disk.link.break_off()
        with pytest.raises(DeviceError, match="failed on purpose"):
            await disk.read(4 * CHUNK_SIZE, 512)

    on_a_disk(tmp_path, play)


def test_a_read_shows_what_was_written_before_it(tmp_path: Path) -> None:
    async def play(disk: Disk) -> None:
        disk.write(4096, b"new" * 100)
        assert await disk.read(4096, 300) == b"new" * 100

    on_a_disk(tmp_path, play)


def test_a_write_that_comes_meanwhile_is_not_undone_by_the_repair(tmp_path: Path) -> None:
    async def play(disk: Disk) -> None:
        disk.link.slow = True
        disk.link.answers_held = []
        reading = asyncio.ensure_future(disk.read(0, 4096))
        while not disk.link.answers_held:
            await asyncio.sleep(0.001)
        disk.write(0, b"newer")
        disk.link.answer()
        assert (await reading)[:5] == b"ppppp"  # as it was when it was asked for
        assert disk.here(0, 6) == b"newer" + bytes(1)
        assert disk.volume.rescue.repaired_bytes == 0

    on_a_disk(tmp_path, play)


def test_a_link_that_ends_while_it_is_asked_leaves_the_disks_own_error(tmp_path: Path) -> None:
    async def play(disk: Disk) -> None:
        disk.link.answers_held = []
        reading = asyncio.ensure_future(disk.read(0, 4096))
        while not disk.link.answers_held:
            await asyncio.sleep(0.001)
        disk.link.break_off()
        with pytest.raises(DeviceError, match="failed on purpose"):
            await reading

    on_a_disk(tmp_path, play)
