"""What a schedule decides, under random clocks: that jump, that stand still while nothing runs, with runs that fail."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest

from backupnode.calendar_expression import parse
from backupnode.schedule import CLOCK_STEP_S, Schedule, ScheduleConfig, ScheduleState
from stillpoint.errors import InvalidRequest

S = 1_000_000_000
HOUR = 3600 * S
DAY = 24 * HOUR


def ns(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * S


START = ns("2026-03-27T12:00")


def schedule(when: str = "02:00", *, jitter_s: float = 0.0, retries: int = 3) -> Schedule:
    return Schedule(ScheduleConfig("vol1", when, jitter_s=jitter_s, retries=retries))


def due_ns(made: Schedule, state: ScheduleState, now_ns: int) -> int:
    due = made.due(state, now_ns)
    assert due is not None
    return due.at_ns


def test_a_new_schedule_waits_for_its_first_time() -> None:
    assert due_ns(schedule(), ScheduleState(START), START) == ns("2026-03-28T02:00")


def test_times_that_passed_while_nothing_ran_are_made_up_for_once() -> None:
    made, state = schedule(), ScheduleState(START)
    now_ns = START + 10 * DAY
    assert due_ns(made, state, now_ns) <= now_ns
    state = state.started(now_ns).succeeded(now_ns + HOUR, "b1")
    assert due_ns(made, state, now_ns + HOUR) == ns("2026-04-07T02:00")


def test_a_small_step_back_of_the_clock_runs_nothing_twice() -> None:
    made, state = schedule(), ScheduleState(START)
    at = ns("2026-03-28T02:00")
    state = state.started(at).succeeded(at + 60 * S, "b1")
    for back_s in (1, 60, 1800, int(CLOCK_STEP_S) - 1):
        assert due_ns(made, state, at - back_s * S) == ns("2026-03-29T02:00")


def test_a_clock_that_was_years_ahead_does_not_silence_the_schedule() -> None:
    made = schedule()
    state = ScheduleState(START).started(ns("2038-01-01T00:00")).succeeded(ns("2038-01-01T00:01"), "b1")
    assert due_ns(made, state, START) == ns("2026-03-28T02:00")


def test_the_jitter_is_the_same_whenever_it_is_asked_for_and_differs_between_schedules_and_times() -> None:
    made, state = schedule("hourly", jitter_s=1800), ScheduleState(START)
    seen = set()
    for number in range(50):
        now_ns = START + number * HOUR
        due = due_ns(made, ScheduleState(now_ns), now_ns)
        assert due == due_ns(schedule("hourly", jitter_s=1800), ScheduleState(now_ns), now_ns + 7 * S)
        assert 0 <= due - (now_ns + HOUR) < 1800 * S
        seen.add(due - now_ns)
    assert len(seen) > 45
    other = Schedule(ScheduleConfig("vol2", "hourly", jitter_s=1800))
    assert due_ns(other, state, START) != due_ns(made, state, START)


def test_a_run_that_failed_is_tried_again_after_growing_pauses_and_then_at_the_next_time() -> None:
    made, state = schedule(), ScheduleState(START)
    now_ns = due_ns(made, state, START)
    pauses = []
    for retry in (False, True, True, True):
        state = state.started(now_ns, retry=retry).failed(now_ns + 10 * S, "no standby")
        due = made.due(state, now_ns + 10 * S)
        assert due is not None
        pauses.append((due.at_ns - now_ns) // S - 10)
        now_ns = due.at_ns
    assert pauses[:3] == [300, 600, 1200] and now_ns == ns("2026-03-29T02:00")
    assert due is not None and not due.retry and state.failures == 4
    # Each time that is due has its own retries.
    state = state.started(now_ns).failed(now_ns, "no standby")
    due = made.due(state, now_ns)
    assert due is not None and due.retry and due.at_ns == now_ns + 300 * S
    assert state.started(due.at_ns, retry=True).succeeded(due.at_ns, "b2").failures == 0


def test_a_clock_that_goes_back_does_not_put_off_the_next_attempt() -> None:
    made = schedule()
    state = ScheduleState(START).started(START + 5 * DAY).failed(START + 5 * DAY, "no standby")
    due = made.due(state, START)
    assert due is not None and due.retry and due.at_ns == START + 300 * S


def test_a_paused_schedule_is_never_due_and_makes_up_for_nothing_when_resumed() -> None:
    made = schedule()
    state = ScheduleState(START).paused_now()
    assert made.due(state, START + 100 * DAY) is None
    resumed = state.resumed(START + 100 * DAY)
    assert due_ns(made, resumed, START + 100 * DAY) == ns("2026-07-06T02:00")


@pytest.mark.parametrize("seed", range(20))
def test_under_any_clock_every_time_is_handled_once_and_none_is_forgotten(seed: int) -> None:
    """A model of true time beside a clock that jumps, a node that sleeps, and runs that fail or crash."""
    source = random.Random(seed)
    when = source.choice(["hourly", "02:00", "*:0/20", "02:30 Europe/Berlin", "Mon..Fri 01:00 America/New_York"])
    made = schedule(when, jitter_s=source.choice([0.0, 600.0]), retries=source.choice([0, 2]))
    expression = parse(when)
    clock_ns = START
    state = ScheduleState(clock_ns)
    regular_runs: list[int] = []
    jumped_at = -1
    for _ in range(250):
        event = source.random()
        if event < 0.02:
            clock_ns -= source.choice([10 * S, 1800 * S, 40 * DAY])
            jumped_at = len(regular_runs)
        elif event < 0.06:
            clock_ns += source.choice([2 * HOUR, 3 * DAY])  # nothing ran, or the clock jumped
        due = made.due(state, clock_ns)
        assert due is not None
        # However the clock jumped, the next run is no further away than a schedule that begins now, and the tolerance.
        fresh = due_ns(made, ScheduleState(clock_ns + int(CLOCK_STEP_S * 1e9)), clock_ns)
        assert due.at_ns <= fresh + 600 * S
        clock_ns = max(clock_ns, due.at_ns) + source.randrange(5 * S)
        if not due.retry:
            passed = expression.next_after(datetime.fromtimestamp((regular_runs or [START])[-1] / S, UTC))
            if regular_runs and jumped_at < len(regular_runs):
                assert passed is not None and passed.timestamp() * S <= clock_ns, "it ran twice for one time"
            regular_runs.append(clock_ns)
        state = state.started(clock_ns, retry=due.retry)
        clock_ns += source.randrange(1, 600) * S
        state = state.failed(clock_ns, "x") if source.random() < 0.3 else state.succeeded(clock_ns, "b")
    assert len(regular_runs) > 60


@pytest.mark.parametrize(
    ("volume", "when", "options"),
    [
        ("a/b", "daily", {}),
        ("vol1", "sometimes", {}),
        ("vol1", "daily", {"name": "../x"}),
        ("vol1", "daily", {"jitter_s": -1.0}),
        ("vol1", "daily", {"retries": -1}),
        ("vol1", "daily", {"retries": 1000}),
        ("vol1", "daily", {"hook_timeout_s": 0.0}),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(volume: str, when: str, options: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        ScheduleConfig(volume, when, **options)  # type: ignore[arg-type]
