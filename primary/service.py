"""PrimaryService: the node's answers as messages."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator

import grpc

from stillpoint.errors import InvalidRequest
from stillpoint.runtime import node_info
from stillpoint.wire.status import Context, answers
from stillpoint.wire.v1 import common_pb2, primary_pb2, primary_pb2_grpc

from .gate import LossPolicy
from .mirrored_device import AckMode, CongestionPolicy
from .node import PrimaryNode
from .pair import PairState
from .verify import Comparison
from .volume import Volume

_PROGRESS_S = 0.2  # between two messages of a stream

SERVICE_NAME = "stillpoint.wire.v1.PrimaryService"

_MODES = {
    primary_pb2.ACK_MODE_UNSPECIFIED: AckMode.SYNC,
    primary_pb2.ACK_MODE_ASYNC: AckMode.ASYNC,
    primary_pb2.ACK_MODE_SYNC: AckMode.SYNC,
    primary_pb2.ACK_MODE_DURABLE: AckMode.DURABLE,
}
_MODE_CODES = {mode: code for code, mode in _MODES.items() if code != primary_pb2.ACK_MODE_UNSPECIFIED}
_LOSS_POLICIES = {
    primary_pb2.ON_STANDBY_LOSS_CONTINUE: LossPolicy.CONTINUE,
    primary_pb2.ON_STANDBY_LOSS_SUSPEND: LossPolicy.SUSPEND,
    primary_pb2.ON_STANDBY_LOSS_ERROR: LossPolicy.ERROR,
}
_LOSS_POLICY_CODES = {policy: code for code, policy in _LOSS_POLICIES.items()}
_CONGESTION = {
    primary_pb2.CONGESTION_BLOCK: CongestionPolicy.BLOCK,
    primary_pb2.CONGESTION_DETACH: CongestionPolicy.DETACH,
}
_CONGESTION_CODES = {policy: code for code, policy in _CONGESTION.items()}
_STATES = {
    PairState.DISCONNECTED: primary_pb2.PAIR_STATE_DISCONNECTED,
    PairState.SYNCING: primary_pb2.PAIR_STATE_SYNCING,
    PairState.IN_SYNC: primary_pb2.PAIR_STATE_IN_SYNC,
    PairState.SPLIT_BRAIN: primary_pb2.PAIR_STATE_SPLIT_BRAIN,
}


class PrimaryService(primary_pb2_grpc.PrimaryServiceServicer):
    def __init__(self, node: PrimaryNode) -> None:
        self._node = node

    def add_to(self, server: grpc.aio.Server) -> None:
        primary_pb2_grpc.add_PrimaryServiceServicer_to_server(self, server)

    @answers
    async def CreateVolume(self, request: primary_pb2.CreateVolumeRequest, context: Context) -> primary_pb2.Volume:
        if request.mode not in _MODES:
            raise InvalidRequest(f"unknown mode {request.mode}")
        volume = await self._node.create_volume(
            request.name,
            size=request.size,
            block_size=request.block_size,
            device_paths=list(request.device_paths),
            mirror_device_paths=list(request.mirror_device_paths),
            mode=_MODES[request.mode],
        )
        return describe(volume, self._node)

    @answers
    async def GetVolume(self, request: primary_pb2.GetVolumeRequest, context: Context) -> primary_pb2.Volume:
        return describe(self._node.volume(request.name), self._node)

    @answers
    async def ListVolumes(self, request: common_pb2.Empty, context: Context) -> primary_pb2.VolumeList:
        return primary_pb2.VolumeList(volumes=self._volumes())

    @answers
    async def ResizeVolume(self, request: primary_pb2.ResizeVolumeRequest, context: Context) -> primary_pb2.Volume:
        return describe(await self._node.resize_volume(request.name, size=request.size), self._node)

    @answers
    async def SetVolume(self, request: primary_pb2.SetVolumeRequest, context: Context) -> primary_pb2.Volume:
        volume = self._node.volume(request.name)
        try:
            volume.set(
                mode=_MODES[request.mode] if request.mode else None,
                on_standby_loss=_LOSS_POLICIES[request.on_standby_loss] if request.on_standby_loss else None,
                congestion=_CONGESTION[request.congestion] if request.congestion else None,
                resync_rate=request.resync_rate if request.HasField("resync_rate") else None,
            )
        except KeyError as error:
            raise InvalidRequest(f"volume {request.name!r}: unknown setting {error}") from None
        return describe(volume, self._node)

    @answers
    async def ResumeVolume(self, request: primary_pb2.ResumeVolumeRequest, context: Context) -> primary_pb2.Volume:
        volume = self._node.volume(request.name)
        volume.export.gate.excuse()
        return describe(volume, self._node)

    @answers
    async def ResyncVolume(self, request: primary_pb2.ResyncVolumeRequest, context: Context) -> primary_pb2.Volume:
        return describe(await self._node.resync_volume(request.name), self._node)

    @answers
    async def DeleteVolume(self, request: primary_pb2.DeleteVolumeRequest, context: Context) -> common_pb2.Empty:
        await self._node.delete_volume(request.name, force=request.force)
        return common_pb2.Empty()

    @answers
    async def Freeze(self, request: primary_pb2.FreezeRequest, context: Context) -> primary_pb2.FreezeId:
        volumes = [self._node.volume(name) for name in request.volumes]
        identity = await self._node.quiescer.freeze(volumes, limit_s=request.limit_ms / 1000)
        return primary_pb2.FreezeId(id=identity)

    @answers
    async def Thaw(self, request: primary_pb2.FreezeId, context: Context) -> common_pb2.Empty:
        await self._node.quiescer.thaw(request.id)
        return common_pb2.Empty()

    @answers
    async def VerifyMirror(
        self, request: primary_pb2.VerifyMirrorRequest, context: Context
    ) -> AsyncIterator[primary_pb2.VerifyEvent]:
        pair = self._node.volume(request.volume).pair
        comparison, told_at = Comparison(0), 0.0
        async with contextlib.aclosing(pair.verify(repair=request.repair, rate=request.rate)) as steps:
            async for comparison in steps:
                if time.monotonic() - told_at > _PROGRESS_S:
                    told_at = time.monotonic()
                    yield primary_pb2.VerifyEvent(progress=_progress(comparison, done=False))
        yield primary_pb2.VerifyEvent(
            progress=_progress(comparison, done=True),
            offsets=[extent.offset for extent in comparison.different],
            lengths=[extent.length for extent in comparison.different],
            undecided_bytes=sum(extent.length for extent in comparison.undecided),
            repaired=request.repair and bool(comparison.different),
        )

    @answers
    async def GetStatus(self, request: common_pb2.Empty, context: Context) -> primary_pb2.PrimaryStatus:
        return primary_pb2.PrimaryStatus(
            info=node_info("primary"),
            volumes=self._volumes(),
            standby_address=str(self._node.standby.address),
            nbd_address=str(self._node.nbd_address),
        )

    def _volumes(self) -> list[primary_pb2.Volume]:
        return [describe(volume, self._node) for _, volume in sorted(self._node.volumes.items())]


def _progress(comparison: Comparison, *, done: bool) -> common_pb2.Progress:
    return common_pb2.Progress(
        phase="verify",
        done_bytes=comparison.done_bytes,
        total_bytes=comparison.total_bytes,
        moved_bytes=comparison.done_bytes,
        done=done,
    )


def describe(volume: Volume, node: PrimaryNode) -> primary_pb2.Volume:
    record, export, pair = volume.record, volume.export, volume.pair
    progress = pair.progress
    return primary_pb2.Volume(
        name=record.name,
        uuid=record.uuid,
        size=record.size,
        block_size=record.block_size,
        mode=_MODE_CODES[export.mode],
        device_paths=record.device_paths,
        clients=export.connection_count,
        created_ns=record.created_ns,
        read_bytes=export.traffic.read_bytes,
        written_bytes=export.traffic.written_bytes,
        failure=volume.failure,
        on_standby_loss=_LOSS_POLICY_CODES[export.gate.policy],
        congestion=_CONGESTION_CODES[export.congestion],
        resync_rate=record.resync_rate,
        suspended=export.gate.reasons,
        refusing=export.gate.refusing,
        withheld_count=export.withheld_count,
        hot_bytes=volume.intent.hot_bytes if volume.intent is not None else 0,
        crash_resync_bytes_max=volume.crash_resync_bytes_max,
        read_failures=export.rescue.failure_count,
        repaired_bytes=export.rescue.repaired_bytes,
        pair=primary_pb2.Pair(
            state=_STATES[pair.state],
            since_ns=pair.since_ns,
            dirty_bytes=volume.dirty.dirty_bytes,
            unflushed_bytes=volume.dirty.unflushed_bytes,
            in_flight_bytes=pair.sender.in_flight_bytes if pair.sender is not None else 0,
            resync_done_bytes=progress.done_bytes if progress is not None else 0,
            resync_total_bytes=progress.total_bytes if progress is not None else 0,
            resync_rate=progress.rate if progress is not None else 0,
            carrier=node.standby.carrier.value,
            detail=pair.detail,
            session=max((peer.session for peer in volume.replica.state.peers), default=0),
            verified_ns=pair.verified_ns,
            mismatch_bytes=pair.mismatch_bytes,
            lag_ms=round(1000 * pair.sender.behind_s) if pair.sender is not None else 0,
        ),
    )
