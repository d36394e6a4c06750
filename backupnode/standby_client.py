"""The calls the backup node makes to the standby and to its export process, as plain values and named errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import grpc

from stillpoint.config import Address
from stillpoint.errors import DataCorrupt, PeerUnavailable
from stillpoint.extents import Extent
from stillpoint.tls import Credentials
from stillpoint.wire import chunks, streams
from stillpoint.wire.channel import open_channel
from stillpoint.wire.status import from_rpc_error
from stillpoint.wire.v1 import (
    common_pb2,
    export_pb2,
    export_pb2_grpc,
    replica_pb2,
    replica_pb2_grpc,
    standby_pb2,
    standby_pb2_grpc,
)

# A control call that takes longer finds a node that hangs.
_CALL_TIMEOUT_S: Final = 30.0
# The longest silence of a stream of data.
_READ_TIMEOUT_S: Final = 60.0


class DamagedInTransit(DataCorrupt):
    """Data arrived that does not match its checksum; asking for it again may help."""


class SnapshotName(NamedTuple):
    volume: str
    name: str

    def __str__(self) -> str:
        return f"{self.volume}@{self.name}"


@dataclass(frozen=True, slots=True)
class SnapshotDescription:
    uuid: str
    volume_uuid: str
    size: int
    created_ns: int
    incarnation: str = ""  # of the volume's block history; "": the standby keeps none
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Copy:
    """A data node's copy of a volume. serves: clients are served from it, so it has no standby's place."""

    serves: bool
    up_to_date: bool
    consistent: bool


class StandbyClient:
    """Every method raises PeerUnavailable when the node does not answer, and what the node says went wrong."""

    def __init__(self, *, standby: Address, export: Address, credentials: Credentials | None = None) -> None:
        self.address = standby
        self._standby_peer = f"standby at {standby}"
        self._export_peer = f"standby's export process at {export}"
        self._standby_channel = open_channel(standby, credentials)
        self._export_channel = open_channel(export, credentials)
        # The generated stubs carry no annotations.
        standby_stub: Any = standby_pb2_grpc.StandbyServiceStub
        export_stub: Any = export_pb2_grpc.ExportServiceStub
        replica_stub: Any = replica_pb2_grpc.ReplicaServiceStub
        self._standby = standby_stub(self._standby_channel)
        self._replicas = replica_stub(self._standby_channel)
        self._export = export_stub(self._export_channel)

    async def create_snapshot(self, snapshot: SnapshotName) -> bool:
        """Whether the standby's mirror was in sync with the volume at that instant."""
        request = standby_pb2.CreateSnapshotRequest(volumes=[snapshot.volume], name=snapshot.name)
        with _named_errors(self._standby_peer):
            answer = await self._standby.CreateSnapshot(request, timeout=_CALL_TIMEOUT_S)
        return all(made.in_sync for made in answer.snapshots)

    async def delete_snapshot(self, snapshot: SnapshotName, *, bookmark: str = "") -> None:
        """bookmark: remember the instant under this name."""
        request = standby_pb2.DeleteSnapshotRequest(volume=snapshot.volume, name=snapshot.name, bookmark=bookmark)
        with _named_errors(self._standby_peer):
            await self._standby.DeleteSnapshot(request, timeout=_CALL_TIMEOUT_S)

    async def copy_of(self, volume: str, *, timeout_s: float) -> Copy | None:
        """What the node has of the volume; None: nothing."""
        with _named_errors(self._standby_peer):
            answer = await self._replicas.ListReplicas(common_pb2.Empty(), timeout=timeout_s)
        for replica in answer.replicas:
            if replica.volume == volume:
                serves = replica.role == replica_pb2.REPLICA_ROLE_PRIMARY
                return Copy(serves, up_to_date=replica.up_to_date, consistent=replica.consistent)
        return None

    async def staged_bytes(self) -> int:
        """The most that the standby holds in memory of one volume's writes, not yet in its mirror."""
        with _named_errors(self._standby_peer):
            status = await self._standby.GetStatus(common_pb2.Empty(), timeout=_CALL_TIMEOUT_S)
        return max((mirror.staged_bytes for mirror in status.mirrors), default=0)

    async def list_snapshots(self) -> list[SnapshotName]:
        with _named_errors(self._standby_peer):
            answer = await self._standby.ListSnapshots(standby_pb2.ListSnapshotsRequest(), timeout=_CALL_TIMEOUT_S)
        return [SnapshotName(snapshot.volume, snapshot.name) for snapshot in answer.snapshots]

    async def list_bookmarks(self, volume: str) -> list[str]:
        request = standby_pb2.ListBookmarksRequest(volume=volume)
        with _named_errors(self._standby_peer):
            answer = await self._standby.ListBookmarks(request, timeout=_CALL_TIMEOUT_S)
        return [bookmark.name for bookmark in answer.bookmarks]

    async def delete_bookmark(self, volume: str, name: str) -> None:
        request = standby_pb2.BookmarkName(volume=volume, name=name)
        with _named_errors(self._standby_peer):
            await self._standby.DeleteBookmark(request, timeout=_CALL_TIMEOUT_S)

    async def changed_extents(
        self, snapshot: SnapshotName, *, incarnation: str, generation: int
    ) -> list[Extent] | None:
        """What may differ between the instant given and the snapshot, as the standby says; the caller checks it.

        None: the standby does not know that instant.
        """
        request = export_pb2.ChangedExtentsRequest(
            volume=snapshot.volume, snapshot=snapshot.name, base_incarnation=incarnation, base_generation=generation
        )
        extents: list[Extent] = []
        known: bool | None = None
        with _named_errors(self._export_peer):
            async with asyncio.timeout(_READ_TIMEOUT_S):
                async for part in self._export.ChangedExtents(request):
                    known = part.known if known is None else known
                    if not known:
                        return None
                    extents += map(Extent, part.offsets, part.lengths)
        return extents if known else None

    async def describe_snapshot(self, snapshot: SnapshotName) -> SnapshotDescription:
        request = export_pb2.DescribeSnapshotRequest(volume=snapshot.volume, snapshot=snapshot.name)
        with _named_errors(self._export_peer):
            answer = await self._export.DescribeSnapshot(request, timeout=_CALL_TIMEOUT_S)
        return SnapshotDescription(
            answer.snapshot_uuid,
            answer.volume_uuid,
            answer.size,
            answer.created_ns,
            answer.incarnation,
            answer.generation,
        )

    async def read_snapshot(
        self, snapshot: SnapshotName, extents: Sequence[Extent]
    ) -> AsyncGenerator[chunks.DecodedChunk, None]:
        """The snapshot's bytes in these extents, as the standby sends them; the caller checks their order.

        Iterate it within `contextlib.aclosing`: leaving it ends the call. Raises DamagedInTransit, ProtocolError.
        """
        request = export_pb2.ReadSnapshotRequest(volume=snapshot.volume, snapshot=snapshot.name)
        if len(extents) == 1:
            request.offset, request.length = extents[0].offset, extents[0].length
        else:
            request.offsets.extend(extent.offset for extent in extents)
            request.lengths.extend(extent.length for extent in extents)
        call: Any = streams.read_snapshot(self._export_channel, request)
        try:
            messages: AsyncIterator[bytes] = aiter(call)
            while True:
                with _named_errors(self._export_peer):
                    async with asyncio.timeout(_READ_TIMEOUT_S):
                        message = await anext(messages, None)
                if message is None:
                    return
                yield _decode(message)
        finally:
            call.cancel()

    async def close(self) -> None:
        await self._standby_channel.close()
        await self._export_channel.close()


def _decode(message: bytes) -> chunks.DecodedChunk:
    try:
        return chunks.decode(message)
    except DataCorrupt as error:
        raise DamagedInTransit(str(error)) from None


@contextlib.contextmanager
def _named_errors(peer: str) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, peer=peer) from None
    except TimeoutError:
        raise PeerUnavailable(f"the {peer} has sent nothing for {_READ_TIMEOUT_S:.0f} s") from None
