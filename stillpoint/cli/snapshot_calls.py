"""Taking snapshots and asking about them, for the commands that need more than that."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from ..errors import StillpointError
from ..wire.v1 import common_pb2, primary_pb2, standby_pb2
from .nodes import DataNode


@dataclass(frozen=True, slots=True)
class Kind:
    """What a snapshot is to be. name: empty: one is made from the time. store: empty: the default store."""

    name: str = ""
    store: str = ""
    writable: bool = False


async def create_snapshots(node: DataNode, volumes: tuple[str, ...], kind: Kind) -> list[standby_pb2.Snapshot]:
    """node: that mirrors the volumes."""
    request = standby_pb2.CreateSnapshotRequest(
        volumes=volumes, name=kind.name, store=kind.store, writable=kind.writable
    )
    answer = await node.mirroring.call("CreateSnapshot", request, standby_pb2.SnapshotList)
    return list(answer.snapshots)


async def create_quiesced(
    server: DataNode, node: DataNode, volumes: tuple[str, ...], kind: Kind
) -> list[standby_pb2.Snapshot]:
    """Freeze what uses the volumes, take the snapshots, thaw. None is left when the freeze did not last so long.

    server: that serves the volumes. node: that mirrors them.
    """
    freeze = await server.serving.call("Freeze", primary_pb2.FreezeRequest(volumes=volumes), primary_pb2.FreezeId)
    made: list[standby_pb2.Snapshot] = []
    try:
        made = await create_snapshots(node, volumes, kind)
    finally:
        try:
            await asyncio.shield(server.serving.call("Thaw", freeze, common_pb2.Empty))
        except StillpointError:
            for each in made:
                request = standby_pb2.DeleteSnapshotRequest(volume=each.volume, name=each.name)
                await node.mirroring.call("DeleteSnapshot", request, common_pb2.Empty)
            raise
    return made
