"""Rolling a volume back to a snapshot, by writing what differs through the primary, so that both copies agree.

Invariants
- Before the first write there is a snapshot of the present, so a rollback can be undone by another one, to that.
- What is written are the blocks that changed since the snapshot, as the standby knows them, and nothing else. That is
  all that differs only if the standby holds what the primary does: the pair must be in sync.
- Interrupted anywhere, the volume is part old, part new. Doing it again completes it: what the first attempt wrote has
  changed since the snapshot too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from ..errors import Refused, StillpointError
from ..extents import Extent, split
from ..nbd.client import NbdClient
from ..wire.v1 import common_pb2, export_pb2, primary_pb2, standby_pb2
from .command import SnapshotId
from .nodes import DataNode, Node, Nodes
from .places import where_served, where_snapshot
from .snapshot_calls import Kind, create_snapshots
from .volume import get_volume

_PIECE_SIZE: Final = 1 << 20
_PIECES_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class Rollback:
    undo: standby_pb2.Snapshot  # the volume as it was before
    written_bytes: int


async def roll_back(nodes: Nodes, identity: SnapshotId, *, force: bool) -> Rollback:
    """Make the volume hold the snapshot's content again; durable on both nodes on return.

    force: also while clients are connected to the volume; what they write meanwhile is not rolled back.
    Raises Refused before anything is changed, and what ended it half way after that.
    """
    node, snapshot = await where_snapshot(nodes, identity)
    export, server = node.export, await where_served(nodes, identity.volume)
    if export is None or node.snapshot_nbd is None:
        raise Refused(f"the cluster file does not say where node {node.name} serves its snapshots")
    target = await export.call(
        "DescribeSnapshot",
        export_pb2.DescribeSnapshotRequest(volume=identity.volume, snapshot=identity.name),
        export_pb2.SnapshotDescription,
    )
    if snapshot.writable:
        raise Refused(f"snapshot {identity} is writable, so it may no longer hold what the volume held")
    await _check(nodes, identity.volume, clients_allowed=0, force=force)
    # Open before the snapshot of the present is taken: it keeps the target from being deleted, and the list of the
    # volume's clients is looked at again when ours is among them.
    snapshot_uri = nodes.cluster.own_nbd_uri(node.snapshot_nbd, str(identity))
    volume_uri = nodes.cluster.own_nbd_uri(server.nbd, identity.volume)
    async with await NbdClient.connect(snapshot_uri) as source, await NbdClient.connect(volume_uri) as volume:
        await _check(nodes, identity.volume, clients_allowed=1, force=force)
        undo = await _snapshot_of_the_present(node, identity)
        request = export_pb2.ChangedExtentsRequest(
            volume=identity.volume,
            snapshot=undo.name,
            base_incarnation=target.incarnation,
            base_generation=target.generation,
        )
        try:
            written = await _copy(source, volume, _extents(export, request))
            await volume.flush()
        except StillpointError as error:
            raise Refused(
                f"volume {identity.volume!r} is rolled back in part only: {error}; "
                f"do it again, or go back to {undo.volume}@{undo.name}"
            ) from None
    return Rollback(undo, written)


async def _check(nodes: Nodes, name: str, *, clients_allowed: int, force: bool) -> None:
    volume = await get_volume(nodes, name)
    if volume.pair.state != primary_pb2.PAIR_STATE_IN_SYNC:
        raise Refused(f"volume {name!r} is not in sync, so what differs is not known; wait until it is")
    others = volume.clients - clients_allowed
    if others > 0 and not force:
        raise Refused(
            f"volume {name!r} has {others} connected client{'s' if others > 1 else ''}, "
            "under which its content would change; disconnect, or use --force"
        )


async def _snapshot_of_the_present(node: DataNode, identity: SnapshotId) -> standby_pb2.Snapshot:
    now_ms = time.time_ns() // 1_000_000  # one rollback may follow another within the same second
    name = f"before-rollback-{time.strftime('%Y%m%dT%H%M%S', time.gmtime(now_ms // 1000))}.{now_ms % 1000:03d}Z"
    (undo,) = await create_snapshots(node, (identity.volume,), Kind(name=name))
    if not undo.in_sync:
        request = standby_pb2.DeleteSnapshotRequest(volume=undo.volume, name=undo.name)
        await node.mirroring.call("DeleteSnapshot", request, common_pb2.Empty)
        raise Refused(f"volume {identity.volume!r} fell out of sync; nothing was rolled back")
    return undo


async def _extents(export: Node, request: export_pb2.ChangedExtentsRequest) -> AsyncIterator[Extent]:
    async for part in export.stream("ChangedExtents", request, export_pb2.ChangedExtentsPart):
        for offset, length in zip(part.offsets, part.lengths, strict=True):
            yield Extent(offset, length)


async def _copy(source: NbdClient, volume: NbdClient, extents: AsyncIterator[Extent]) -> int:
    """Write the source's content of the extents, zeroes beyond its end; the bytes written."""
    written = 0
    room = asyncio.Semaphore(_PIECES_AT_ONCE)
    failures: list[StillpointError] = []

    async def copy(piece: Extent) -> None:
        try:
            await _copy_piece(source, volume, piece)
        except StillpointError as error:
            failures.append(error)
        finally:
            room.release()

    async with asyncio.TaskGroup() as tasks:
        async for extent in extents:
            for piece in split(extent, limit=_PIECE_SIZE):
                await room.acquire()
                if failures:
                    break
                tasks.create_task(copy(piece))
                written += piece.length
            if failures:
                break
    if failures:
        raise failures[0]
    return written


async def _copy_piece(source: NbdClient, volume: NbdClient, piece: Extent) -> None:
    inside = min(max(source.size - piece.offset, 0), piece.length)
    if inside:
        async for mapped in source.extents(piece.offset, inside):
            if mapped.hole:
                await volume.write_zeroes(mapped.offset, mapped.length)
            else:
                await volume.write(mapped.offset, await source.read(mapped.offset, mapped.length))
    if inside < piece.length:  # the volume has grown since
        await volume.write_zeroes(piece.offset + inside, piece.length - inside)
