"""standbyctl backup restore and extract: a backup onto a target, as a stream, into an archive, and out of one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import click

from ..archive import ArchiveReader
from ..config import format_size
from ..errors import InvalidRequest, NotFound, PermissionRefused
from ..target import ArchiveTarget, StreamTarget, Target, open_target
from ..wire.v1 import backup_pb2
from .backup_calls import backup_document, follow, get_backup
from .command import Command, Invocation, asynchronous, pass_invocation
from .output import Output
from .restore import extract_archive, restore_here

_force = click.option("--force", is_flag=True, help="Overwrite a file that exists, or a device that is not empty.")
_differences = click.option(
    "--differences", is_flag=True, help="TARGET holds an older state: overwrite it, but only where it differs."
)
_verify = click.option("--verify", is_flag=True, help="Read everything back from TARGET before it counts as complete.")


@click.command(cls=Command)
@click.argument("backup_id", metavar="BACKUP")
@click.argument("target")
@_force
@_differences
@_verify
@click.option("--on-node", is_flag=True, help="TARGET is as the backup node sees it, and the node writes it itself.")
@click.option("--archive", is_flag=True, help="To stdout (-) only: as an archive, which `backup extract` reads.")
@pass_invocation
@asynchronous
async def restore(
    invocation: Invocation,
    backup_id: str,
    target: str,
    force: bool,
    differences: bool,
    verify: bool,
    on_node: bool,
    archive: bool,
) -> None:
    """Write a backup to a file, a disk, an nbd:// URI or - for stdout.

    \b
    Example: standbyctl backup restore ID out.img
             standbyctl backup restore ID nbd://127.0.0.1:10809/vol1 --differences
             standbyctl backup restore ID - | gzip > out.img.gz
             standbyctl backup restore ID - --archive > /dev/nst0
    """
    output = invocation.output
    streamed = target == "-"
    if streamed and (differences or verify or on_node):
        raise InvalidRequest(
            "--differences, --verify and --on-node are for files and devices; a stream is written once"
        )
    if archive and not streamed:
        raise InvalidRequest("an archive goes to stdout: name the target -, and redirect it")
    async with invocation.nodes() as nodes:
        shown = await get_backup(nodes, backup_id)
        with output.progress(f"restoring {backup_id}", shown.size) as bar:
            if on_node:
                request = backup_pb2.RestoreBackupRequest(
                    id=backup_id, target=target, force=force, differences=differences, verify=verify
                )
                written = await follow(nodes, "RestoreBackup", request, bar)
            else:
                if archive:
                    opened: Target = ArchiveTarget(sys.stdout.buffer, backup_document(shown), size=shown.size)
                elif streamed:
                    opened = StreamTarget(sys.stdout.buffer)
                else:
                    opened = await open_target(
                        target, size=shown.size, force=force, differences=differences, verify=verify
                    )
                written = await restore_here(nodes, shown, opened, bar)
    if not streamed:
        _report(output, backup_document(shown), target, written)


@click.command(cls=Command)
@click.argument("archive")
@click.argument("target")
@_force
@_differences
@_verify
@pass_invocation
@asynchronous
async def extract(
    invocation: Invocation, archive: str, target: str, force: bool, differences: bool, verify: bool
) -> None:
    """Write the image in ARCHIVE (- for stdin) to TARGET. Needs no node.

    \b
    Example: standbyctl backup extract vol1.sparc out.img
             standbyctl backup extract - /dev/sdb < /dev/nst0
    """
    with _source(archive) as stream:
        reader = ArchiveReader(stream)
        opened = await open_target(target, size=reader.size, force=force, differences=differences, verify=verify)
        with invocation.output.progress(f"extracting {archive}", reader.size) as bar:
            written = await extract_archive(reader, opened, bar)
    _report(invocation.output, reader.description, target, written)


def _source(archive: str) -> BinaryIO:
    if archive == "-":
        return sys.stdin.buffer
    try:
        return Path(archive).open("rb")
    except FileNotFoundError:
        raise NotFound(f"{archive}: does not exist") from None
    except OSError as error:
        raise PermissionRefused(f"{archive}: cannot be read: {error.strerror}") from None


def _report(output: Output, backup: Mapping[str, Any], target: str, written_bytes: int) -> None:
    size = int(backup.get("size", 0))
    if output.as_json:
        document = {"id": backup.get("id"), "target": target, "size": size, "written_bytes": written_bytes}
        output.document(document)
    else:
        output.line(f"{target}: {format_size(size)} of {backup.get('volume')} as of {backup.get('instant')}")
