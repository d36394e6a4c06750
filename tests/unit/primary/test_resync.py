"""How fast and how many at once: resyncs are limited alone and together, and holes cost nothing."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from primary.dirty_map import CHUNK_SIZE
from primary.resync import Progress, resync
from primary.resync_limits import ResyncLimits
from primary.throttle import Throttle
from primary.verify import Verifier, keep_differences
from stillpoint.errors import PeerUnavailable
from stillpoint.extents import Extent
from tests.unit.primary.test_mirrored_device import SIZE, Bench, on_a_bench


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_throttle_lets_through_what_its_rate_says_and_saves_little_up() -> None:
    clock = Clock()
    throttle = Throttle(1000, clock=clock)
    assert [throttle.book(500) - clock.now for _ in range(3)] == pytest.approx([0.5, 1.0, 1.5])
    clock.now += 60
    assert throttle.book(500) - clock.now == pytest.approx(0.4)
    throttle.rate = 10_000
    assert throttle.book(500) - clock.now == pytest.approx(0.05)
    throttle.rate = 0
    assert throttle.book(1 << 40) == clock.now


def test_whoever_waits_notices_that_the_limit_is_gone() -> None:
    async def play() -> None:
        throttle = Throttle(1)
        waiting = asyncio.ensure_future(throttle.take(1000))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        throttle.rate = 0
        async with asyncio.timeout(5):
            await waiting

    asyncio.run(play())


def test_no_more_resyncs_run_than_may_and_the_others_say_that_they_wait() -> None:
    async def play() -> None:
        limits = ResyncLimits(rate=0, parallel_max=2)
        running, most, waited = 0, 0, 0

        def waiting() -> None:
            nonlocal waited
            waited += 1

        async def one() -> None:
            nonlocal running, most
            async with limits.slot(waiting):
                running += 1
                most = max(most, running)
                await asyncio.sleep(0.01)
                running -= 1

        await asyncio.gather(*(one() for _ in range(5)))
        assert (most, waited) == (2, 3)

    asyncio.run(play())


def test_a_resync_keeps_to_each_limit_and_holes_are_free(tmp_path: Path) -> None:
    async def play(made: Bench) -> None:
        made.device.write(0, [b"x" * (4 * CHUNK_SIZE)])
        made.maps[0].mark_dirty(Extent(0, SIZE))
        link = made.attach(0)
        loop = asyncio.get_running_loop()
        started = loop.time()
        throttles = (Throttle(1 << 40), Throttle(CHUNK_SIZE * 10))
        progress = Progress(made.maps[0].dirty_bytes)
        await resync(made.device, made.maps[0], made.volume, link.sender, made.executor, progress, throttles)
        assert 0.25 < loop.time() - started < 10
        assert progress.done_bytes == SIZE
        assert link.sent_bytes == 4 * CHUNK_SIZE
        assert bytes(link.image) == made.content()

    on_a_bench(tmp_path, 1, play)


def test_a_resync_that_was_cut_off_goes_on_where_it_was(tmp_path: Path) -> None:
    async def play(made: Bench) -> None:
        made.device.write(0, [b"y" * SIZE])
        made.maps[0].mark_dirty(Extent(0, SIZE))
        link = made.attach(0)
        progress = Progress(SIZE)
        slow = Throttle(SIZE)
        running = asyncio.ensure_future(
            resync(made.device, made.maps[0], made.volume, link.sender, made.executor, progress, [slow])
        )
        while not progress.done_bytes:
            await asyncio.sleep(0.01)
        link.sender.flush()
        link.sender.push()
        made.volume.flush_in_background(link.sender)
        await asyncio.sleep(0.01)
        running.cancel()
        link.break_off()
        left = made.maps[0].dirty_bytes
        assert 0 < left < SIZE
        again = await made.join(0)
        assert again.sent_bytes == left
        assert bytes(again.image) == made.content()

    on_a_bench(tmp_path, 1, play)


def test_the_rate_that_is_shown_is_that_of_late() -> None:
    clock = Clock()
    progress = Progress(1 << 30, clock=clock)
    for _ in range(100):
        clock.now += 1
        progress.advance(1_000_000)
    for _ in range(40):
        clock.now += 1
        progress.advance(10_000)
    assert progress.rate == pytest.approx(10_000, rel=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_where_all_has_to_be_compared_only_what_differs_is_sent(tmp_path: Path, seed: int) -> None:
    """The last chunks of a difference that no chunk ends with, holes, and writes that come meanwhile included."""
    print(f"seed {seed}")
    choose = random.Random(seed)

    async def play(made: Bench) -> None:
        content = bytearray(choose.randbytes(SIZE))
        content[3 * CHUNK_SIZE : 9 * CHUNK_SIZE] = bytes(6 * CHUNK_SIZE)
        made.device.write(0, [content])
        made.images[0][:] = content
        differing = set()
        for _ in range(3):
            at = choose.randrange(SIZE)
            made.images[0][at] ^= 1
            differing.add(at // CHUNK_SIZE)
        made.maps[0].mark_dirty(Extent(0, SIZE))
        link = made.attach(0)
        verifier = Verifier(made.device, made.volume, link.sender, made.executor, rate=0)
        comparing = asyncio.ensure_future(keep_differences(verifier, made.maps[0]))
        await asyncio.sleep(0)
        written = made.write(choose.randrange(SIZE - 4096), choose.randbytes(4096))
        await comparing
        assert await made.answered(written) == 0
        assert made.maps[0].dirty_count <= 4 * len(differing)  # it compares four chunks at a time
        before = link.sent_bytes
        await made.catch_up(0)
        assert link.sent_bytes - before <= 4 * len(differing) * CHUNK_SIZE
        assert bytes(link.durable) == made.content()
        assert made.maps[0].dirty_count == 0

    on_a_bench(tmp_path, 1, play)


def test_a_comparison_that_is_cut_off_forgets_nothing(tmp_path: Path) -> None:
    async def play(made: Bench) -> None:
        made.device.write(0, [b"z" * SIZE])
        made.maps[0].mark_dirty(Extent(0, SIZE))
        link = made.attach(0)
        verifier = Verifier(made.device, made.volume, link.sender, made.executor, rate=32 * CHUNK_SIZE)
        comparing = asyncio.ensure_future(keep_differences(verifier, made.maps[0]))
        await asyncio.sleep(0.05)
        link.break_off()
        with pytest.raises(PeerUnavailable):
            await comparing
        assert made.maps[0].dirty_bytes == SIZE

    on_a_bench(tmp_path, 1, play)
