"""standbyctl mirror: the standby's copy of each volume."""

from __future__ import annotations

from typing import Any

import click

from ..config import format_size
from ..wire.v1 import common_pb2, primary_pb2, standby_pb2
from .command import Group, Invocation, asynchronous, pass_invocation, size
from .output import enum_word, format_age, iso_time
from .places import where_served
from .volume import volume_document, writers_cell


def state_word(state: standby_pb2.MirrorState) -> str:
    return enum_word(standby_pb2.MirrorState.Name(state), "MIRROR_STATE_")


def state_cell(state: standby_pb2.MirrorState) -> str:
    return "in sync" if state == standby_pb2.MIRROR_STATE_IN_SYNC else state_word(state).upper()


def mirror_document(mirror: standby_pb2.Mirror) -> dict[str, Any]:
    return {
        "volume": mirror.volume,
        "volume_uuid": mirror.volume_uuid,
        "size": mirror.size,
        "block_size": mirror.block_size,
        "device_paths": list(mirror.device_paths),
        "state": state_word(mirror.state),
        "since": iso_time(mirror.since_ns),
        "detail": mirror.detail,
        "snapshot_count": mirror.snapshot_count,
        "staged_bytes": mirror.staged_bytes,
        "received_sequence": mirror.received_sequence,
        "applied_sequence": mirror.applied_sequence,
        "flushed_sequence": mirror.flushed_sequence,
        "session": mirror.session,
    }


@click.group(cls=Group)
def mirror() -> None:
    """The standby's copy of each volume."""


@mirror.command()
@pass_invocation
@asynchronous
async def status(invocation: Invocation) -> None:
    """Show the mirrors as the standby sees them.

    That works while the primary is down.

    \b
    Example: standbyctl mirror status
    """
    async with invocation.nodes() as nodes:
        answer = await nodes.standby.call("GetStatus", common_pb2.Empty(), standby_pb2.StandbyStatus)
    mirrors = sorted(answer.mirrors, key=lambda each: each.volume)
    if invocation.output.as_json:
        invocation.output.document(
            {"received_bytes": answer.received_bytes, "mirrors": [mirror_document(each) for each in mirrors]}
        )
        return
    invocation.output.table(
        ("MIRROR", "STATE", "FOR>", "SIZE>", "STAGED>", "APPLIED>", "FLUSHED>", "SNAPSHOTS>"),
        [
            (
                each.volume,
                state_cell(each.state),
                format_age(each.since_ns),
                format_size(each.size),
                format_size(each.staged_bytes),
                f"{each.applied_sequence}",
                f"{each.flushed_sequence}",
                f"{each.snapshot_count}",
            )
            for each in mirrors
        ],
        empty="no mirrors; creating a volume makes one",
    )
    for each in mirrors:
        if each.detail:
            invocation.output.line(f"{each.volume}: {each.detail}")


@mirror.command()
@click.argument("volume")
@pass_invocation
@asynchronous
async def resume(invocation: Invocation, volume: str) -> None:
    """Let a volume's writers go on until a standby is in sync again.

    For a volume whose writes are suspended or refused (`volume set
    --on-standby-loss`). What they write is on the primary alone, and is
    copied when a standby is back.

    \b
    Example: standbyctl mirror resume vol1
    """
    async with invocation.nodes() as nodes:
        node = await where_served(nodes, volume)
        resumed = await node.serving.call(
            "ResumeVolume", primary_pb2.ResumeVolumeRequest(name=volume), primary_pb2.Volume
        )
    if invocation.output.as_json:
        invocation.output.document(volume_document(resumed))
    else:
        invocation.output.line(f"volume {volume}: {writers_cell(resumed) or 'writers go on'}")


@mirror.command()
@click.argument("volume")
@pass_invocation
@asynchronous
async def resync(invocation: Invocation, volume: str) -> None:
    """Copy a whole volume to its mirror again, while both are in use.

    For a mirror that is not to be trusted. What changed while a standby was
    away is copied by itself; `mirror verify` finds out whether the two differ.

    \b
    Example: standbyctl mirror resync vol1
    """
    async with invocation.nodes() as nodes:
        node = await where_served(nodes, volume)
        begun = await node.serving.call(
            "ResyncVolume", primary_pb2.ResyncVolumeRequest(name=volume), primary_pb2.Volume
        )
    if invocation.output.as_json:
        invocation.output.document(volume_document(begun))
    else:
        to_copy = format_size(begun.pair.dirty_bytes)
        invocation.output.line(f"volume {volume}: {to_copy} to copy; `standbyctl status --watch` shows how far it is")


@mirror.command()
@click.argument("volume")
@click.option("--repair", is_flag=True, help="Send what differs again; the primary's copy counts.")
@click.option("--rate", type=size, metavar="SIZE", help="Bytes a second, at most.")
@pass_invocation
@asynchronous
async def verify(invocation: Invocation, volume: str, repair: bool, rate: int | None) -> None:
    """Compare a volume with its mirror while both are in use.

    Every difference reported is real: each part is compared at one point of
    the write stream. Exit code 1 when something differs, repaired or not.

    \b
    Example: standbyctl mirror verify vol1 --rate 200MiB
    """
    request = primary_pb2.VerifyMirrorRequest(volume=volume, repair=repair, rate=rate or 0)
    last = primary_pb2.VerifyEvent()
    async with invocation.nodes() as nodes:
        with invocation.output.progress(f"comparing {volume}") as bar:
            node = await where_served(nodes, volume)
            async for last in node.serving.stream("VerifyMirror", request, primary_pb2.VerifyEvent):
                bar.update(last.progress.done_bytes, last.progress.total_bytes)
    different = sum(last.lengths)
    if invocation.output.as_json:
        invocation.output.document(
            {
                "volume": volume,
                "compared_bytes": last.progress.done_bytes,
                "different": [
                    {"offset": offset, "length": length}
                    for offset, length in zip(last.offsets, last.lengths, strict=True)
                ],
                "undecided_bytes": last.undecided_bytes,
                "repaired": last.repaired,
            }
        )
    else:
        words = f"{format_size(different)} differ" if different else "no difference"
        words += ", and are being sent again" if last.repaired else ""
        words += f"; {format_size(last.undecided_bytes)} were never at rest" if last.undecided_bytes else ""
        invocation.output.line(f"volume {volume}: {format_size(last.progress.done_bytes)} compared, {words}")
    if different:
        raise click.exceptions.Exit(1)
