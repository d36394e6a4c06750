"""Taking snapshots and asking about them, for the commands that need more than that."""

from __future__ import annotations

import asyncio

from ..errors import StillpointError
from ..wire.v1 import common_pb2, primary_pb2, standby_pb2
from .command import SnapshotId
from .nodes import Nodes


async def create_snapshots(
    nodes: Nodes, volumes: tuple[str, ...], *, name: str = "", store: str = "", writable: bool = False
) -> list[standby_pb2.Snapshot]:
    request = standby_pb2.CreateSnapshotRequest(volumes=volumes, name=name, store=store, writable=writable)
    answer = await nodes.standby.call("CreateSnapshot", request, standby_pb2.SnapshotList)
    return list(answer.snapshots)


async def create_quiesced(
    nodes: Nodes, volumes: tuple[str, ...], *, name: str = "", store: str = "", writable: bool = False
) -> list[standby_pb2.Snapshot]:
    """Freeze what uses the volumes, take the snapshots, thaw. None is left when the freeze did not last so long."""
    freeze = await nodes.primary.call("Freeze", primary_pb2.FreezeRequest(volumes=volumes), primary_pb2.FreezeId)
    made: list[standby_pb2.Snapshot] = []
    try:
        made = await create_snapshots(nodes, volumes, name=name, store=store, writable=writable)
    finally:
        try:
            await asyncio.shield(nodes.primary.call("Thaw", freeze, common_pb2.Empty))
        except StillpointError:
            for each in made:
                request = standby_pb2.DeleteSnapshotRequest(volume=each.volume, name=each.name)
                await nodes.standby.call("DeleteSnapshot", request, common_pb2.Empty)
            raise
    return made


async def get_snapshot(nodes: Nodes, identity: SnapshotId) -> standby_pb2.Snapshot:
    request = standby_pb2.SnapshotName(volume=identity.volume, name=identity.name)
    return await nodes.standby.call("GetSnapshot", request, standby_pb2.Snapshot)
