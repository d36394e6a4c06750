"""What a schedule does next: a pure decision from its state and the time, which may jump.

Invariants (`tests/unit/backupnode/test_schedule.py` holds them against random clocks):
- A time that is due leads to one run, begun at that time or later by the schedule's jitter, which is the same whenever
  it is asked for. Times that passed while nothing ran lead to one run together.
- A clock that goes back by less than `CLOCK_STEP_S` causes no second run; one that goes back further, as when it was
  wrong by years, does not keep the schedule silent until it has caught up.
- A run that failed, or was interrupted, is tried again after growing pauses, `retries` times; the next time that is due
  does not wait for that.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from stillpoint.config import check_name
from stillpoint.errors import ConfigError

from .calendar_expression import CalendarExpression, parse

CLOCK_STEP_S: Final = 3600.0
_RETRY_FIRST_S: Final = 300.0
_RETRY_MAX_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """Backups of a volume at certain times.

    when: see `calendar_expression.py`. name: of the schedule; the volume's if left out. jitter_s: begin by up to so
    much later. full: read everything each time. retries: of a run that failed.
    restore_test: put each backup to the test; one that fails is a warning.
    before, after: commands with their arguments, killed after hook_timeout_s. If `before` fails there is no backup;
    `after` runs in any case.
    """

    volume: str
    when: str
    name: str = ""
    jitter_s: float = 0.0
    full: bool = False
    restore_test: bool = False
    retries: int = 3
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    hook_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        check_name(self.volume, "volume")
        check_name(self.label, "schedule")
        parse(self.when)
        if self.jitter_s < 0 or self.hook_timeout_s <= 0 or not 0 <= self.retries <= 100:
            raise ConfigError(
                f"schedule {self.label}: jitter_s and hook_timeout_s must not be negative, and retries at most 100"
            )

    @property
    def label(self) -> str:
        return self.name or self.volume


@dataclass(frozen=True, slots=True)
class ScheduleState:
    """What outlives a restart. Times are nanoseconds since the Unix epoch; 0: never.

    handled_ns: times up to this need no run any more. running: begun, and not ended that anybody knows of.
    failures: in a row. retries: since the last time that was due.
    """

    handled_ns: int
    paused: bool = False
    running: bool = False
    failures: int = 0
    retries: int = 0
    started_ns: int = 0
    finished_ns: int = 0
    success_ns: int = 0
    backup: str = ""
    error: str = ""

    def started(self, now_ns: int, *, retry: bool = False) -> ScheduleState:
        retries = self.retries + 1 if retry else 0
        return replace(self, handled_ns=now_ns, started_ns=now_ns, running=True, retries=retries)

    def succeeded(self, now_ns: int, backup: str) -> ScheduleState:
        return replace(self, running=False, failures=0, finished_ns=now_ns, success_ns=now_ns, backup=backup, error="")

    def failed(self, now_ns: int, error: str) -> ScheduleState:
        return replace(self, running=False, failures=self.failures + 1, finished_ns=now_ns, error=error)

    def paused_now(self) -> ScheduleState:
        return replace(self, paused=True)

    def resumed(self, now_ns: int) -> ScheduleState:
        """What was due during the pause is not made up for."""
        return replace(self, paused=False, handled_ns=now_ns, failures=0)


class Due(NamedTuple):
    at_ns: int
    retry: bool  # of a run that failed


class Schedule:
    """One of the configuration, ready to be asked."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self._expression: CalendarExpression = parse(config.when)

    @property
    def label(self) -> str:
        return self.config.label

    def due(self, state: ScheduleState, now_ns: int) -> Due | None:
        """When the next run begins; in the past if it is overdue. None: never, or while it is paused."""
        if state.paused:
            return None
        regular = self._regular_ns(state, now_ns)
        retry = self._retry_ns(state, now_ns)
        if retry is not None and (regular is None or retry < regular):
            return Due(retry, retry=True)
        return None if regular is None else Due(regular, retry=False)

    def _regular_ns(self, state: ScheduleState, now_ns: int) -> int | None:
        handled_ns = state.handled_ns
        if handled_ns - now_ns > CLOCK_STEP_S * 1e9:
            handled_ns = now_ns
        due = self._expression.next_after(_datetime(handled_ns))
        if due is None:
            return None
        due_ns = _nanoseconds(due)
        return due_ns + self._jitter_ns(due_ns)

    def _retry_ns(self, state: ScheduleState, now_ns: int) -> int | None:
        if not state.failures or state.retries >= self.config.retries:
            return None
        pause_s = min(_RETRY_MAX_S, _RETRY_FIRST_S * 2.0**state.retries)
        # A clock that went back does not make the pause longer.
        return min(state.finished_ns, now_ns) + int(pause_s * 1e9)

    def _jitter_ns(self, due_ns: int) -> int:
        """Of each time its own, and the same after a restart."""
        digest = hashlib.sha256(f"{self.label}\n{self.config.volume}\n{due_ns}".encode()).digest()
        return int(int.from_bytes(digest[:8], "big") / 2**64 * self.config.jitter_s * 1e9)


def _datetime(ns: int) -> datetime:
    seconds, rest = divmod(ns, 1_000_000_000)
    # Rounded up, so that a time that was handled is not due again.
    return datetime.fromtimestamp(seconds, UTC) + timedelta(microseconds=-(-rest // 1000))


def _nanoseconds(instant: datetime) -> int:
    return int(instant.timestamp()) * 1_000_000_000
