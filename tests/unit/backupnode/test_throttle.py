"""The rate at which backups read: limited, halved while the standby is behind, and lifted again."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from backupnode.puller import Puller
from backupnode.throttle import RATE_MIN, Pace, Throttle
from tests.unit.backupnode.test_puller import Bench, ignore, with_bench

MIB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("seed", range(5))
def test_a_pace_is_kept_over_time_whatever_the_pieces(seed: int) -> None:
    source = random.Random(seed)
    clock = Clock()
    pace = Pace(10 * MIB, clock=clock)
    start, taken = clock.now, 0
    for _ in range(500):
        size = source.randrange(1, 2 * MIB)
        taken += size
        clock.now += pace.take(size) + source.choice([0.0, 0.0, 0.01, 0.5])
    # One second's worth may come ahead.
    assert taken / (clock.now - start + 1.0) <= 10 * MIB


def test_an_idle_time_is_not_saved_up() -> None:
    clock = Clock()
    pace = Pace(MIB, clock=clock)
    clock.now += 3600
    assert pace.take(5 * MIB) == pytest.approx(4.0)


def read(throttle: Throttle, clock: Clock, size: int) -> None:
    """So much in the second that passes."""
    throttle.count(size)
    clock.now += 1.0


def test_while_the_standby_is_behind_the_rate_is_halved_down_to_the_least() -> None:
    clock = Clock()
    throttle = Throttle(clock=clock)
    rates = []
    speed = 400 * MIB
    for _ in range(12):
        read(throttle, clock, speed)
        throttle.look(behind=True)
        rates.append(throttle.rate)
        speed = int(throttle.rate)
    assert rates[:3] == [200 * MIB, 100 * MIB, 50 * MIB] and rates[-1] == RATE_MIN


def test_when_it_keeps_up_the_rate_grows_until_it_limits_nothing() -> None:
    clock = Clock()
    throttle = Throttle(clock=clock)
    for _ in range(12):
        read(throttle, clock, int(throttle.rate) or 400 * MIB)
        throttle.look(behind=True)
    for _ in range(100):
        read(throttle, clock, min(int(throttle.rate), 100 * MIB))
        before = throttle.rate
        throttle.look(behind=False)
        if not throttle.rate:
            break
        assert throttle.rate == pytest.approx(before * 1.25)
    assert throttle.rate == 0 and before > 100 * MIB


def test_a_backup_reads_slower_while_the_standby_holds_many_writes_in_memory(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bench.standby.delay_s, bench.standby.message_size = 0.01, 65536
        puller = Puller(bench.client, bench.repository, look_s=0.02)
        await puller.run("vol1", full=True, report=ignore)
        assert puller.throttle_rate == 0
        bench.standby.staged_bytes = 12 * MIB
        running = asyncio.create_task(puller.run("vol1", full=True, report=ignore))
        while puller.throttle_rate != RATE_MIN:
            assert not running.done()
            await asyncio.sleep(0.01)
        bench.standby.staged_bytes = 0
        async with asyncio.timeout(10):
            await running

    with_bench(tmp_path, body)


def test_a_standby_that_does_not_tell_its_state_is_read_from_as_before(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bench.standby.staged_bytes = None
        bench.standby.delay_s = 0.02
        await Puller(bench.client, bench.repository, look_s=0.01).run("vol1", report=ignore)

    with_bench(tmp_path, body)
