"""standbyctl backup schedule: the backups that the backup node makes by itself."""

from __future__ import annotations

from typing import Any

import click

from ..wire.v1 import backup_pb2, common_pb2
from .backup_calls import backup_document, follow_backup
from .command import Group, Invocation, asynchronous, pass_invocation
from .output import format_age, format_in, iso_time


def _document(schedule: backup_pb2.Schedule) -> dict[str, Any]:
    return {
        "name": schedule.name,
        "volume": schedule.volume,
        "when": schedule.when,
        "full": schedule.full,
        "paused": schedule.paused,
        "running": schedule.running,
        "next": iso_time(schedule.due_ns),
        "next_is_retry": schedule.due_is_retry,
        "failures": schedule.failures,
        "last_started": iso_time(schedule.started_ns),
        "last_finished": iso_time(schedule.finished_ns),
        "last_success": iso_time(schedule.success_ns),
        "last_backup": schedule.backup or None,
        "last_error": schedule.error or None,
    }


@click.group(cls=Group)
def schedule() -> None:
    """Backups at certain times, as configured on the backup node."""


@schedule.command("list")
@pass_invocation
@asynchronous
async def list_(invocation: Invocation) -> None:
    """List the schedules: when each runs next, and how it went.

    \b
    Example: standbyctl backup schedule list
    """
    async with invocation.nodes() as nodes:
        answer = await nodes.backup.call("ListSchedules", common_pb2.Empty(), backup_pb2.ScheduleList)
    output = invocation.output
    if output.as_json:
        output.document([_document(each) for each in answer.schedules])
        return
    output.table(
        ("SCHEDULE", "VOLUME", "WHEN", "NEXT>", "SUCCESS>", "STATE"),
        [
            (each.name, each.volume, each.when, format_in(each.due_ns), format_age(each.success_ns), _state(each))
            for each in answer.schedules
        ],
        empty="no schedules; `schedules` in the backup node's configuration makes them",
    )
    for each in answer.schedules:
        if each.error:
            output.alarm(f"{each.name}: {each.error}")


def _state(schedule: backup_pb2.Schedule) -> str:
    if schedule.running:
        return "running"
    if schedule.paused:
        return "paused"
    return "FAILED" if schedule.failures else "waiting"


@schedule.command()
@click.argument("name")
@pass_invocation
@asynchronous
async def run(invocation: Invocation, name: str) -> None:
    """Run a schedule now, with its hooks and notifications.

    \b
    Example: standbyctl backup schedule run vol1
    """
    async with invocation.nodes() as nodes:
        with invocation.output.progress(f"running {name}") as bar:
            made = await follow_backup(nodes, "RunSchedule", backup_pb2.ScheduleName(name=name), name, bar)
    if invocation.output.as_json:
        invocation.output.document(backup_document(made))
    else:
        invocation.output.line(f"backup {made.id} of {made.volume}")


@schedule.command()
@click.argument("name")
@pass_invocation
@asynchronous
async def pause(invocation: Invocation, name: str) -> None:
    """Let a schedule rest until it is resumed.

    \b
    Example: standbyctl backup schedule pause vol1
    """
    await _pause(invocation, name, paused=True)


@schedule.command()
@click.argument("name")
@pass_invocation
@asynchronous
async def resume(invocation: Invocation, name: str) -> None:
    """Let a schedule go on. What was due meanwhile is not made up for.

    \b
    Example: standbyctl backup schedule resume vol1
    """
    await _pause(invocation, name, paused=False)


async def _pause(invocation: Invocation, name: str, *, paused: bool) -> None:
    request = backup_pb2.PauseScheduleRequest(name=name, paused=paused)
    async with invocation.nodes() as nodes:
        changed = await nodes.backup.call("PauseSchedule", request, backup_pb2.Schedule)
    if invocation.output.as_json:
        invocation.output.document(_document(changed))
    elif changed.paused:
        invocation.output.line(f"schedule {name} is paused")
    else:
        invocation.output.line(f"schedule {name}: next in {format_in(changed.due_ns)}")
