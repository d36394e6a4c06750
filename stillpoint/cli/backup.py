"""standbyctl backup: what the backup node keeps of a volume, independent of both other nodes."""

from __future__ import annotations

from typing import Any

import click

from ..config import format_size
from ..errors import ProtocolError
from ..wire.v1 import backup_pb2, common_pb2
from .command import Group, Invocation, asynchronous, confirm, pass_invocation, yes_option
from .nodes import Nodes
from .output import Output, ProgressBar, format_age, format_rate, format_seconds, iso_time
from .restore import restore_here


def backup_document(backup: backup_pb2.Backup) -> dict[str, Any]:
    return {
        "id": backup.id,
        "volume": backup.volume,
        "volume_uuid": backup.volume_uuid,
        "snapshot": backup.snapshot,
        "size": backup.size,
        "instant": iso_time(backup.snapshot_ns),
        "finished": iso_time(backup.finished_ns),
        "data_bytes": backup.data_bytes,
        "stored_bytes": backup.stored_bytes,
        "received_bytes": backup.received_bytes,
        "duration_s": backup.duration_ns / 1e9,
        "base": backup.base or None,
        "verified": iso_time(backup.verified_ns),
    }


async def run_backup(
    nodes: Nodes, volume: str, *, snapshot: str = "", full: bool = False, bar: ProgressBar
) -> backup_pb2.Backup:
    """Raises ProtocolError when the stream ends without the backup."""
    request = backup_pb2.RunBackupRequest(volume=volume, snapshot=snapshot, full=full)
    made: backup_pb2.Backup | None = None
    async for event in nodes.backup.stream("RunBackup", request, backup_pb2.BackupEvent):
        if event.HasField("progress"):
            bar.update(event.progress.done_bytes, event.progress.total_bytes)
        if event.HasField("backup"):
            made = event.backup
    if made is None:
        raise ProtocolError(f"{volume}: the backup node ended without saying what became of the backup")
    return made


async def list_backups(nodes: Nodes, volume: str = "") -> list[backup_pb2.Backup]:
    request = backup_pb2.ListBackupsRequest(volume=volume)
    answer = await nodes.backup.call("ListBackups", request, backup_pb2.BackupList)
    return sorted(answer.backups, key=lambda backup: backup.finished_ns)


async def get_backup(nodes: Nodes, identity: str) -> backup_pb2.Backup:
    return await nodes.backup.call("GetBackup", backup_pb2.BackupId(id=identity), backup_pb2.Backup)


async def verify_backup(nodes: Nodes, identity: str, *, bar: ProgressBar) -> int:
    """Bytes read back. Raises DataCorrupt when a checksum does not match."""
    return await _follow(nodes, "VerifyBackup", backup_pb2.BackupId(id=identity), bar)


async def _follow(nodes: Nodes, method: str, request: Any, bar: ProgressBar) -> int:
    """Bytes moved by a job that reports its progress. Raises ProtocolError when it ends without being done."""
    last = common_pb2.Progress()
    async for last in nodes.backup.stream(method, request, common_pb2.Progress):
        bar.update(last.done_bytes, last.total_bytes)
    if not last.done:
        raise ProtocolError(f"backup {request.id}: the backup node ended in the middle of it")
    return last.moved_bytes


@click.group(cls=Group)
def backup() -> None:
    """Backups of volumes.

    They are pulled from a snapshot on the standby, never from the primary, and the backup node keeps them.
    """


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


@backup.command("list")
@click.argument("volume", required=False)
@pass_invocation
@asynchronous
async def list_(invocation: Invocation, volume: str | None) -> None:
    """List the backups, of one volume or of all, the newest last.

    \b
    Example: standbyctl backup list vol1
    """
    async with invocation.nodes() as nodes:
        backups = await list_backups(nodes, volume or "")
    if invocation.output.as_json:
        invocation.output.document([backup_document(each) for each in backups])
        return
    invocation.output.table(
        ("BACKUP", "VOLUME", "SIZE>", "DATA>", "STORED>", "AGE>", "VERIFIED>"),
        [
            (
                each.id,
                each.volume,
                format_size(each.size),
                format_size(each.data_bytes),
                format_size(each.stored_bytes),
                format_age(each.snapshot_ns),
                format_age(each.verified_ns),
            )
            for each in backups
        ],
        empty="no backups; make one with `standbyctl backup run VOLUME`",
    )


@backup.command()
@click.argument("backup_id", metavar="BACKUP")
@pass_invocation
@asynchronous
async def show(invocation: Invocation, backup_id: str) -> None:
    """Show one backup.

    \b
    Example: standbyctl backup show ID
    """
    async with invocation.nodes() as nodes:
        shown = await get_backup(nodes, backup_id)
        uri = f"nbd://{nodes.cluster.backup.nbd}/{shown.volume}@{shown.id}"
    if invocation.output.as_json:
        invocation.output.document(backup_document(shown))
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
            ("stored", format_size(shown.stored_bytes)),
            ("received", format_size(shown.received_bytes)),
            ("took", f"{format_seconds(seconds)}, {format_rate(shown.received_bytes, seconds)}"),
            ("base", shown.base or "none: a full backup"),
            ("verified", f"{format_age(shown.verified_ns)} ago" if shown.verified_ns else "never"),
            ("address", uri),
        ]
    )


@backup.command()
@click.argument("backup_id", metavar="BACKUP", required=False)
@pass_invocation
@asynchronous
async def verify(invocation: Invocation, backup_id: str | None) -> None:
    """Read a backup back, or all of them, and compare every checksum.

    \b
    Example: standbyctl backup verify ID
    """
    output = invocation.output
    async with invocation.nodes() as nodes:
        wanted = [backup_id] if backup_id else [each.id for each in await list_backups(nodes)]
        results = []
        for each in wanted:
            with output.progress(f"verifying {each}") as bar:
                results.append({"id": each, "read_bytes": await verify_backup(nodes, each, bar=bar), "ok": True})
    if output.as_json:
        output.document(results[0] if backup_id else {"verified": results})
        return
    for result in results:
        output.line(f"backup {result['id']}: every checksum matches")
    if not results:
        output.line("no backups to verify")


@backup.command()
@click.argument("backup_id", metavar="BACKUP")
@click.argument("target")
@click.option("--force", is_flag=True, help="Overwrite a file that exists, or a device that is not empty.")
@click.option("--on-node", is_flag=True, help="TARGET is as the backup node sees it, and the node writes it itself.")
@pass_invocation
@asynchronous
async def restore(invocation: Invocation, backup_id: str, target: str, force: bool, on_node: bool) -> None:
    """Write a backup to TARGET: a file, a block device or an nbd:// URI.

    \b
    Example: standbyctl backup restore ID out.img
             standbyctl backup restore ID nbd://127.0.0.1:10809/vol1 --force
    """
    output = invocation.output
    async with invocation.nodes() as nodes:
        shown = await get_backup(nodes, backup_id)
        with output.progress(f"restoring {backup_id}", shown.size) as bar:
            if on_node:
                request = backup_pb2.RestoreBackupRequest(id=backup_id, target=target, force=force)
                written = await _follow(nodes, "RestoreBackup", request, bar)
            else:
                written = await restore_here(nodes, shown, target, force=force, bar=bar)
    _report_restore(output, shown, target, written)


def _report_restore(output: Output, backup: backup_pb2.Backup, target: str, written_bytes: int) -> None:
    if output.as_json:
        output.document({"id": backup.id, "target": target, "size": backup.size, "written_bytes": written_bytes})
    else:
        output.line(f"{target}: {format_size(backup.size)} of {backup.volume} as of {iso_time(backup.snapshot_ns)}")


@backup.command()
@click.argument("backup_id", metavar="BACKUP")
@yes_option
@pass_invocation
@asynchronous
async def delete(invocation: Invocation, backup_id: str, yes: bool) -> None:
    """Delete a backup. Others stay complete.

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
