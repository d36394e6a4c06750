"""StandbyService: the node's answers as messages."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter

import grpc

from stillpoint.errors import InvalidRequest, NotFound, ProtocolError, Refused, SnapshotInvalid
from stillpoint.link import grpc as grpc_link
from stillpoint.link.frames import PROTOCOL_VERSION
from stillpoint.link.tokens import TokenGate
from stillpoint.replica.messages import pack_state, unpack_state
from stillpoint.runtime import node_info
from stillpoint.wire import streams
from stillpoint.wire.status import Context, answers
from stillpoint.wire.v1 import common_pb2, standby_pb2, standby_pb2_grpc

from . import policy
from .cow import Bookmark, Snapshot, SnapshotState, StoreStatistics
from .mirror import Mirror, MirrorState, Proposal
from .node import StandbyNode

SERVICE_NAME = "stillpoint.wire.v1.StandbyService"

_MIRROR_STATES = {
    MirrorState.DISCONNECTED: standby_pb2.MIRROR_STATE_DISCONNECTED,
    MirrorState.SYNCING: standby_pb2.MIRROR_STATE_SYNCING,
    MirrorState.IN_SYNC: standby_pb2.MIRROR_STATE_IN_SYNC,
    MirrorState.FAILED: standby_pb2.MIRROR_STATE_FAILED,
    MirrorState.SERVED: standby_pb2.MIRROR_STATE_SERVED,
}
_SNAPSHOT_STATES = {
    SnapshotState.CREATING: standby_pb2.SNAPSHOT_STATE_CREATING,
    SnapshotState.ACTIVE: standby_pb2.SNAPSHOT_STATE_ACTIVE,
    SnapshotState.INVALID: standby_pb2.SNAPSHOT_STATE_INVALID,
    SnapshotState.LEAVING: standby_pb2.SNAPSHOT_STATE_INVALID,
}
_STORE_KINDS = {standby_pb2.STORE_KIND_MEMORY: "memory", standby_pb2.STORE_KIND_FILE: "file"}
_STORE_KIND_CODES = {name: code for code, name in _STORE_KINDS.items()}


class StandbyService(standby_pb2_grpc.StandbyServiceServicer):
    def __init__(self, node: StandbyNode) -> None:
        self._node = node

    def add_to(self, server: grpc.aio.Server) -> None:
        standby_pb2_grpc.add_StandbyServiceServicer_to_server(self, streams.RawServer(server))

    # --- mirrors

    @answers
    async def CreateMirror(self, request: standby_pb2.CreateMirrorRequest, context: Context) -> standby_pb2.Mirror:
        mirror = await self._node.create_mirror(
            request.volume,
            volume_uuid=request.volume_uuid,
            size=request.size,
            block_size=request.block_size,
            device_paths=list(request.device_paths),
        )
        return describe_mirror(mirror)

    @answers
    async def ResizeMirror(self, request: standby_pb2.ResizeMirrorRequest, context: Context) -> standby_pb2.Mirror:
        mirror = await self._node.resize_mirror(request.volume, volume_uuid=request.volume_uuid, size=request.size)
        return describe_mirror(mirror)

    @answers
    async def DeleteMirror(self, request: standby_pb2.DeleteMirrorRequest, context: Context) -> common_pb2.Empty:
        await self._node.delete_mirror(request.volume, volume_uuid=request.volume_uuid, force=request.force)
        return common_pb2.Empty()

    @answers
    async def OpenLink(self, request: standby_pb2.OpenLinkRequest, context: Context) -> standby_pb2.OpenLinkResponse:
        if not request.protocol_min <= PROTOCOL_VERSION <= request.protocol_max:
            raise ProtocolError(
                f"this standby speaks version {PROTOCOL_VERSION} of the data link, "
                f"the primary {request.protocol_min} to {request.protocol_max}"
            )
        source = unpack_state(request.replica)
        replica, dirty_bytes = self._node.replicas.get(request.volume), self._node.served.dirty_bytes(request.volume)
        answer = standby_pb2.OpenLinkResponse(protocol=PROTOCOL_VERSION, dirty_bytes=dirty_bytes)
        # No session where the volume is served: what follows from two primaries is decided from both nodes' states.
        if not replica.is_primary:
            mirror = self._node.mirror(request.volume)
            proposal = Proposal(source, request.dirty_bytes, dirty_bytes, size=request.size, mode=request.mode)
            session, by = await mirror.begin_session(proposal)
            answer.session = session
            answer.token = self._node.tokens.issue(functools.partial(mirror.adopt, session, by))
            answer.data_link_port = self._node.data_link_port
        answer.replica = pack_state(replica.state)
        return answer

    @answers
    async def MirrorStream(self, request: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        gate = TokenGate(self._node.tokens, str(context.peer()))
        link = grpc_link.over_context(context, gate)
        gate.guard(link)
        try:
            await link.finished.wait()
        finally:
            link.abort()

    # --- snapshots

    @answers
    async def CreateSnapshot(
        self, request: standby_pb2.CreateSnapshotRequest, context: Context
    ) -> standby_pb2.SnapshotList:
        began = time.monotonic_ns()
        snapshots = await self._node.create_snapshot(
            list(request.volumes), name=request.name, store=request.store or None, writable=request.writable
        )
        duration_ns = time.monotonic_ns() - began
        answer = standby_pb2.SnapshotList(snapshots=[await self._describe(snapshot) for snapshot in snapshots])
        for described in answer.snapshots:
            described.create_duration_ns = duration_ns
        return answer

    @answers
    async def ListSnapshots(
        self, request: standby_pb2.ListSnapshotsRequest, context: Context
    ) -> standby_pb2.SnapshotList:
        names = [request.volume] if request.volume else sorted(self._node.mirrors)
        answer = standby_pb2.SnapshotList(
            snapshots=[
                await self._describe(snapshot)
                for name in names
                for snapshot in self._node.mirror(name).engine.snapshots()
            ]
        )
        readers = await self._node.export.readers([f"{each.volume}@{each.name}" for each in answer.snapshots])
        for described in answer.snapshots:
            described.readers = len(readers.get(f"{described.volume}@{described.name}", ()))
        return answer

    @answers
    async def GetSnapshot(self, request: standby_pb2.SnapshotName, context: Context) -> standby_pb2.Snapshot:
        described = await self._describe(self._node.mirror(request.volume).engine.get(request.name))
        identity = f"{request.volume}@{request.name}"
        described.reader_names.extend((await self._node.export.readers([identity])).get(identity, ()))
        described.readers = len(described.reader_names)
        return described

    @answers
    async def DeleteSnapshot(self, request: standby_pb2.DeleteSnapshotRequest, context: Context) -> common_pb2.Empty:
        await self._node.delete_snapshot(request.volume, request.name, bookmark=request.bookmark, wait=request.wait)
        return common_pb2.Empty()

    @answers
    async def ExportSnapshot(
        self, request: standby_pb2.ExportSnapshotRequest, context: Context
    ) -> standby_pb2.Snapshot:
        snapshot = self._node.mirror(request.volume).engine.get(request.name)
        if snapshot.state is not SnapshotState.ACTIVE:
            reason = snapshot.invalid_reason or f"it is {snapshot.state.name.lower()}"
            raise Refused(f"snapshot {request.volume}@{request.name} is not served: {reason}")
        if request.writable:
            await self._node.make_writable(request.volume, request.name)
        return await self._describe(snapshot)

    @answers
    async def ProtectSnapshot(
        self, request: standby_pb2.ProtectSnapshotRequest, context: Context
    ) -> standby_pb2.Snapshot:
        engine = self._node.mirror(request.volume).engine
        return await self._describe(await engine.protect(request.name, request.protected))

    @answers
    async def SetSnapshotPolicy(
        self, request: standby_pb2.SetSnapshotPolicyRequest, context: Context
    ) -> standby_pb2.SnapshotPolicy:
        engine = self._node.mirror(request.volume).engine
        await engine.set_limits(policy.merged(engine.own_limits, request))
        return policy.describe(engine)

    @answers
    async def ListSnapshotPolicies(
        self, request: standby_pb2.ListSnapshotPoliciesRequest, context: Context
    ) -> standby_pb2.SnapshotPolicyList:
        names = [request.volume] if request.volume else sorted(self._node.mirrors)
        return standby_pb2.SnapshotPolicyList(
            policies=[policy.describe(self._node.mirror(name).engine) for name in names]
        )

    @answers
    async def ListBookmarks(
        self, request: standby_pb2.ListBookmarksRequest, context: Context
    ) -> standby_pb2.BookmarkList:
        names = [request.volume] if request.volume else sorted(self._node.mirrors)
        return standby_pb2.BookmarkList(
            bookmarks=[
                describe_bookmark(bookmark) for name in names for bookmark in self._node.mirror(name).engine.bookmarks()
            ]
        )

    @answers
    async def DeleteBookmark(self, request: standby_pb2.BookmarkName, context: Context) -> common_pb2.Empty:
        await self._node.delete_bookmark(request.volume, request.name)
        return common_pb2.Empty()

    async def _describe(self, snapshot: Snapshot) -> standby_pb2.Snapshot:
        mirror = self._node.mirror(snapshot.volume)
        described = describe_snapshot(snapshot, mirror)
        if snapshot.state is SnapshotState.ACTIVE:
            with contextlib.suppress(NotFound, SnapshotInvalid):  # gone, or lost, since it was listed
                statistics = mirror.engine.statistics(snapshot.name)
                described.preserved_blocks = statistics.blocks_preserved
                described.preserved_bytes = statistics.blocks_preserved * mirror.record.block_size
                described.reclaimable_bytes = statistics.reclaimable_size
                described.shared_bytes = statistics.shared_size
        return described

    # --- stores

    @answers
    async def CreateStore(self, request: standby_pb2.CreateStoreRequest, context: Context) -> standby_pb2.Store:
        if request.kind not in _STORE_KINDS:
            raise InvalidRequest(f"store {request.name!r}: unknown kind {request.kind}")
        self._node.create_store(
            request.name,
            kind=_STORE_KINDS[request.kind],
            size=request.size,
            paths=list(request.paths),
            map_form=request.map,
            size_max=request.size_max,
        )
        return self._store(request.name)

    @answers
    async def ResizeStore(self, request: standby_pb2.ResizeStoreRequest, context: Context) -> standby_pb2.Store:
        await self._node.resize_store(request.name, request.size)
        return self._store(request.name)

    @answers
    async def ListStores(self, request: common_pb2.Empty, context: Context) -> standby_pb2.StoreList:
        reclaimable: Counter[int] = Counter()
        for mirror in list(self._node.mirrors.values()):
            reclaimable.update(mirror.engine.reclaimable())
        answer = standby_pb2.StoreList()
        for store in self._node.stores.list():
            described = describe_store(store)
            described.reclaimable_bytes = reclaimable[store.number]
            answer.stores.append(described)
        return answer

    @answers
    async def DeleteStore(self, request: standby_pb2.DeleteStoreRequest, context: Context) -> common_pb2.Empty:
        self._node.stores.delete(request.name)
        return common_pb2.Empty()

    def _store(self, name: str) -> standby_pb2.Store:
        for store in self._node.stores.list():
            if store.name == name:
                return describe_store(store)
        raise NotFound(f"there is no store {name!r}")

    # --- status

    @answers
    async def GetStatus(self, request: common_pb2.Empty, context: Context) -> standby_pb2.StandbyStatus:
        node = self._node
        return standby_pb2.StandbyStatus(
            info=node_info("standby"),
            mirrors=[describe_mirror(mirror) for _, mirror in sorted(node.mirrors.items())],
            stores=[describe_store(store) for store in node.stores.list()],
            export_pid=node.export.pid,
            export_grpc_address=str(node.export.grpc_address),
            nbd_address=str(node.export.nbd_address),
            received_bytes=sum(mirror.received_bytes for mirror in node.mirrors.values()),
        )


def describe_mirror(mirror: Mirror) -> standby_pb2.Mirror:
    record, receiver = mirror.record, mirror.receiver
    sequence = receiver.sequence if receiver is not None else 0
    return standby_pb2.Mirror(
        volume=record.volume,
        volume_uuid=record.volume_uuid,
        size=record.size,
        block_size=record.block_size,
        device_paths=record.device_paths,
        state=_MIRROR_STATES[mirror.state],
        since_ns=mirror.since_ns,
        detail=mirror.detail,
        snapshot_count=len(mirror.engine.snapshots()),
        staged_bytes=mirror.engine.staged_bytes,
        received_sequence=sequence,
        applied_sequence=sequence,
        flushed_sequence=receiver.flushed_sequence if receiver is not None else 0,
        session=mirror.replica.state.fence.session,
    )


def describe_snapshot(snapshot: Snapshot, mirror: Mirror) -> standby_pb2.Snapshot:
    """Without what has to be counted."""
    return standby_pb2.Snapshot(
        volume=snapshot.volume,
        name=snapshot.name,
        uuid=str(snapshot.uuid),
        state=_SNAPSHOT_STATES[snapshot.state],
        reason=snapshot.invalid_reason,
        size=snapshot.size,
        created_ns=snapshot.created_ns,
        generation=snapshot.generation,
        store=snapshot.store,
        in_sync=mirror.state in (MirrorState.IN_SYNC, MirrorState.SERVED),
        block_size=mirror.record.block_size,
        protected=snapshot.protected,
        writable=mirror.overlays.path(snapshot) is not None,
    )


def describe_bookmark(bookmark: Bookmark) -> standby_pb2.Bookmark:
    return standby_pb2.Bookmark(
        volume=bookmark.volume,
        name=bookmark.name,
        incarnation=str(bookmark.incarnation),
        generation=bookmark.generation,
        created_ns=bookmark.created_ns,
        snapshot_uuid=str(bookmark.snapshot),
    )


def describe_store(store: StoreStatistics) -> standby_pb2.Store:
    return standby_pb2.Store(
        name=store.name,
        uuid=store.uuid,
        kind=_STORE_KIND_CODES.get(store.kind, standby_pb2.STORE_KIND_UNSPECIFIED),
        size=store.size,
        used_bytes=store.used_size,
        failure=store.failed,
        paths=store.paths,
        map=store.map_form,
        size_max=store.size_max,
        used_percent=store.used_percent,
        warning_percent=store.warning_percent,
    )
