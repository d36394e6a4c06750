"""standbyctl snapshot: points in a volume's write stream, kept on the standby."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ..config import format_size
from ..wire.v1 import common_pb2, standby_pb2
from .command import (
    Group,
    Invocation,
    SnapshotId,
    asynchronous,
    confirm,
    pass_invocation,
    snapshot_identity,
    yes_option,
)
from .nodes import CALL_TIMEOUT_S, DataNode, Nodes
from .output import enum_word, format_age, format_seconds, iso_time
from .places import from_all, where_mirrored, where_served, where_snapshot
from .rollback import roll_back
from .snapshot_calls import Kind, create_quiesced, create_snapshots
from .snapshot_policy import policy


def state_word(state: standby_pb2.SnapshotState) -> str:
    return enum_word(standby_pb2.SnapshotState.Name(state), "SNAPSHOT_STATE_")


def state_cell(state: standby_pb2.SnapshotState) -> str:
    return "active" if state == standby_pb2.SNAPSHOT_STATE_ACTIVE else state_word(state).upper()


def snapshot_id(snapshot: standby_pb2.Snapshot) -> str:
    return f"{snapshot.volume}@{snapshot.name}"


def snapshot_document(snapshot: standby_pb2.Snapshot) -> dict[str, Any]:
    document = {
        "id": snapshot_id(snapshot),
        "volume": snapshot.volume,
        "name": snapshot.name,
        "uuid": snapshot.uuid,
        "state": state_word(snapshot.state),
        "reason": snapshot.reason,
        "size": snapshot.size,
        "block_size": snapshot.block_size,
        "created": iso_time(snapshot.created_ns),
        "created_ns": snapshot.created_ns,
        "generation": snapshot.generation,
        "store": snapshot.store,
        "preserved_blocks": snapshot.preserved_blocks,
        "preserved_bytes": snapshot.preserved_bytes,
        "reclaimable_bytes": snapshot.reclaimable_bytes,
        "shared_bytes": snapshot.shared_bytes,
        "protected": snapshot.protected,
        "writable": snapshot.writable,
        "readers": snapshot.readers,
        "in_sync": snapshot.in_sync,
    }
    if snapshot.create_duration_ns:
        document["create_duration_ns"] = snapshot.create_duration_ns
    return document


def snapshot_uri(nodes: Nodes, node: DataNode, identity: str) -> str:
    """Where the node serves the snapshot; for people and their programs."""
    return nodes.cluster.nbd_uri(node.snapshot_nbd, identity) if node.snapshot_nbd is not None else ""


@click.group(cls=Group)
def snapshot() -> None:
    """Snapshots of volumes.

    A snapshot is a point in a volume's write stream, kept on the standby and served there over NBD as VOLUME@NAME.
    It is not a backup: it lives and dies with the standby. `standbyctl backup run` makes one.
    """


snapshot.add_command(policy)


@snapshot.command()
@click.argument("volumes", metavar="VOLUME...", nargs=-1, required=True)
@click.option("--name", help="One name for all of them. [default: made from the time]")
@click.option("--store", help="Where old blocks are kept. [default: the standby's own]")
@click.option("--writable", is_flag=True, help="Serve it for writing; that never reaches the volume or the mirror.")
@click.option("--quiesce", is_flag=True, help="Freeze what uses the volumes meanwhile, by the primary's hooks.")
@pass_invocation
@asynchronous
async def create(
    invocation: Invocation,
    volumes: tuple[str, ...],
    name: str | None,
    store: str | None,
    writable: bool,
    quiesce: bool,
) -> None:
    """Take a snapshot.

    Of several volumes, all are taken at one and the same instant. With --quiesce the file systems or programs on the
    volumes are brought to rest before, by the hooks in the primary's configuration, and go on right after.

    \b
    Example: standbyctl snapshot create vol1 --name before-upgrade
             standbyctl snapshot create db-data db-log --name nightly
    """
    async with invocation.nodes() as nodes:
        node = await where_mirrored(nodes, volumes)
        kind = Kind(name or "", store or "", writable)
        if quiesce:
            made = await create_quiesced(await where_served(nodes, volumes[0]), node, volumes, kind)
        else:
            made = await create_snapshots(node, volumes, kind)
        uris = [snapshot_uri(nodes, node, snapshot_id(each)) for each in made]
    if invocation.output.as_json:
        documents = [snapshot_document(each) for each in made]
        invocation.output.document(documents[0] if len(volumes) == 1 else {"snapshots": documents})
        return
    for each, uri in zip(made, uris, strict=True):
        took = f" in {format_seconds(each.create_duration_ns / 1e9)}" if each.create_duration_ns else ""
        invocation.output.line(f"snapshot {snapshot_id(each)} taken{took}; at {uri}")
        if not each.in_sync:
            invocation.output.remark(
                f"{each.volume} was not in sync: {snapshot_id(each)} shows what the standby had, "
                f"which is older than the primary's volume"
            )


@snapshot.command("list")
@click.argument("volume", required=False)
@pass_invocation
@asynchronous
async def list_(invocation: Invocation, volume: str | None) -> None:
    """List the snapshots, of one volume or of all.

    \b
    Example: standbyctl snapshot list vol1
    """
    async with invocation.nodes() as nodes:
        request = standby_pb2.ListSnapshotsRequest(volume=volume or "")

        async def ask(node: DataNode) -> Sequence[standby_pb2.Snapshot]:
            return (await node.mirroring.call("ListSnapshots", request, standby_pb2.SnapshotList)).snapshots

        answers = await from_all(nodes, ask)
    snapshots = sorted((each for _, part in answers for each in part), key=lambda each: (each.volume, each.created_ns))
    if invocation.output.as_json:
        invocation.output.document([snapshot_document(each) for each in snapshots])
        return
    invocation.output.table(
        ("SNAPSHOT", "STATE", "SIZE>", "PRESERVED>", "READERS>", "STORE", "AGE>"),
        [
            (
                snapshot_id(each),
                state_cell(each.state) + (" protected" if each.protected else ""),
                format_size(each.size),
                format_size(each.preserved_bytes),
                str(each.readers),
                each.store,
                format_age(each.created_ns),
            )
            for each in snapshots
        ],
        empty="no snapshots; take one with `standbyctl snapshot create VOLUME`",
    )


@snapshot.command()
@click.argument("identity", metavar="VOLUME@NAME", type=snapshot_identity)
@pass_invocation
@asynchronous
async def show(invocation: Invocation, identity: SnapshotId) -> None:
    """Show one snapshot.

    \b
    Example: standbyctl snapshot show vol1@before-upgrade
    """
    async with invocation.nodes() as nodes:
        node, shown = await where_snapshot(nodes, identity)
        uri = snapshot_uri(nodes, node, str(identity))
    if invocation.output.as_json:
        more = {"reader_names": list(shown.reader_names), "node": node.name, "uri": uri}
        invocation.output.document({**snapshot_document(shown), **more})
        return
    invocation.output.properties(
        [
            ("snapshot", str(identity)),
            ("uuid", shown.uuid),
            ("state", " ".join(filter(None, (state_cell(shown.state), shown.reason)))),
            ("size", f"{format_size(shown.size)} ({shown.size} bytes)"),
            ("block size", format_size(shown.block_size)),
            ("address", uri),
            ("taken", f"{iso_time(shown.created_ns)} ({format_age(shown.created_ns)} ago)"),
            ("pair then", "in sync" if shown.in_sync else "NOT IN SYNC: older than the primary's volume"),
            ("preserved", f"{format_size(shown.preserved_bytes)} in {shown.preserved_blocks} blocks"),
            ("unique", f"{format_size(shown.reclaimable_bytes)}, which deleting it gives back to the store"),
            ("shared", f"{format_size(shown.shared_bytes)}, which older snapshots read too"),
            ("store", shown.store),
            ("writable", "yes" if shown.writable else "no"),
            ("protected", "yes" if shown.protected else "no"),
            ("read by", ", ".join(shown.reader_names) or "nobody"),
        ]
    )


@snapshot.command()
@click.argument("identity", metavar="VOLUME@NAME", type=snapshot_identity)
@click.option("--bookmark", metavar="NAME", help="Remember the instant under this name, as a base of incrementals.")
@click.option("--wait", is_flag=True, help="Wait until nobody reads it, instead of refusing.")
@yes_option
@pass_invocation
@asynchronous
async def delete(invocation: Invocation, identity: SnapshotId, bookmark: str | None, wait: bool, yes: bool) -> None:
    """Delete a snapshot. Other snapshots and backups of it stay as they are.

    It is refused while somebody reads the snapshot, and for one that is protected.

    \b
    Example: standbyctl snapshot delete vol1@before-upgrade
             standbyctl snapshot delete vol1@monday --bookmark monday
    """
    confirm(f"Delete the snapshot {identity}?", yes=yes)
    async with invocation.nodes() as nodes:
        request = standby_pb2.DeleteSnapshotRequest(
            volume=identity.volume, name=identity.name, bookmark=bookmark or "", wait=wait
        )
        timeout_s = None if wait else CALL_TIMEOUT_S
        node, _ = await where_snapshot(nodes, identity)
        await node.mirroring.call("DeleteSnapshot", request, common_pb2.Empty, timeout_s=timeout_s)
    if invocation.output.as_json:
        invocation.output.document({"deleted": str(identity), **({"bookmark": bookmark} if bookmark else {})})
    else:
        kept = f"; its instant is bookmark {identity.volume}@{bookmark}" if bookmark else ""
        invocation.output.line(f"snapshot {identity} deleted{kept}")


@snapshot.command()
@click.argument("identity", metavar="VOLUME@NAME", type=snapshot_identity)
@pass_invocation
@asynchronous
async def protect(invocation: Invocation, identity: SnapshotId) -> None:
    """Keep a snapshot from being deleted by request. A store that is full may still cost it.

    \b
    Example: standbyctl snapshot protect vol1@before-upgrade
    """
    await _set_protected(invocation, identity, protected=True)


@snapshot.command()
@click.argument("identity", metavar="VOLUME@NAME", type=snapshot_identity)
@pass_invocation
@asynchronous
async def unprotect(invocation: Invocation, identity: SnapshotId) -> None:
    """Let a protected snapshot be deleted again.

    \b
    Example: standbyctl snapshot unprotect vol1@before-upgrade
    """
    await _set_protected(invocation, identity, protected=False)


async def _set_protected(invocation: Invocation, identity: SnapshotId, *, protected: bool) -> None:
    async with invocation.nodes() as nodes:
        request = standby_pb2.ProtectSnapshotRequest(volume=identity.volume, name=identity.name, protected=protected)
        node, _ = await where_snapshot(nodes, identity)
        changed = await node.mirroring.call("ProtectSnapshot", request, standby_pb2.Snapshot)
    if invocation.output.as_json:
        invocation.output.document(snapshot_document(changed))
    else:
        invocation.output.line(f"snapshot {identity} is {'protected' if protected else 'no longer protected'}")


@snapshot.command()
@click.argument("identity", metavar="VOLUME@NAME", type=snapshot_identity)
@click.option("--force", is_flag=True, help="Also while clients are connected to the volume.")
@yes_option
@pass_invocation
@asynchronous
async def rollback(invocation: Invocation, identity: SnapshotId, force: bool, yes: bool) -> None:
    """Make the volume hold a snapshot's content again, on both nodes.

    A snapshot of the present is taken first; rolling back to that one undoes it. Only what differs is written.

    \b
    Example: standbyctl snapshot rollback vol1@before-upgrade
    """
    confirm(f"Replace the content of the volume {identity.volume} by that of {identity}?", yes=yes)
    async with invocation.nodes() as nodes:
        done = await roll_back(nodes, identity, force=force)
    if invocation.output.as_json:
        document = {
            "volume": identity.volume,
            "snapshot": str(identity),
            "undo": snapshot_id(done.undo),
            "written_bytes": done.written_bytes,
        }
        invocation.output.document(document)
    else:
        invocation.output.line(
            f"volume {identity.volume} holds {identity} again ({format_size(done.written_bytes)} written); "
            f"to undo: standbyctl snapshot rollback {snapshot_id(done.undo)}"
        )


@snapshot.command()
@click.argument("identity", metavar="VOLUME@NAME", type=snapshot_identity)
@click.option("--writable", is_flag=True, help="Serve it for writing from now on.")
@pass_invocation
@asynchronous
async def export(invocation: Invocation, identity: SnapshotId, writable: bool) -> None:
    """Tell where a snapshot is served, and make it writable.

    What is written is kept with the snapshot until that is deleted. It is seen there and nowhere else: not in the
    volume, in other snapshots or in backups.

    \b
    Example: standbyctl snapshot export vol1@before-upgrade --writable
    """
    async with invocation.nodes() as nodes:
        request = standby_pb2.ExportSnapshotRequest(volume=identity.volume, name=identity.name, writable=writable)
        node, _ = await where_snapshot(nodes, identity)
        exported = await node.mirroring.call("ExportSnapshot", request, standby_pb2.Snapshot)
        uri = snapshot_uri(nodes, node, str(identity))
    if invocation.output.as_json:
        invocation.output.document({**snapshot_document(exported), "uri": uri})
    else:
        invocation.output.line(f"snapshot {identity} at {uri}, {'writable' if exported.writable else 'read-only'}")
