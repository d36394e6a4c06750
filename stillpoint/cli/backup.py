"""standbyctl backup: what the backup node keeps of a volume, independent of both other nodes."""

from __future__ import annotations

import click

from ..config import format_size
from ..wire.v1 import backup_pb2, common_pb2
from .backup_calls import backup_document, get_backup, list_backups, ratio, run_backup
from .backup_restore import extract, restore
from .backup_schedule import schedule
from .backup_upkeep import check, gc, prune, verify
from .command import Group, Invocation, asynchronous, confirm, pass_invocation, yes_option
from .output import format_age, format_rate, format_seconds, iso_time, plural

# Unique and shared bytes are counted over the indices of all backups.
_USAGE_TIMEOUT_S = 600.0


@click.group(cls=Group)
def backup() -> None:
    """Backups of volumes.

    They are pulled from a snapshot on the standby, never from the primary, and the backup node keeps them.
    """


for command in (restore, extract, verify, check, prune, gc, schedule):
    backup.add_command(command)


@backup.command()
@click.argument("volume")
@click.option("--full", is_flag=True, help="Read everything, not only what changed since the last backup.")
@click.option("--snapshot", metavar="NAME", help="Back up this snapshot. [default: one is taken and deleted after]")
@pass_invocation
@asynchronous
async def run(invocation: Invocation, volume: str, full: bool, snapshot: str | None) -> None:
    """Back up a volume.

    \b
    Example: standbyctl backup run vol1
             standbyctl backup run vol1 --snapshot before-upgrade
    """
    name = (snapshot or "").removeprefix(f"{volume}@")
    async with invocation.nodes() as nodes:
        with invocation.output.progress(f"backing up {volume}") as bar:
            made = await run_backup(nodes, volume, snapshot=name, full=full, bar=bar)
    if invocation.output.as_json:
        invocation.output.document(backup_document(made))
        return
    seconds = made.duration_ns / 1e9
    invocation.output.line(
        f"backup {made.id}: {format_size(made.data_bytes)} of data in {format_seconds(seconds)} "
        f"({format_rate(made.data_bytes, seconds)}), {format_size(made.stored_bytes)} stored"
    )
    if made.alarm:
        invocation.output.alarm(made.alarm)


@backup.command("list")
@click.argument("volume", required=False)
@pass_invocation
@asynchronous
async def list_(invocation: Invocation, volume: str | None) -> None:
    """List the backups, of one volume or of all, the newest last.

    RATIO is data in a backup for each byte that it added to the repository;
    VERIFIED is how long ago all of it was last read back and found right;
    FAILED is one whose last restore test failed.

    \b
    Example: standbyctl backup list vol1
    """
    async with invocation.nodes() as nodes:
        listing = await list_backups(nodes, volume or "")
    if invocation.output.as_json:
        damaged = [{"id": each, "state": "damaged"} for each in listing.damaged]
        invocation.output.document([*(backup_document(each) for each in listing.backups), *damaged])
        return
    invocation.output.table(
        ("BACKUP", "DATA>", "STORED>", "RATIO>", "AGE>", "VERIFIED>", "STATE"),
        [*(_row(each) for each in listing.backups), *((each, *[""] * 5, "DAMAGED") for each in listing.damaged)],
        empty="no backups; make one with `standbyctl backup run VOLUME`",
    )
    if listing.backups and not volume:
        data_bytes = sum(each.data_bytes for each in listing.backups)
        times = ratio(data_bytes, listing.repository_bytes)
        invocation.output.line(
            f"{plural(len(listing.backups), 'backup')}, {format_size(data_bytes)} of data in"
            f" {format_size(listing.repository_bytes)}: {times} times"
        )


def _test_state(backup: backup_pb2.Backup) -> str:
    if not backup.tested_ns:
        return "never"
    return f"{format_age(backup.tested_ns)} ago, {'FAILED: ' + backup.test_error if backup.test_error else 'passed'}"


def _state(backup: backup_pb2.Backup) -> str:
    if backup.test_error:
        return "FAILED"
    return "ALARM" if backup.alarm else "protected" if backup.protected else "complete"


def _row(backup: backup_pb2.Backup) -> tuple[str, ...]:
    times = ratio(backup.data_bytes, backup.stored_bytes)
    return (
        backup.id,
        format_size(backup.data_bytes),
        format_size(backup.stored_bytes),
        "" if times is None else f"{times:.1f}" if times < 1000 else f"{times:.0f}",
        format_age(backup.snapshot_ns),
        format_age(backup.verified_ns),
        _state(backup),
    )


@backup.command()
@click.argument("backup_id", metavar="BACKUP")
@pass_invocation
@asynchronous
async def show(invocation: Invocation, backup_id: str) -> None:
    """Show one backup, and what deleting it would give back.

    \b
    Example: standbyctl backup show ID
    """
    async with invocation.nodes() as nodes:
        shown = await get_backup(nodes, backup_id)
        usage = await nodes.backup.call(
            "GetUsage", backup_pb2.BackupId(id=backup_id), backup_pb2.BackupUsage, timeout_s=_USAGE_TIMEOUT_S
        )
        uri = nodes.cluster.nbd_uri(nodes.cluster.backup.nbd, f"{shown.volume}@{shown.id}")
    shared_bytes = usage.referenced_bytes - usage.unique_bytes
    if invocation.output.as_json:
        account = {"unique_bytes": usage.unique_bytes, "shared_bytes": shared_bytes, "uri": uri}
        invocation.output.document(backup_document(shown) | account)
        return
    seconds = shown.duration_ns / 1e9
    invocation.output.properties(
        [
            ("backup", shown.id),
            ("volume", f"{shown.volume} ({shown.volume_uuid})"),
            ("snapshot", shown.snapshot),
            ("instant", f"{iso_time(shown.snapshot_ns)} ({format_age(shown.snapshot_ns)} ago)"),
            ("size", f"{format_size(shown.size)} ({shown.size} bytes)"),
            ("data", format_size(shown.data_bytes)),
            ("stored", f"{format_size(shown.stored_bytes)} when it was made"),
            ("unique", f"{format_size(usage.unique_bytes)}: what deleting it gives back"),
            ("shared", f"{format_size(shared_bytes)} with other backups"),
            ("received", format_size(shown.received_bytes)),
            ("took", f"{format_seconds(seconds)}, {format_rate(shown.received_bytes, seconds)}"),
            ("base", shown.base or "none: a full backup"),
            ("verified", f"{format_age(shown.verified_ns)} ago" if shown.verified_ns else "never"),
            ("tested", _test_state(shown)),
            ("protected", "yes" if shown.protected else "no"),
            ("address", uri),
        ]
    )
    if shown.alarm:
        invocation.output.alarm(shown.alarm)


@backup.command()
@click.argument("backup_id", metavar="BACKUP")
@pass_invocation
@asynchronous
async def protect(invocation: Invocation, backup_id: str) -> None:
    """Keep a backup from `delete` and from every policy.

    \b
    Example: standbyctl backup protect ID
    """
    await _protect(invocation, backup_id, protected=True)


@backup.command()
@click.argument("backup_id", metavar="BACKUP")
@pass_invocation
@asynchronous
async def unprotect(invocation: Invocation, backup_id: str) -> None:
    """Take a backup's protection away.

    \b
    Example: standbyctl backup unprotect ID
    """
    await _protect(invocation, backup_id, protected=False)


async def _protect(invocation: Invocation, backup_id: str, *, protected: bool) -> None:
    request = backup_pb2.ProtectBackupRequest(id=backup_id, protected=protected)
    async with invocation.nodes() as nodes:
        changed = await nodes.backup.call("ProtectBackup", request, backup_pb2.Backup)
    if invocation.output.as_json:
        invocation.output.document(backup_document(changed))
    else:
        invocation.output.line(
            f"backup {backup_id} is {'protected' if changed.protected else 'not protected any more'}"
        )


@backup.command()
@click.argument("backup_id", metavar="BACKUP")
@click.option("--writable", is_flag=True, help="Accept writes, into an overlay beside the backup.")
@click.option("--discard", is_flag=True, help="Throw away what was written, and serve it read-only again.")
@pass_invocation
@asynchronous
async def export(invocation: Invocation, backup_id: str, writable: bool, discard: bool) -> None:
    """Say where a backup is served over NBD; it always is.

    What is written to a writable one outlives restarts of the node, and goes
    with --discard or with the backup. The backup itself never changes.

    \b
    Example: standbyctl backup export ID --writable
    """
    if writable and discard:
        raise click.UsageError("choose one of --writable and --discard")
    request = backup_pb2.ExportBackupRequest(id=backup_id, writable=writable, discard=discard)
    async with invocation.nodes() as nodes:
        served = await nodes.backup.call("ExportBackup", request, backup_pb2.BackupExport)
        uri = nodes.cluster.nbd_uri(nodes.cluster.backup.nbd, served.name)
    if invocation.output.as_json:
        invocation.output.document({"id": backup_id, "uri": uri, "writable": served.writable})
    else:
        invocation.output.line(f"{uri} ({'writable' if served.writable else 'read-only'})")


@backup.command()
@click.argument("backup_id", metavar="BACKUP")
@yes_option
@pass_invocation
@asynchronous
async def delete(invocation: Invocation, backup_id: str, yes: bool) -> None:
    """Delete a backup. Others stay complete.

    Refused for a protected one, and when its volume would have fewer than
    retention.minimum of the node's configuration.

    \b
    Example: standbyctl backup delete ID
    """
    confirm(f"Delete the backup {backup_id}?", yes=yes)
    async with invocation.nodes() as nodes:
        await nodes.backup.call("DeleteBackup", backup_pb2.BackupId(id=backup_id), common_pb2.Empty)
    if invocation.output.as_json:
        invocation.output.document({"deleted": backup_id})
    else:
        invocation.output.line(f"backup {backup_id} deleted")
