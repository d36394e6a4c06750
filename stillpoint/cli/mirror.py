"""standbyctl mirror: the standby's copy of each volume."""

from __future__ import annotations

from typing import Any

import click

from ..config import format_size
from ..wire.v1 import common_pb2, standby_pb2
from .command import Group, Invocation, asynchronous, pass_invocation
from .output import enum_word, format_age, iso_time


def state_word(state: standby_pb2.MirrorState) -> str:
    return enum_word(standby_pb2.MirrorState.Name(state), "MIRROR_STATE_")


def state_cell(state: standby_pb2.MirrorState) -> str:
    return "in sync" if state == standby_pb2.MIRROR_STATE_IN_SYNC else state_word(state).upper()


def mirror_document(mirror: standby_pb2.Mirror) -> dict[str, Any]:
    return {
        "volume": mirror.volume,
        "volume_uuid": mirror.volume_uuid,
        "mirror_uuid": mirror.mirror_uuid,
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
