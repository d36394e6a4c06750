"""Runs the configured schedules: hooks, backup, notification. What to do when is decided in `schedule.py`.

Invariants:
- One run of a schedule at a time, and none of a volume that is being backed up for another reason: it waits.
- The state is durable before a run begins and after it ends (`schedule_store.py`).
- Nothing a run meets ends the scheduler: it is noted, told, and tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from stillpoint.errors import NotFound, Refused, StillpointError

from .hooks import HookFailed, run_hook
from .notify import Notice, Notifier
from .progress import Progress, Report
from .repository import BackupId, BackupRecord
from .restore_test import RestoreTestResult
from .schedule import Due, Schedule, ScheduleConfig, ScheduleState
from .schedule_store import ScheduleStore

logger = logging.getLogger(__name__)

# A clock that jumps is noticed after so long.
_LOOK_S: Final = 30.0
# While a backup of the volume runs that somebody else began.
_BUSY_S: Final = 2.0


class RunBackup(Protocol):
    async def __call__(self, volume: str, *, full: bool, report: Report) -> BackupRecord: ...


@dataclass(frozen=True, slots=True)
class ScheduleStatus:
    config: ScheduleConfig
    state: ScheduleState
    due: Due | None


class Scheduler:
    """`run` until cancelled. `busy`: whether a backup of the volume runs."""

    def __init__(
        self,
        configs: Sequence[ScheduleConfig],
        path: Path,
        back_up: RunBackup,
        test: Callable[[BackupId], Awaitable[RestoreTestResult]],
        busy: Callable[[str], bool],
        notifier: Notifier,
        *,
        node: str,
        clock: Callable[[], int] = time.time_ns,
        look_s: float = _LOOK_S,
    ) -> None:
        self._schedules = {config.label: Schedule(config) for config in configs}
        self._store = ScheduleStore(path, self._schedules, now_ns=clock())
        self._back_up = back_up
        self._test = test
        self._busy = busy
        self._notifier = notifier
        self._node = node
        self._clock = clock
        self._look_s = look_s
        self._locks = {label: asyncio.Lock() for label in self._schedules}
        self._changed = {label: asyncio.Event() for label in self._schedules}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for schedule in self._schedules.values():
                group.create_task(self._keep(schedule))

    def statuses(self) -> Sequence[ScheduleStatus]:
        return [self.status(label) for label in self._schedules]

    def status(self, label: str) -> ScheduleStatus:
        """Raises NotFound."""
        schedule = self._named(label)
        state = self._store.get(label)
        return ScheduleStatus(schedule.config, state, schedule.due(state, self._clock()))

    def pause(self, label: str, paused: bool) -> ScheduleStatus:
        """Durable on return. A run that goes on is not ended. Raises NotFound, DeviceError."""
        self._named(label)
        state = self._store.get(label)
        if state.paused != paused:
            self._store.put(label, state.paused_now() if paused else state.resumed(self._clock()))
            self._changed[label].set()
        return self.status(label)

    async def run_now(self, label: str, report: Report) -> BackupRecord:
        """One run out of turn, paused or not. Raises NotFound, Refused while it runs, and what the run raises."""
        schedule = self._named(label)
        if self._locks[label].locked():
            raise Refused(f"schedule {label} is running; wait for it")
        if self._busy(schedule.config.volume):
            raise Refused(f"a backup of volume {schedule.config.volume} is running; wait for it")
        async with self._locks[label]:
            return await self._run(schedule, report)

    def _named(self, label: str) -> Schedule:
        try:
            return self._schedules[label]
        except KeyError:
            raise NotFound(f"there is no schedule {label}; the backup node's configuration has them") from None

    async def _keep(self, schedule: Schedule) -> None:
        while True:
            try:
                await self._step(schedule)
            except StillpointError:
                continue  # noted and told
            except Exception:  # a fault of ours must not silence this schedule, nor the others
                logger.exception("schedule %s met an unexpected error", schedule.label)
                await asyncio.sleep(self._look_s)

    async def _step(self, schedule: Schedule) -> None:
        """One run if it is due, or a wait."""
        label = schedule.label
        self._changed[label].clear()
        now_ns = self._clock()
        due = schedule.due(self._store.get(label), now_ns)
        if due is None or due.at_ns > now_ns:
            wait_s = self._look_s if due is None else min(self._look_s, (due.at_ns - now_ns) / 1e9)
            await self._wait(label, wait_s)
        elif self._busy(schedule.config.volume) or self._locks[label].locked():
            await asyncio.sleep(min(_BUSY_S, self._look_s))
        else:
            async with self._locks[label]:
                await self._run(schedule, _ignore, retry=due.retry)

    async def _wait(self, label: str, wait_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._changed[label].wait()

    async def _run(self, schedule: Schedule, report: Report, *, retry: bool = False) -> BackupRecord:
        label = schedule.label
        started_ns = self._clock()
        self._note(label, self._store.get(label).started(started_ns, retry=retry))
        warnings: list[str] = []
        try:
            record = await self._guarded(schedule.config, report, warnings)
        except StillpointError as error:
            logger.error("the scheduled backup of %s failed: %s", schedule.config.volume, error)
            self._note(label, self._store.get(label).failed(self._clock(), str(error)))
            await self._tell(schedule, started_ns, warnings, error=str(error))
            raise
        except asyncio.CancelledError:
            self._note(label, self._store.get(label).failed(self._clock(), "it was cancelled"))
            raise
        if record.alarm:
            warnings.append(record.alarm)
        # First, because the backup is there, whatever becomes of the test.
        self._note(label, self._store.get(label).succeeded(self._clock(), record.id))
        if schedule.config.restore_test:
            warnings += await self._tested(record)
        await self._tell(schedule, started_ns, warnings, backup=record.id)
        return record

    async def _tested(self, record: BackupRecord) -> Sequence[str]:
        """What is wrong with it. The backup stays: its data may still be wanted."""
        try:
            result = await self._test(record.id)
        except StillpointError as error:
            return [f"the restore test could not be run: {error}"]
        return [] if result.passed else [f"the restore test failed: {result.detail}"]

    async def _guarded(self, config: ScheduleConfig, report: Report, warnings: list[str]) -> BackupRecord:
        try:
            return await self._back_up_between_hooks(config, report, warnings)
        except StillpointError:
            raise
        except Exception as error:  # the edge where every error becomes a failed run: the schedule must go on
            logger.exception("the scheduled backup of %s met an unexpected error", config.volume)
            raise StillpointError(f"internal error ({type(error).__name__}); see the node's log") from error

    async def _back_up_between_hooks(self, config: ScheduleConfig, report: Report, warnings: list[str]) -> BackupRecord:
        """`after` is run whatever happened, and told of it; its own failure is a warning."""
        environment = {"STILLPOINT_SCHEDULE": config.label, "STILLPOINT_VOLUME": config.volume}
        result = {"STILLPOINT_RESULT": "failure", "STILLPOINT_BACKUP": "", "STILLPOINT_ERROR": "it was cancelled"}
        try:
            await self._hook(config, config.before, environment)
            record = await self._back_up(config.volume, full=config.full, report=report)
            result = {"STILLPOINT_RESULT": "success", "STILLPOINT_BACKUP": record.id, "STILLPOINT_ERROR": ""}
        except StillpointError as error:
            result["STILLPOINT_ERROR"] = str(error)
            raise
        finally:
            # Also when it is cancelled, so that a stop of the node does not keep a database frozen.
            warnings += await self._after(config, environment | result)
        return record

    async def _after(self, config: ScheduleConfig, environment: Mapping[str, str]) -> list[str]:
        try:
            await self._hook(config, config.after, environment)
        except HookFailed as error:
            logger.warning("after the backup of %s: %s", config.volume, error)
            return [str(error)]
        return []

    async def _hook(self, config: ScheduleConfig, command: Sequence[str], environment: Mapping[str, str]) -> None:
        if command:
            await run_hook(command, environment=environment, timeout_s=config.hook_timeout_s)

    async def _tell(
        self, schedule: Schedule, started_ns: int, warnings: Sequence[str], *, backup: str = "", error: str = ""
    ) -> None:
        notice = Notice(
            node=self._node,
            schedule=schedule.label,
            volume=schedule.config.volume,
            succeeded=not error,
            started_ns=started_ns,
            finished_ns=self._clock(),
            backup=backup,
            error=error,
            warnings=tuple(warnings),
            failures=self._store.get(schedule.label).failures,
        )
        await self._notifier.tell(notice)

    def _note(self, label: str, state: ScheduleState) -> None:
        try:
            self._store.put(label, state)
        except StillpointError as error:
            # A backup more or less after the next restart is better than none now.
            logger.error("the state of schedule %s cannot be kept: %s", label, error)


def _ignore(_: Progress) -> None:
    pass
