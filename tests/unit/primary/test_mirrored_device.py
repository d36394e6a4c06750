"""One volume with several standbys: what each answer promises, whoever is slow and whoever goes away."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from primary.dirty_map import CHUNK_SIZE, DirtyMap
from primary.gate import Gate, LossPolicy
from primary.mirrored_device import AckMode, CongestionPolicy, MirroredDevice
from primary.resync import Progress, resync
from stillpoint.devices import MemoryDevice
from stillpoint.extents import Extent
from stillpoint.nbd.constants import Errno
from tests.support.mirror_link import MirrorLink

SIZE = 32 * CHUNK_SIZE


class Client:
    """Counts answers."""

    def __init__(self) -> None:
        self.answers: dict[int, int] = {}

    def reply(self, cookie: int, errno: int) -> None:
        assert cookie not in self.answers, "answered twice"
        self.answers[cookie] = errno


class Bench:
    """A volume in memory with `count` maps, and its standbys."""

    def __init__(self, folder: Path, count: int, mode: AckMode, executor: ThreadPoolExecutor) -> None:
        self.device = MemoryDevice(SIZE)
        self.maps = [DirtyMap(folder / f"dirty-{number}.map", SIZE, create=True) for number in range(count)]
        self.volume = MirroredDevice("vol", self.device, self.maps, executor, mode=mode)
        self.executor = executor
        self.client = Client()
        self.links: list[MirrorLink | None] = [None] * count
        self.images = [bytearray(SIZE) for _ in range(count)]
        self.sessions = 0
        self._cookie = 0
        self.detached: Callable[[int], None] = self._forget

    def _forget(self, number: int) -> None:
        self.links[number] = None

    def content(self) -> bytes:
        data = bytearray(SIZE)
        self.device.read_into(0, memoryview(data))
        return bytes(data)

    def attach(self, number: int) -> MirrorLink:
        self.sessions += 1
        link = MirrorLink(SIZE, image=self.images[number], session=self.sessions)

        self.volume.attach(link.sender, self.maps[number], lambda error: self.detached(number))
        link.lost = lambda error: self.volume.detach(link.sender, error)
        self.links[number] = link
        return link

    async def join(self, number: int) -> MirrorLink:
        """Attach it and bring it in sync."""
        link = self.attach(number)
        await self.catch_up(number)
        return link

    async def catch_up(self, number: int) -> None:
        link = self.links[number]
        assert link is not None
        dirty = self.maps[number]
        await resync(self.device, dirty, self.volume, link.sender, self.executor, Progress(dirty.dirty_bytes))
        sequence = link.sender.resync_end()
        self.volume.require(link.sender, sequence)
        link.sender.push()
        await link.sender.until(lambda watermarks: watermarks.flushed >= sequence)

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> int:
        self._cookie += 1
        self.volume.write(offset, memoryview(data), False, fua, self.client, self._cookie)
        self.volume.end_batch()
        return self._cookie

    def zero(self, offset: int, length: int) -> int:
        self._cookie += 1
        self.volume.write_zeroes(offset, length, True, False, self.client, self._cookie)
        self.volume.end_batch()
        return self._cookie

    def flush(self) -> int:
        self._cookie += 1
        self.volume.flush(self.client, self._cookie)
        self.volume.end_batch()
        return self._cookie

    async def answered(self, cookie: int) -> int:
        async with asyncio.timeout(10):
            while cookie not in self.client.answers:
                await asyncio.sleep(0)
        return self.client.answers[cookie]

    def covers(self, number: int, image: bytes | bytearray) -> bool:
        """Whether the map of this standby names every chunk in which `image` differs from the volume."""
        content, values = self.content(), self.maps[number]._bytes
        return all(
            values[at // CHUNK_SIZE] or content[at : at + CHUNK_SIZE] == image[at : at + CHUNK_SIZE]
            for at in range(0, SIZE, CHUNK_SIZE)
        )


@asynccontextmanager
async def bench(folder: Path, count: int, mode: AckMode = AckMode.SYNC) -> AsyncIterator[Bench]:
    with ThreadPoolExecutor(2) as executor:
        made = Bench(folder, count, mode, executor)
        try:
            yield made
        finally:
            for dirty in made.maps:
                dirty.close(clean=False)


def on_a_bench(folder: Path, count: int, play: Callable[[Bench], object], mode: AckMode = AckMode.SYNC) -> None:
    async def run() -> None:
        async with bench(folder, count, mode) as made:
            await play(made)  # type: ignore[misc]

    asyncio.run(run())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_write_waits_for_every_standby_that_is_in_sync(tmp_path: Path) -> None:
    async def play(made: Bench) -> None:
        first, second = await made.join(0), await made.join(1)
        second.slow = True
        cookie = made.write(0, b"a" * 4096)
        await settle()
        assert cookie not in made.client.answers
        assert first.image[:4096] == b"a" * 4096
        second.acknowledge()
        assert await made.answered(cookie) == 0

    on_a_bench(tmp_path, 2, play)


def test_a_standby_that_is_not_in_sync_yet_slows_clients_only_once_its_queue_is_long(tmp_path: Path) -> None:
    async def play(made: Bench) -> None:
        await made.join(0)
        late = made.attach(1)
        late.slow = True
        assert await made.answered(made.write(0, b"b" * 4096)) == 0
        assert await made.answered(made.flush()) == 0
        await made.answered(made.write(0, b"c" * (1 << 19)))
        over = made.write(0, b"d" * (1 << 19))
        await settle()
        assert over not in made.client.answers
        late.acknowledge()
        assert await made.answered(over) == 0

    on_a_bench(tmp_path, 2, play)


def test_losing_one_standby_answers_what_waited_for_it_alone_and_the_other_never_notices(tmp_path: Path) -> None:
    async def play(made: Bench) -> None:
        first, second = await made.join(0), await made.join(1)
        second.slow = True
        written, flushed = made.write(CHUNK_SIZE, b"e" * 512), made.flush()
        await settle()
        assert not made.client.answers
        second.break_off()
        assert await made.answered(written) == 0
        assert await made.answered(flushed) == 0
        assert made.maps[1].dirty_count == 1
        assert made.maps[0].dirty_count == 0
        assert first.durable[CHUNK_SIZE : CHUNK_SIZE + 512] == b"e" * 512
        assert await made.answered(made.write(0, b"f" * 512)) == 0
        assert bytes(first.image) == made.content()
        assert made.maps[1].dirty_count == 2

    on_a_bench(tmp_path, 2, play)


def test_only_what_one_standby_lacks_is_sent_to_it(tmp_path: Path) -> None:
    async def play(made: Bench) -> None:
        first, second = await made.join(0), await made.join(1)
        second.break_off()
        made.write(5 * CHUNK_SIZE, b"g" * 4096)
        made.zero(9 * CHUNK_SIZE, CHUNK_SIZE)
        before = first.sent_bytes
        again = await made.join(1)
        assert again.sent_bytes <= 2 * CHUNK_SIZE
        assert first.sent_bytes == before
        assert bytes(again.image) == bytes(first.image) == made.content()

    on_a_bench(tmp_path, 2, play)


def test_a_write_in_the_turn_that_ends_a_resync_is_waited_for(tmp_path: Path) -> None:
    async def play(made: Bench) -> None:
        link = made.attach(0)
        link.slow = True
        sequence = link.sender.resync_end()
        made.volume.require(link.sender, sequence)
        link.sender.push()
        cookie = made.write(0, b"h" * 512)
        await settle()
        assert cookie not in made.client.answers
        link.acknowledge()
        assert await made.answered(cookie) == 0

    on_a_bench(tmp_path, 1, play)


@pytest.mark.parametrize("mode", list(AckMode))
@pytest.mark.parametrize("seed", range(4))
def test_answers_hold_what_they_promise_whatever_happens_to_three_standbys(
    tmp_path: Path, mode: AckMode, seed: int
) -> None:
    print(f"seed {seed}")
    choose = random.Random(seed)

    async def play(made: Bench) -> None:
        for _ in range(120):
            action = choose.random()
            number = choose.randrange(3)
            link = made.links[number]
            offset = choose.randrange(SIZE // 512) * 512
            length = min(choose.choice([512, 4096, CHUNK_SIZE]), SIZE - offset)
            if action < 0.5:
                in_sync = [each for each in made.links if each is not None and _in_sync(made, each)]
                fua = choose.random() < 0.2
                cookie = made.write(offset, choose.randbytes(length), fua=fua)
                if all(not each.slow for each in in_sync):
                    await made.answered(cookie)
                    for each in in_sync:
                        if mode is AckMode.SYNC and not fua:
                            assert each.image == made.content()
                        elif mode is not AckMode.ASYNC:
                            assert each.durable == made.content()
            elif action < 0.6:
                made.zero(offset, length)
            elif action < 0.7:
                made.flush()
            elif action < 0.8 and link is None:
                await made.join(number)
            elif action < 0.85 and link is not None:
                link.break_off()
                assert made.links[number] is None
            elif action < 0.9 and link is not None:
                made.volume.flush_in_background(link.sender)
            elif link is not None:
                link.slow = not link.slow
                link.acknowledge()
            for index, there in enumerate(made.links):
                assert made.covers(index, made.images[index])
                assert there is None or made.covers(index, there.durable)
            await asyncio.sleep(0)
        for number, link in enumerate(made.links):
            if link is None:
                link = await made.join(number)
            link.slow = False
            link.acknowledge()
        assert await made.answered(made.flush()) == 0
        await settle()
        for image in made.images:
            assert bytes(image) == made.content()
        assert all(cookie in made.client.answers for cookie in range(1, made._cookie + 1))

    on_a_bench(tmp_path, 3, play, mode)


def _in_sync(made: Bench, link: MirrorLink) -> bool:
    standby = made.volume._attached(link.sender)
    return standby is not None and standby.in_sync


def test_a_local_write_that_fails_is_dirty_for_every_standby_and_ends_their_sessions(tmp_path: Path) -> None:
    async def play(made: Bench) -> None:
        first, second = await made.join(0), await made.join(1)
        made.device.close()
        cookie = made.write(0, b"i" * 512)
        assert await made.answered(cookie) != 0
        assert first.ended is not None
        assert second.ended is not None
        assert [dirty.next_dirty(0, limit=1 << 30) for dirty in made.maps] == [Extent(0, CHUNK_SIZE)] * 2

    on_a_bench(tmp_path, 2, play)


def test_suspended_writes_wait_until_a_standby_is_in_sync(tmp_path: Path) -> None:
    async def play(made: Bench) -> None:
        made.volume.gate.set_policy(LossPolicy.SUSPEND)
        link = await made.join(0)
        link.slow = True
        waiting, flushed = made.write(0, b"j" * 512), made.flush()
        link.break_off()
        late, synced = made.write(512, b"k" * 512), made.write(1024, b"l" * 512, fua=True)
        await asyncio.sleep(0.05)
        assert not made.client.answers
        assert made.volume.gate.reasons == ["no standby is in sync"]
        assert made.volume.withheld_count == 4
        again = await made.join(0)
        assert [await made.answered(cookie) for cookie in (waiting, flushed, late, synced)] == [0] * 4
        assert bytes(again.durable) == made.content()
        assert made.volume.gate.reasons == []

    on_a_bench(tmp_path, 1, play)


@pytest.mark.parametrize(
    "way_out", [lambda gate: gate.excuse(), lambda gate: gate.set_policy(LossPolicy.CONTINUE)], ids=["resume", "policy"]
)
def test_suspended_writes_go_on_when_an_operator_says_so(tmp_path: Path, way_out: Callable[[Gate], None]) -> None:
    async def play(made: Bench) -> None:
        made.volume.gate.set_policy(LossPolicy.SUSPEND)
        waiting = made.write(0, b"m" * 512)
        flushed = made.flush()
        await settle()
        assert not made.client.answers
        way_out(made.volume.gate)
        assert await made.answered(waiting) == await made.answered(flushed) == 0
        assert await made.answered(made.write(0, b"n" * 512)) == 0

    on_a_bench(tmp_path, 1, play)


def test_being_excused_ends_when_a_standby_has_been_in_sync(tmp_path: Path) -> None:
    async def play(made: Bench) -> None:
        made.volume.gate.set_policy(LossPolicy.SUSPEND)
        made.volume.gate.excuse()
        link = await made.join(0)
        link.break_off()
        cookie = made.write(0, b"o" * 512)
        await settle()
        assert cookie not in made.client.answers
        made.volume.gate.end()
        assert await made.answered(cookie) == Errno.ESHUTDOWN

    on_a_bench(tmp_path, 1, play)


def test_writers_get_errors_without_a_standby_if_that_is_the_policy(tmp_path: Path) -> None:
    async def play(made: Bench) -> None:
        made.volume.gate.set_policy(LossPolicy.ERROR)
        link = await made.join(0)
        link.slow = True
        waiting, flushed = made.write(0, b"p" * 512), made.flush()
        link.break_off()
        assert await made.answered(waiting) == Errno.EIO
        assert await made.answered(flushed) == Errno.EIO
        before = made.content()
        assert await made.answered(made.write(0, b"q" * 512)) == Errno.EIO
        assert await made.answered(made.flush()) == Errno.EIO
        assert made.content() == before
        await made.join(0)
        assert await made.answered(made.write(0, b"r" * 512)) == 0

    on_a_bench(tmp_path, 1, play)


def test_one_standby_of_two_is_enough_for_every_policy(tmp_path: Path) -> None:
    async def play(made: Bench) -> None:
        made.volume.gate.set_policy(LossPolicy.SUSPEND)
        first, _ = await made.join(0), await made.join(1)
        first.break_off()
        assert await made.answered(made.write(0, b"s" * 512)) == 0
        assert await made.answered(made.flush()) == 0

    on_a_bench(tmp_path, 2, play)


def test_whoever_is_told_of_a_loss_may_stop_the_answers_that_waited_for_it(tmp_path: Path) -> None:
    async def play(made: Bench) -> None:
        link = await made.join(0)
        link.slow = True
        detached = made.detached

        def decide(number: int) -> None:
            made.volume.gate.suspend("deciding")
            detached(number)

        made.detached = decide
        written, flushed = made.write(0, b"t" * 512), made.flush()
        link.break_off()
        await asyncio.sleep(0.05)
        assert not made.client.answers
        made.volume.gate.resume("deciding")
        assert await made.answered(written) == await made.answered(flushed) == 0

    on_a_bench(tmp_path, 1, play)


def test_an_asynchronous_volume_blocks_or_detaches_when_its_queue_is_full(tmp_path: Path) -> None:
    async def play(made: Bench) -> None:
        made.volume._async_queue_bytes = CHUNK_SIZE
        link = await made.join(0)
        link.slow = True
        assert await made.answered(made.write(0, b"u" * 512)) == 0
        full = made.write(0, b"v" * CHUNK_SIZE)
        await settle()
        assert full not in made.client.answers
        made.volume.congestion = CongestionPolicy.DETACH
        assert await made.answered(made.write(0, b"w" * 512)) == 0
        assert await made.answered(full) == 0
        assert link.ended is not None and "queue is full" in str(link.ended)
        assert made.maps[0].dirty_count == 1

    on_a_bench(tmp_path, 1, play, AckMode.ASYNC)


def test_the_mode_changes_for_the_next_write(tmp_path: Path) -> None:
    async def play(made: Bench) -> None:
        link = await made.join(0)
        link.slow = True
        made.volume.set_mode(AckMode.ASYNC)
        assert await made.answered(made.write(0, b"x" * 512)) == 0
        made.volume.set_mode(AckMode.SYNC)
        cookie = made.write(0, b"y" * 512)
        await settle()
        assert cookie not in made.client.answers
        made.volume.set_mode(AckMode.DURABLE)
        durable = made.write(512, b"z" * 512)
        link.slow = False
        link.acknowledge()
        assert await made.answered(durable) == 0
        assert bytes(link.durable) == made.content()

    on_a_bench(tmp_path, 1, play)


def test_an_error_is_answered_even_while_the_gate_is_closed(tmp_path: Path) -> None:
    async def play(made: Bench) -> None:
        link = await made.join(0)
        detached = made.detached

        def decide(number: int) -> None:
            made.volume.gate.suspend("deciding")
            detached(number)

        made.detached = decide
        made.device.close()
        assert await made.answered(made.write(0, b"A" * 512)) != 0
        assert link.ended is not None
        assert await made.answered(made.write(0, b"B" * 512)) != 0
        assert made.volume.gate.withheld_count == 0

    on_a_bench(tmp_path, 1, play)


def test_who_may_not_go_on_refuses_writers_and_what_was_withheld(tmp_path: Path) -> None:
    async def play(made: Bench) -> None:
        gate = made.volume.gate
        gate.suspend("deciding")
        written, flushed = made.write(0, b"C" * 512), made.flush()
        gate.refuse("cannot")
        assert gate.reasons == ["deciding", "cannot"]
        gate.resume("deciding")
        assert await made.answered(written) == await made.answered(flushed) == Errno.EIO
        assert await made.answered(made.write(0, b"D" * 512)) == Errno.EIO
        gate.allow("cannot")
        assert await made.answered(made.write(0, b"E" * 512)) == 0
        assert await made.answered(made.flush()) == 0

    on_a_bench(tmp_path, 1, play)
