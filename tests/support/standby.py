"""A standby of one process for tests of the backup node: real gRPC, snapshots of images in memory or in a file.

It misbehaves on request: `faults` are taken one for each stream that is opened.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from stillpoint.config import Address
from stillpoint.devices import BlockDevice
from stillpoint.errors import AlreadyExists, NotFound, PeerUnavailable
from stillpoint.extents import Extent, split
from stillpoint.runtime import serve_grpc
from stillpoint.wire import chunks, streams
from stillpoint.wire.status import Context, answers
from stillpoint.wire.v1 import (
    common_pb2,
    export_pb2,
    export_pb2_grpc,
    replica_pb2,
    replica_pb2_grpc,
    standby_pb2,
    standby_pb2_grpc,
)

# What a stream does instead of what it should: (message, its index in the stream) -> the messages to send.
Fault = Callable[[bytes, int], list[bytes]]


@dataclass
class StandInStandby(
    standby_pb2_grpc.StandbyServiceServicer,
    export_pb2_grpc.ExportServiceServicer,
    replica_pb2_grpc.ReplicaServiceServicer,
):
    """`volumes` by name. A snapshot shares its volume's device: the tests leave that alone meanwhile.

    Changes are what `note_changed` was told of since the base's generation.
    """

    volumes: dict[str, BlockDevice]
    snapshots: dict[tuple[str, str], standby_pb2.Snapshot] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    message_size: int = chunks.MESSAGE_SIZE
    stream_count: int = 0
    delay_s: float = 0.0  # before each message
    lost_answers: list[str] = field(default_factory=list)  # methods that are carried out and not answered, once each
    created_count: int = 0
    incarnation: str = "life-1"
    bookmarks: dict[tuple[str, str], int] = field(default_factory=dict)
    changes: list[tuple[int, Extent]] = field(default_factory=list)
    sent_bytes: int = 0
    serves: bool = False  # as a primary, not a standby
    up_to_date: bool = True
    consistent: bool = True
    staged_bytes: int | None = 0  # of each mirror, as GetStatus tells; None: it does not answer

    def add_to(self, server: grpc.aio.Server) -> None:
        add_standby: Any = standby_pb2_grpc.add_StandbyServiceServicer_to_server
        add_export: Any = export_pb2_grpc.add_ExportServiceServicer_to_server
        add_standby(self, streams.RawServer(server))
        add_export(self, streams.RawServer(server))
        add_replica: Any = replica_pb2_grpc.add_ReplicaServiceServicer_to_server
        add_replica(self, server)

    @answers
    async def ListReplicas(self, _request: common_pb2.Empty, _: Context) -> replica_pb2.ReplicaList:
        role = replica_pb2.REPLICA_ROLE_PRIMARY if self.serves else replica_pb2.REPLICA_ROLE_STANDBY
        replicas = [
            replica_pb2.Replica(volume=name, role=role, up_to_date=self.up_to_date, consistent=self.consistent)
            for name in self.volumes
        ]
        return replica_pb2.ReplicaList(replicas=replicas)

    @answers
    async def CreateSnapshot(self, request: standby_pb2.CreateSnapshotRequest, _: Context) -> standby_pb2.SnapshotList:
        (volume,) = request.volumes
        if volume not in self.volumes:
            raise NotFound(f"there is no volume {volume}")
        if (volume, request.name) in self.snapshots:
            raise AlreadyExists(f"{volume}@{request.name} exists already")
        self.created_count += 1
        snapshot = standby_pb2.Snapshot(
            volume=volume,
            name=request.name,
            uuid=f"uuid-{self.created_count}",
            state=standby_pb2.SNAPSHOT_STATE_ACTIVE,
            size=self.volumes[volume].size,
            in_sync=True,
            generation=self.created_count,
            created_ns=time.time_ns(),
        )
        self.snapshots[volume, request.name] = snapshot
        return standby_pb2.SnapshotList(snapshots=[snapshot])

    @answers
    async def ListSnapshots(self, _request: standby_pb2.ListSnapshotsRequest, _: Context) -> standby_pb2.SnapshotList:
        return standby_pb2.SnapshotList(snapshots=list(self.snapshots.values()))

    @answers
    async def DeleteSnapshot(self, request: standby_pb2.DeleteSnapshotRequest, _: Context) -> common_pb2.Empty:
        snapshot = self._snapshot(request.volume, request.name)
        del self.snapshots[request.volume, request.name]
        if request.bookmark:
            self.bookmarks[request.volume, request.bookmark] = snapshot.generation
        self._lose_answer("DeleteSnapshot")
        return common_pb2.Empty()

    @answers
    async def ListBookmarks(self, request: standby_pb2.ListBookmarksRequest, _: Context) -> standby_pb2.BookmarkList:
        self._lose_answer("ListBookmarks")
        marks = [
            standby_pb2.Bookmark(volume=volume, name=name, incarnation=self.incarnation, generation=generation)
            for (volume, name), generation in self.bookmarks.items()
            if volume == request.volume
        ]
        return standby_pb2.BookmarkList(bookmarks=marks)

    @answers
    async def DeleteBookmark(self, request: standby_pb2.BookmarkName, _: Context) -> common_pb2.Empty:
        if (request.volume, request.name) not in self.bookmarks:
            raise NotFound(f"there is no bookmark {request.volume}@{request.name}")
        del self.bookmarks[request.volume, request.name]
        self._lose_answer("DeleteBookmark")
        return common_pb2.Empty()

    @answers
    async def GetStatus(self, _request: common_pb2.Empty, _: Context) -> standby_pb2.StandbyStatus:
        if self.staged_bytes is None:
            raise PeerUnavailable("not now")
        mirrors = [standby_pb2.Mirror(volume=name, staged_bytes=self.staged_bytes) for name in self.volumes]
        return standby_pb2.StandbyStatus(mirrors=mirrors)

    def _lose_answer(self, method: str) -> None:
        if method in self.lost_answers:
            self.lost_answers.remove(method)
            raise PeerUnavailable("the connection broke before the answer")

    def note_changed(self, offset: int, length: int) -> None:
        self.changes.append((self.created_count + 1, Extent(offset, length)))

    @answers
    async def ChangedExtents(
        self, request: export_pb2.ChangedExtentsRequest, _: Context
    ) -> AsyncIterator[export_pb2.ChangedExtentsPart]:
        snapshot = self._snapshot(request.volume, request.snapshot)
        self._lose_answer("ChangedExtents")
        known = request.base_incarnation == self.incarnation and request.base_generation <= snapshot.generation
        part = export_pb2.ChangedExtentsPart(known=known)
        end = 0
        for birth, extent in sorted(self.changes, key=lambda change: change[1]):
            if known and birth > request.base_generation and extent.end > end:
                start, end = max(end, extent.offset), min(extent.end, snapshot.size)
                part.offsets.append(start)
                part.lengths.append(end - start)
        yield part

    @answers
    async def DescribeSnapshot(
        self, request: export_pb2.DescribeSnapshotRequest, _: Context
    ) -> export_pb2.SnapshotDescription:
        snapshot = self._snapshot(request.volume, request.snapshot)
        return export_pb2.SnapshotDescription(
            volume=request.volume,
            snapshot=request.snapshot,
            snapshot_uuid=snapshot.uuid,
            volume_uuid=f"volume-{request.volume}",
            size=snapshot.size,
            block_size=65536,
            created_ns=snapshot.created_ns,
            incarnation=self.incarnation,
            generation=snapshot.generation,
        )

    @answers
    async def ReadSnapshot(self, request: export_pb2.ReadSnapshotRequest, _: Context) -> AsyncIterator[bytes]:
        self._snapshot(request.volume, request.snapshot)
        self.stream_count += 1
        fault = self.faults.pop(0) if self.faults else None
        device = self.volumes[request.volume]
        parts = list(zip(request.offsets, request.lengths, strict=True)) or [(request.offset, request.length)]
        messages = (message for offset, length in parts for message in self._messages(device, offset, length))
        for index, message in enumerate(messages):
            await asyncio.sleep(self.delay_s)
            for answer in fault(message, index) if fault else [message]:
                yield answer

    def _messages(self, device: BlockDevice, offset: int, length: int) -> Any:
        for extent in device.extents(offset, length or device.size - offset):
            if extent.hole:
                yield chunks.encode_hole(extent.offset, extent.length)
                continue
            for piece in split(Extent(extent.offset, extent.length), limit=self.message_size):
                buffer = bytearray(piece.length)
                device.read_into(piece.offset, memoryview(buffer))
                self.sent_bytes += piece.length
                yield chunks.encode_data(piece.offset, buffer)

    def _snapshot(self, volume: str, name: str) -> standby_pb2.Snapshot:
        try:
            return self.snapshots[volume, name]
        except KeyError:
            raise NotFound(f"there is no snapshot {volume}@{name}") from None


def breaks_at(message_index: int) -> Fault:
    """The connection ends before that message."""

    def fault(message: bytes, index: int) -> list[bytes]:
        if index == message_index:
            raise PeerUnavailable("going away")
        return [message]

    return fault


def damages(message_index: int) -> Fault:
    """The last byte of that message is another one when it arrives."""

    def fault(message: bytes, index: int) -> list[bytes]:
        return [message[:-1] + bytes([message[-1] ^ 1])] if index == message_index else [message]

    return fault


@asynccontextmanager
async def serving(standby: StandInStandby) -> AsyncIterator[Address]:
    """The address of both its services."""
    names = ["stillpoint.wire.v1.StandbyService", "stillpoint.wire.v1.ExportService"]
    server = await serve_grpc(Address("127.0.0.1", 0), standby.add_to, names)
    try:
        yield server.address
    finally:
        await server.stop(grace_s=0)
