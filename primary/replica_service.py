"""ReplicaService: the copies of a node and their roles, as messages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import islice
from uuid import UUID

import grpc

from stillpoint.errors import InvalidRequest, Refused
from stillpoint.replica import Flags, Role
from stillpoint.replica.replicas import Replica
from stillpoint.wire.status import Context, answers
from stillpoint.wire.v1 import common_pb2, replica_pb2, replica_pb2_grpc

from .data_node import DataNode
from .mirrored_device import AckMode

SERVICE_NAME = "stillpoint.wire.v1.ReplicaService"

_EXTENTS_A_MESSAGE = 10_000
_ROLES = {Role.PRIMARY: replica_pb2.REPLICA_ROLE_PRIMARY, Role.STANDBY: replica_pb2.REPLICA_ROLE_STANDBY}


class ReplicaService(replica_pb2_grpc.ReplicaServiceServicer):
    def __init__(self, node: DataNode) -> None:
        self._node = node

    def add_to(self, server: grpc.aio.Server) -> None:
        replica_pb2_grpc.add_ReplicaServiceServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    @answers
    async def ListReplicas(self, request: common_pb2.Empty, context: Context) -> replica_pb2.ReplicaList:
        replicas = self._node.replicas
        return replica_pb2.ReplicaList(node=replicas.name, replicas=[self._describe(replica) for replica in replicas])

    @answers
    async def Promote(self, request: replica_pb2.PromoteRequest, context: Context) -> replica_pb2.PromoteResponse:
        if request.mode and request.mode not in {mode.value for mode in AckMode}:
            raise InvalidRequest(f"volume {request.volume!r}: there is no mode {request.mode[:20]!r}")
        took_s = await self._node.promote(
            request.volume, force=request.force, snapshot=request.snapshot, mode=request.mode
        )
        return replica_pb2.PromoteResponse(
            replica=self._described(request.volume),
            duration_ns=int(took_s * 1e9),
            nbd_address=str(self._node.primary.nbd_address),
        )

    @answers
    async def SwitchOver(self, request: replica_pb2.SwitchOverRequest, context: Context) -> replica_pb2.Replica:
        await self._node.switch_over(request.volume)
        return self._described(request.volume)

    @answers
    async def Rejoin(self, request: replica_pb2.RejoinRequest, context: Context) -> replica_pb2.Replica:
        await self._node.rejoin(request.volume)
        return self._described(request.volume)

    @answers
    async def Outrank(self, request: replica_pb2.OutrankRequest, context: Context) -> replica_pb2.Replica:
        await self._node.outrank(request.volume, epoch=request.epoch)
        return self._described(request.volume)

    @answers
    async def GiveUp(self, request: replica_pb2.GiveUpRequest, context: Context) -> replica_pb2.GiveUpResponse:
        snapshot = await self._node.give_up(request.volume, winner=request.winner)
        return replica_pb2.GiveUpResponse(replica=self._described(request.volume), snapshot=snapshot)

    @answers
    async def ListDirty(
        self, request: replica_pb2.ListDirtyRequest, context: Context
    ) -> AsyncIterator[replica_pb2.DirtyExtents]:
        replica = self._node.replicas.get(request.volume)
        if replica.state.volume != UUID(request.volume_uuid):
            raise Refused(f"volume {request.volume!r} here is another one of that name")
        extents = self._node.primary.list_dirty(request.volume)
        while part := list(islice(extents, _EXTENTS_A_MESSAGE)):
            yield replica_pb2.DirtyExtents(
                offsets=[extent.offset for extent in part], lengths=[extent.length for extent in part]
            )

    def _described(self, volume: str) -> replica_pb2.Replica:
        return self._describe(self._node.replicas.get(volume))

    def _describe(self, replica: Replica) -> replica_pb2.Replica:
        state = replica.state
        mirror = self._node.standby.mirrors.get(replica.volume)
        fallback = mirror.fallback if mirror is not None else None
        return replica_pb2.Replica(
            volume=replica.volume,
            volume_uuid=str(state.volume),
            node=state.name,
            role=_ROLES[state.role],
            epoch=state.fence.epoch,
            generation=str(state.current) if state.current is not None else "",
            up_to_date=state.has(Flags.UP_TO_DATE),
            consistent=state.current is not None and state.has(Flags.CONSISTENT),
            detail=replica.alarm or ("its content is given up" if state.has(Flags.DISCARD) else ""),
            fallback=fallback.name if fallback is not None else "",
            size=state.size,
        )
