"""standbyctl backup verify, check, prune and gc: the care of the repository."""

from __future__ import annotations

import click

from ..config import format_size
from ..errors import ProtocolError
from ..wire.v1 import backup_pb2
from .backup_calls import backup_document, follow
from .command import Command, Invocation, asynchronous, confirm, duration_s, pass_invocation, yes_option
from .nodes import Nodes
from .output import Output, ProgressBar, format_age, format_seconds, plural

# A collection copies what is still needed of packs that are mostly dead, and pruning reads every manifest.
_UPKEEP_TIMEOUT_S = 6 * 3600.0


async def verify_backup(nodes: Nodes, identity: str, *, bar: ProgressBar) -> int:
    """Bytes read back. Raises DataCorrupt when a checksum does not match."""
    return await follow(nodes, "VerifyBackup", backup_pb2.BackupId(id=identity), bar)


@click.command(cls=Command)
@click.argument("backup_id", metavar="BACKUP", required=False)
@click.option("--deep", is_flag=True, help="Without BACKUP: also decrypt, decompress and hash every chunk.")
@click.option("--restore-test", is_flag=True, help="Export BACKUP and check what is in it.")
@pass_invocation
@asynchronous
async def verify(invocation: Invocation, backup_id: str | None, deep: bool, restore_test: bool) -> None:
    """Prove that backups can be restored. Exit code 1 when one cannot.

    With BACKUP it is read as a restore reads it, and every chunk is hashed.
    Without, the whole repository is checked, as by `backup check`: what many
    backups share is read once.

    A restore test exports BACKUP on the backup node, with an overlay that is
    thrown away, and runs the command of its configuration (restore_test) over
    it, or else a check of its ext file system. The result stays with the backup.

    \b
    Example: standbyctl backup verify ID
             standbyctl backup verify ID --restore-test
             standbyctl backup verify --deep
    """
    if restore_test:
        if backup_id is None:
            raise click.UsageError("a restore test needs a BACKUP")
        await _test_restore(invocation, backup_id)
        return
    if backup_id is None:
        await _check(invocation, deep=deep)
        return
    output = invocation.output
    async with invocation.nodes() as nodes:
        with output.progress(f"verifying {backup_id}") as bar:
            read_bytes = await verify_backup(nodes, backup_id, bar=bar)
    if output.as_json:
        output.document({"id": backup_id, "read_bytes": read_bytes, "ok": True})
    else:
        output.line(f"backup {backup_id}: every checksum matches")


async def _test_restore(invocation: Invocation, backup_id: str) -> None:
    async with invocation.nodes() as nodes:
        request = backup_pb2.BackupId(id=backup_id)
        result = await nodes.backup.call("TestRestore", request, backup_pb2.RestoreTest, timeout_s=None)
    seconds = result.duration_ns / 1e9
    if invocation.output.as_json:
        invocation.output.document(
            {"id": backup_id, "ok": result.passed, "detail": result.detail, "duration_s": seconds}
        )
    else:
        word = "passed" if result.passed else "FAILED"
        invocation.output.line(f"backup {backup_id}: restore test {word} in {format_seconds(seconds)}")
        if result.detail:
            invocation.output.line(result.detail)
    if not result.passed:
        raise click.exceptions.Exit(1)


@click.command(cls=Command)
@click.option("--deep", is_flag=True, help="Also decrypt, decompress and hash every chunk; marks backups as verified.")
@click.option(
    "--for",
    "budget_s",
    type=duration_s,
    metavar="TIME",
    help="Stop after so long (10m, 2h); the next one goes on there.",
)
@pass_invocation
@asynchronous
async def check(invocation: Invocation, deep: bool, budget_s: float | None) -> None:
    """Check the whole repository, and name the backups that are damaged.

    Every pack is compared with its checksum, and the index of every backup
    with what is there. What is damaged counts as missing from then on, so
    that the next backup of the same bytes stores them anew and heals what
    had them. Exit code 1 when something is damaged.

    \b
    Example: standbyctl backup check --deep
             standbyctl backup check --deep --for 10m
    """
    await _check(invocation, deep=deep, budget_s=budget_s)


async def _check(invocation: Invocation, *, deep: bool, budget_s: float | None = None) -> None:
    output = invocation.output
    last = backup_pb2.CheckEvent()
    async with invocation.nodes() as nodes:
        with output.progress("checking the repository") as bar:
            request = backup_pb2.CheckRequest(deep=deep, budget_s=budget_s or 0)
            async for last in nodes.backup.stream("CheckRepository", request, backup_pb2.CheckEvent):
                bar.update(last.progress.done_bytes, last.progress.total_bytes)
    if not last.HasField("report"):
        raise ProtocolError("the backup node ended in the middle of the check")
    report = last.report
    _show_check(output, report, deep=deep)
    if not _is_ok(report):
        raise click.exceptions.Exit(1)


def _is_ok(report: backup_pb2.CheckReport) -> bool:
    return not report.damaged_packs and not report.affected and not report.damaged_notes


def _show_check(output: Output, report: backup_pb2.CheckReport, *, deep: bool) -> None:
    if output.as_json:
        whole = [{"id": each, "ok": True, "reason": None} for each in report.whole]
        affected = [{"id": each.id, "ok": False, "reason": each.reason} for each in report.affected]
        output.document(
            {
                "ok": _is_ok(report),
                "deep": deep,
                "complete": report.complete,
                "checked_bytes": report.checked_bytes,
                "checked_packs": report.checked_packs,
                "damaged_packs": list(report.damaged_packs),
                "damaged_notes": list(report.damaged_notes),
                "lost_blobs": report.lost_blobs,
                "verified": [*whole, *affected],
            }
        )
        return
    output.line(
        f"{format_size(report.checked_bytes)} in {plural(report.checked_packs, 'pack')} checked,"
        f" {plural(len(report.whole), 'backup')} whole"
    )
    if not report.complete:
        output.line("time is up; the next check with --for goes on where this one ended")
    for note in report.damaged_notes:
        output.alarm(
            f"the note {note} is damaged; a backup of this name counts as protected until it is protected anew"
        )
    for pack in report.damaged_packs:
        output.alarm(f"pack {pack} is damaged")
    for each in report.affected:
        output.alarm(f"{each.id}: {each.reason}")
    if report.affected:
        output.line("back the volumes up again: what is still there heals what is damaged")


@click.command(cls=Command)
@click.argument("volume", required=False)
@click.option("--keep-last", "last", type=click.IntRange(1), metavar="N", help="Keep the newest N of each volume.")
@click.option("--keep-hourly", "hourly", type=click.IntRange(1), metavar="N", help="And the newest of N hours.")
@click.option("--keep-daily", "daily", type=click.IntRange(1), metavar="N", help="And the newest of N days.")
@click.option("--keep-weekly", "weekly", type=click.IntRange(1), metavar="N", help="And the newest of N ISO weeks.")
@click.option("--keep-monthly", "monthly", type=click.IntRange(1), metavar="N", help="And the newest of N months.")
@click.option("--keep-yearly", "yearly", type=click.IntRange(1), metavar="N", help="And the newest of N years.")
@click.option("--dry-run", is_flag=True, help="Only say what would go, and why the rest stays.")
@yes_option
@pass_invocation
@asynchronous
async def prune(
    invocation: Invocation,
    volume: str | None,
    last: int | None,
    hourly: int | None,
    daily: int | None,
    weekly: int | None,
    monthly: int | None,
    yearly: int | None,
    dry_run: bool,
    yes: bool,
) -> None:
    """Delete the backups that a policy does not keep.

    Of one volume, or of each volume by itself. Without a --keep option the
    policy of the node's configuration is used. Periods without a backup do
    not count; times are UTC. Protected backups, the newest, and as many as
    retention.minimum of the configuration says always stay.

    \b
    Example: standbyctl backup prune vol1 --keep-daily 14 --keep-monthly 12 --dry-run
    """
    given = backup_pb2.RetentionPolicy(
        last=last, hourly=hourly, daily=daily, weekly=weekly, monthly=monthly, yearly=yearly
    )
    policy = given if given.ByteSize() else None
    if not dry_run:
        confirm(f"Prune the backups of {volume or 'every volume'}?", yes=yes)
    request = backup_pb2.PruneRequest(volume=volume or "", policy=policy, dry_run=dry_run)
    async with invocation.nodes() as nodes:
        report = await nodes.backup.call("PruneBackups", request, backup_pb2.PruneReport, timeout_s=_UPKEEP_TIMEOUT_S)
    _show_pruned(invocation.output, report, dry_run=dry_run)


def _show_pruned(output: Output, report: backup_pb2.PruneReport, *, dry_run: bool) -> None:
    goes = [each.backup for each in report.verdicts if not each.kept_by]
    if output.as_json:
        kept = [backup_document(each.backup) | {"kept_by": each.kept_by} for each in report.verdicts if each.kept_by]
        output.document({"dry_run": dry_run, "deleted": [each.id for each in goes], "kept": kept})
        return
    output.table(
        ("BACKUP", "AGE>", "VERDICT"),
        [
            (
                each.backup.id,
                format_age(each.backup.snapshot_ns),
                f"kept: {each.kept_by}" if each.kept_by else "would go" if dry_run else "deleted",
            )
            for each in report.verdicts
        ],
        empty="no backups",
    )
    if goes and not dry_run:
        output.line("their space is given back in the background")


@click.command(cls=Command)
@click.option("--dry-run", is_flag=True, help="Only say how much could be given back.")
@click.option("--fence", is_flag=True, help="End the backups that run, instead of waiting for them with the rest.")
@pass_invocation
@asynchronous
async def gc(invocation: Invocation, dry_run: bool, fence: bool) -> None:
    """Give back the space of what no backup needs. Backups may run meanwhile.

    The node does this by itself after each backup and each deletion.

    \b
    Example: standbyctl backup gc --dry-run
    """
    request = backup_pb2.CollectRequest(dry_run=dry_run, fence=fence)
    async with invocation.nodes() as nodes:
        report = await nodes.backup.call(
            "CollectGarbage", request, backup_pb2.CollectReport, timeout_s=_UPKEEP_TIMEOUT_S
        )
    if invocation.output.as_json:
        fields = ("deleted_packs", "deleted_bytes", "repacked_bytes", "pending_packs", "pending_bytes")
        counts = {name: getattr(report, name) for name in (*fields, "unreferenced_bytes")}
        invocation.output.document({"dry_run": dry_run} | counts)
        return
    if dry_run:
        invocation.output.line(f"{format_size(report.unreferenced_bytes)} could be given back")
        return
    invocation.output.line(
        f"{format_size(report.deleted_bytes)} given back, {format_size(report.repacked_bytes)} packed again"
    )
    if report.pending_packs:
        invocation.output.line(f"{format_size(report.pending_bytes)} wait for the backups that run")
