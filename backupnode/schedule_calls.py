"""The calls of BackupService that speak of schedules."""

from __future__ import annotations

from stillpoint.wire.status import Context, answers
from stillpoint.wire.v1 import backup_pb2, common_pb2

from .jobs import Jobs
from .messages import backup_message, progress_message, schedule_message
from .progress import Progress
from .scheduler import Scheduler


class ScheduleCalls:
    """A part of BackupService, which sets the attributes."""

    scheduler: Scheduler
    _jobs: Jobs

    @answers
    async def ListSchedules(self, _request: common_pb2.Empty, _: Context) -> backup_pb2.ScheduleList:
        return backup_pb2.ScheduleList(schedules=[schedule_message(each) for each in self.scheduler.statuses()])

    @answers
    async def RunSchedule(self, request: backup_pb2.ScheduleName, context: Context) -> None:
        async def send(progress: Progress) -> None:
            await context.write(backup_pb2.BackupEvent(progress=progress_message(progress)))

        record = await self._jobs.run(lambda report: self.scheduler.run_now(request.name, report), send)
        await context.write(backup_pb2.BackupEvent(backup=backup_message(record)))

    @answers
    async def PauseSchedule(self, request: backup_pb2.PauseScheduleRequest, _: Context) -> backup_pb2.Schedule:
        return schedule_message(self.scheduler.pause(request.name, request.paused))
