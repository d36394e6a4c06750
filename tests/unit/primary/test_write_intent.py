"""Crashes at every step of a primary that notes its hot extents: the two copies may differ only where the map says so.

The disk, the map and the log are recorded as a power loss would find them: what was flushed, and of the rest anything.
Jobs for threads run when the test says, so that one seed is one history.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from primary.dirty_map import CHUNK_SHIFT, CHUNK_SIZE, DirtyMap
from primary.hot_extents import EXTENT_SIZE
from primary.intent_log import IntentLog
from primary.mirrored_device import AckMode, MirroredDevice
from primary.write_intent import WriteIntent
from stillpoint.devices import Buffer, MemoryDevice
from stillpoint.extents import MappedExtent
from tests.support.devices import Fault, FaultyDevice
from tests.support.mirror_link import MirrorLink

EXTENT_COUNT = 40
SIZE = EXTENT_COUNT * EXTENT_SIZE
CAPACITY = 16
Disk = dict[int, bytes]  # chunk → what was last written into it; absent: zeroes


class ManualExecutor(Executor):
    """Runs a job when told to."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], object]] = []

    def submit(self, job: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        self.jobs.append(lambda: job(*arguments, **options))
        return Future()

    def run_one(self, choose: random.Random) -> None:
        if self.jobs:
            self.jobs.pop(choose.randrange(len(self.jobs)))()


class ChunkDisk:
    """A device of which every write is a few bytes at the start of a chunk: a cache, and what a power loss leaves."""

    size = SIZE
    read_only = False
    description = "chunks"

    def __init__(self) -> None:
        self.now: Disk = {}
        self.durable: Disk = {}
        self.pending: list[tuple[int, bytes | None]] = []
        self.at_flush: Callable[[], None] = lambda: None

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        assert offset % CHUNK_SIZE == 0
        self._change(offset >> CHUNK_SHIFT, b"".join(buffers))

    def trim(self, offset: int, length: int) -> None:
        for chunk in range(offset >> CHUNK_SHIFT, (offset + length) >> CHUNK_SHIFT):
            self._change(chunk, None)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        self.trim(offset, length)

    def _change(self, chunk: int, data: bytes | None) -> None:
        _apply(self.now, chunk, data)
        self.pending.append((chunk, data))

    def flush(self) -> None:
        self.at_flush()
        pending, self.pending = self.pending, []
        for chunk, data in pending:
            _apply(self.durable, chunk, data)

    def after_power_loss(self, choose: random.Random) -> Disk:
        disk = dict(self.durable)
        for chunk, data in self.pending:
            if choose.random() < 0.5:
                _apply(disk, chunk, data)
        return disk

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        raise NotImplementedError  # nothing reads here

    def read_into(self, offset: int, buffer: memoryview) -> None:
        raise NotImplementedError

    def extents(self, offset: int, length: int) -> Iterator[MappedExtent]:
        raise NotImplementedError

    def resize(self, size: int) -> None:
        raise NotImplementedError

    def close(self) -> None: ...


def _apply(disk: Disk, chunk: int, data: bytes | None) -> None:
    if data is None:
        disk.pop(chunk, None)
    else:
        disk[chunk] = data


class ChunkLink(MirrorLink):
    """The standby, on such a disk."""

    def __init__(self, disk: ChunkDisk, session: int) -> None:
        super().__init__(0, session=session)
        self.disk = disk

    def changed(self, offset: int, length: int, payload: memoryview | None) -> None:
        if payload is None:
            self.disk.trim(offset, length)
        else:
            self.disk.write(offset, [bytes(payload)])

    def harden(self) -> None:
        self.disk.flush()


class RecordedMap(DirtyMap):
    """Knows which states of its file a power loss could leave."""

    path: Path
    versions: list[bytes]

    def note(self) -> None:
        self.versions.append(self.path.read_bytes())

    def persist(self) -> None:
        super().persist()
        self.versions = [self.path.read_bytes()]


class RecordedLog(IntentLog):
    """Likewise. While a record is appended, either it or the one before may be the newest."""

    path: Path
    states: list[bytes]
    at_append: Callable[[], None]

    def append(self, extents: Sequence[int]) -> None:
        before = self.path.read_bytes()
        super().append(extents)
        after = self.path.read_bytes()
        slot = next(at for at in range(0, len(after), 4096) if before[at : at + 4096] != after[at : at + 4096])
        torn = after[: slot + 30] + bytes(10) + after[slot + 40 :]
        self.states = [before, after, torn]
        self.at_append()
        self.states = [after]


class World:
    """A primary and its standby; `check` is what must hold at every instant."""

    def __init__(self, folder: Path, choose: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.choose = choose
        self._monkeypatch = monkeypatch
        self.executor = ManualExecutor()
        self.here, self.there = ChunkDisk(), ChunkDisk()
        self.log = RecordedLog(folder / "intent.log")
        self.log.path, self.log.at_append = folder / "intent.log", lambda: None
        self.map = RecordedMap(folder / "dirty.map", SIZE, create=True)
        self.map.path = folder / "dirty.map"
        self.map.persist()
        self.intent = WriteIntent(self.log, self.here, [self.map], self.executor, capacity=CAPACITY)
        self.volume = MirroredDevice("vol", self.here, [self.map], self.executor, mode=AckMode.SYNC, intent=self.intent)
        self.here.at_flush = self.log.at_append = self.check
        self.link: ChunkLink | None = None
        self.sessions = 0
        self.cookies = 0
        self.answered: dict[int, int] = {}
        self.checks = 0

    def reply(self, cookie: int, errno: int) -> None:
        assert cookie not in self.answered
        self.answered[cookie] = errno

    def attach(self) -> None:
        """In sync at once: what is dirty is copied in one turn."""
        self.sessions += 1
        link = ChunkLink(self.there, self.sessions)
        link.lost = lambda error: self.volume.detach(link.sender, error)
        link.slow = True
        self.volume.attach(link.sender, self.map, lambda error: None)
        while (run := self.map.next_dirty(0, limit=1 << 30)) is not None:
            for chunk in range(run.offset >> CHUNK_SHIFT, run.end >> CHUNK_SHIFT):
                data = self.here.now.get(chunk)
                if data is None:
                    link.sender.zero(chunk << CHUNK_SHIFT, CHUNK_SIZE, may_trim=True)
                else:
                    link.sender.write(chunk << CHUNK_SHIFT, memoryview(data))
            self.map.sent(run)
        sequence = link.sender.resync_end()
        self.volume.require(link.sender, sequence)
        link.sender.push()
        link.acknowledge()
        self.link = link

    def step(self) -> None:
        choose, action = self.choose, self.choose.random()
        if action < 0.45:
            for _ in range(choose.randrange(1, 4)):
                self.cookies += 1
                # Some extents are written to again and again, and most now and then.
                extent = choose.randrange(6) if choose.random() < 0.6 else choose.randrange(EXTENT_COUNT)
                chunk = extent * 64 + choose.randrange(64)
                data = memoryview(choose.randbytes(8))
                self.volume.write(chunk << CHUNK_SHIFT, data, False, choose.random() < 0.1, self, self.cookies)
            self.volume.end_batch()
        elif action < 0.5:
            self.cookies += 1
            start = choose.randrange(EXTENT_COUNT * 64 - 600)
            length = choose.choice([1, 64, 100, 600]) << CHUNK_SHIFT
            self.volume.trim(start << CHUNK_SHIFT, length, False, self, self.cookies)
            self.volume.end_batch()
        elif action < 0.75:
            self.executor.run_one(choose)
        elif action < 0.9 and self.link is not None:
            if choose.random() < 0.5:
                self.volume.flush_in_background(self.link.sender)
            self.link.acknowledge()
        elif action < 0.93 and self.link is not None:
            self.link.break_off()
            self.link = None
        elif self.link is None:
            self.attach()

    def check(self) -> None:
        """Lose power here, perhaps there too, and reopen: what differs is dirty."""
        if self.choose.random() > 0.3:
            return
        self.checks += 1
        self.map.note()
        here = self.here.after_power_loss(self.choose)
        there = self.there.after_power_loss(self.choose) if self.choose.random() < 0.5 else self.there.now
        lost = self.folder / "lost"
        lost.mkdir(exist_ok=True)
        (lost / "intent.log").write_bytes(self.choose.choice(self.log.states))
        (lost / "dirty.map").write_bytes(self.choose.choice(self.map.versions))
        log = IntentLog(lost / "intent.log")
        assert log.hot is not None and len(log.hot) <= CAPACITY + CAPACITY // 8
        with self._monkeypatch.context() as patch:
            patch.setattr("primary.dirty_map.boot_id", lambda: "00000000-0000-0000-0000-000000000000")
            reopened = DirtyMap(lost / "dirty.map", SIZE, create=False, suspects=log.suspects(SIZE))
        log.close()
        marks = reopened._array
        lacking = [chunk for chunk in here.keys() | there.keys() if here.get(chunk) != there.get(chunk)]
        missed = [chunk for chunk in lacking if not marks[chunk]]
        del marks
        reopened.close(clean=False)
        assert not missed, f"chunks {missed} differ and are not dirty"


def live(folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch, *, steps: int = 300) -> World:
    print(f"seed {seed}")

    async def run() -> World:
        world = World(folder, random.Random(seed), monkeypatch)
        world.attach()
        for _ in range(steps):
            world.step()
            await asyncio.sleep(0)
            world.check()
        for _ in range(5000):  # whatever is held back or waits, ends
            if world.link is not None:
                world.link.acknowledge()
            world.executor.run_one(world.choose)
            await asyncio.sleep(0)
            if len(world.answered) == world.cookies:
                break
        return world

    return asyncio.run(run())


@pytest.mark.parametrize("seed", range(5))
def test_after_a_power_loss_at_any_step_what_differs_is_dirty(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = live(tmp_path, seed, monkeypatch)
    assert world.checks > 40
    assert world.intent.miss_count > 20
    assert world.sessions > 2
    assert world.answered == dict.fromkeys(range(1, world.cookies + 1), 0)


def _skips_the_disk(world: World) -> None:
    world.intent._make_durable = world.map.persist  # type: ignore[method-assign]


def _skips_the_map(world: World) -> None:
    world.intent._make_durable = world.here.flush  # type: ignore[method-assign]


def _never_waits(world: World) -> None:
    world.intent.may_start = lambda offset, length: True  # type: ignore[method-assign]


def _forgets_the_log(world: World) -> None:
    world.log.append = lambda extents: None  # type: ignore[method-assign]


@pytest.mark.parametrize("fault", [_skips_the_disk, _skips_the_map, _never_waits, _forgets_the_log])
def test_each_rule_left_out_is_noticed(
    tmp_path: Path, fault: Callable[[World], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = World.__init__

    def faulty(self: World, *arguments: Any) -> None:
        honest(self, *arguments)
        fault(self)

    monkeypatch.setattr(World, "__init__", faulty)

    def lives() -> None:
        for seed in range(20):
            folder = tmp_path / str(seed)
            folder.mkdir()
            live(folder, seed, monkeypatch)

    with pytest.raises(AssertionError, match="differ and are not dirty"):
        lives()


class Small:
    """A volume in memory with real threads."""

    def __init__(self, folder: Path, executor: ThreadPoolExecutor, size: int = 64 * EXTENT_SIZE) -> None:
        self.device = FaultyDevice(MemoryDevice(size))
        self.log = IntentLog(folder / "intent.log")
        self.map = DirtyMap(folder / "dirty.map", size, create=True)
        self.intent = WriteIntent(self.log, self.device, [self.map], executor, capacity=CAPACITY)
        self.volume = MirroredDevice("vol", self.device, [self.map], executor, mode=AckMode.SYNC, intent=self.intent)
        self.answers: dict[int, int] = {}

    def reply(self, cookie: int, errno: int) -> None:
        self.answers[cookie] = errno

    def write(self, cookie: int, offset: int, data: bytes) -> None:
        self.volume.write(offset, memoryview(data), False, False, self, cookie)

    async def answer(self, cookie: int) -> int:
        async with asyncio.timeout(10):
            while cookie not in self.answers:
                await asyncio.sleep(0.001)
        return self.answers[cookie]

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self.device.read_into(offset, memoryview(data))
        return bytes(data)


def on_a_small_volume(folder: Path, play: Callable[[Small], Coroutine[None, None, None]]) -> None:
    async def run() -> None:
        with ThreadPoolExecutor(2) as executor:
            small = Small(folder, executor)
            await play(small)
            await small.intent.close()
            small.map.close(clean=False)

    asyncio.run(run())


def test_a_log_that_cannot_be_written_fails_writes_to_cold_extents_and_no_others(tmp_path: Path) -> None:
    async def play(small: Small) -> None:
        small.write(1, 0, b"hot")
        small.volume.end_batch()
        assert await small.answer(1) == 0
        os.close(small.log._fd)
        small.log._fd = os.open("/dev/full", os.O_RDWR)
        for cookie in (2, 4):
            small.write(cookie, 5 * EXTENT_SIZE, b"cold")
            small.volume.end_batch()
            assert await small.answer(cookie) != 0
            assert small.read(5 * EXTENT_SIZE, 4) == bytes(4)
        small.write(3, 10, b"still")
        small.volume.end_batch()
        assert await small.answer(3) == 0
        assert "cannot write" in small.volume.failure

    on_a_small_volume(tmp_path, play)


def test_an_extent_never_turns_cold_when_the_disk_cannot_be_flushed(tmp_path: Path) -> None:
    async def play(small: Small) -> None:
        small.device.flushes = Fault(errno.EIO, first=1)
        for cookie in range(small.intent.extents.limit + 1):
            small.write(cookie, cookie * EXTENT_SIZE, b"one each")
            small.volume.end_batch()
        assert await small.answer(small.intent.extents.limit) != 0
        assert "flush failed" in small.volume.failure
        assert len(small.intent.extents) == small.intent.extents.limit

    on_a_small_volume(tmp_path, play)


def test_writes_that_are_held_back_keep_their_order(tmp_path: Path) -> None:
    async def play(small: Small) -> None:
        small.write(1, EXTENT_SIZE, b"1")
        small.volume.end_batch()
        await small.answer(1)
        small.write(2, EXTENT_SIZE - 1, b"22")  # touches a cold extent and the hot one
        small.write(3, EXTENT_SIZE, b"3")  # lies in the hot one, and came later
        small.volume.end_batch()
        small.write(4, EXTENT_SIZE - 1, b"4")
        small.volume.end_batch()
        assert 3 not in small.answers
        for cookie in (2, 3, 4):
            assert await small.answer(cookie) == 0
        assert small.read(EXTENT_SIZE - 1, 2) == b"43"

    on_a_small_volume(tmp_path, play)


def test_a_trim_of_more_than_may_be_hot_is_answered_once(tmp_path: Path) -> None:
    async def play(small: Small) -> None:
        for extent in range(60):
            small.write(extent, extent * EXTENT_SIZE + 5, b"x")
            small.volume.end_batch()
            await small.answer(extent)
        small.volume.trim(1, 60 * EXTENT_SIZE, True, small, 100)
        small.volume.end_batch()
        assert await small.answer(100) == 0
        assert not any(small.read(extent * EXTENT_SIZE + 5, 1)[0] for extent in range(60))
        assert len(small.intent.extents) <= small.intent.extents.limit

    on_a_small_volume(tmp_path, play)


def test_a_hot_set_is_kept_while_all_of_it_is_used(tmp_path: Path) -> None:
    async def play(small: Small) -> None:
        for number in range(20 * CAPACITY):
            small.write(number, number % CAPACITY * EXTENT_SIZE, b"x")
            small.volume.end_batch()
            await small.answer(number)
        assert small.intent.miss_count == CAPACITY

    on_a_small_volume(tmp_path, play)
