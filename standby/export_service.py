"""ExportService: snapshots over gRPC, answered by the export process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc

from stillpoint.checksum import crc32
from stillpoint.devices import BlockDevice, OverlayDevice
from stillpoint.errors import DataCorrupt, InvalidRequest, PermissionRefused
from stillpoint.extents import Extent, check_range, split
from stillpoint.runtime import node_info
from stillpoint.wire import chunks, streams
from stillpoint.wire.status import Context, answers
from stillpoint.wire.v1 import common_pb2, export_pb2, export_pb2_grpc

from .changes import Changes, Instant

if TYPE_CHECKING:
    from .export import ExportNode
    from .exported import Exported

SERVICE_NAME = "stillpoint.wire.v1.ExportService"

# How far ahead holes are looked for: one answer of the filesystem covers this much, however many messages it becomes.
_LOOK_AHEAD = 1 << 30
_EXTENTS_PER_PART = 4096


def _wanted(request: export_pb2.ReadSnapshotRequest, size: int) -> list[Extent]:
    """Raises InvalidRequest, and what `check_range` raises."""
    if not request.offsets and not request.lengths:
        check_range(offset=request.offset, length=request.length, size=size)
        return [Extent(request.offset, request.length or size - request.offset)]
    if len(request.offsets) != len(request.lengths) or len(request.offsets) > _EXTENTS_PER_PART:
        raise InvalidRequest(f"a read names at most {_EXTENTS_PER_PART} parts, each with its offset and its length")
    parts = list(map(Extent, request.offsets, request.lengths))
    end = 0
    for part in parts:
        check_range(offset=part.offset, length=part.length, size=size)
        if part.offset < end or not part.length:
            raise InvalidRequest("the parts of a read are out of order, or one of them is empty")
        end = part.end
    return parts


class ExportService(export_pb2_grpc.ExportServiceServicer):
    def __init__(self, node: ExportNode) -> None:
        self._node = node

    def add_to(self, server: grpc.aio.Server) -> None:
        export_pb2_grpc.add_ExportServiceServicer_to_server(self, streams.RawServer(server))

    @answers
    async def ReadSnapshot(self, request: export_pb2.ReadSnapshotRequest, context: Context) -> AsyncIterator[bytes]:
        exported = self._node.find(request.volume, request.snapshot)
        device: BlockDevice = exported.device
        if request.with_writes and exported.overlay is not None:
            device = exported.overlay
        wanted = _wanted(request, device.size)
        message_size = request.message_size or chunks.MESSAGE_SIZE
        if not 4096 <= message_size <= chunks.MESSAGE_SIZE:
            raise InvalidRequest(f"message_size must be from 4096 to {chunks.MESSAGE_SIZE} bytes, not {message_size}")
        with exported.streaming(context.peer()):
            # One for all messages: encoding copies it out.
            scratch = memoryview(bytearray(min(message_size, max(extent.length for extent in wanted))))
            for extent in wanted:
                async for message in self._read(device, extent, scratch):
                    yield message

    async def _read(self, device: BlockDevice, wanted: Extent, scratch: memoryview) -> AsyncIterator[bytes]:
        for ahead in split(wanted, limit=_LOOK_AHEAD):
            for mapped in device.extents(ahead.offset, ahead.length):
                if mapped.hole:
                    yield chunks.encode_hole(mapped.offset, mapped.length)
                    continue
                for piece in split(Extent(mapped.offset, mapped.length), limit=len(scratch)):
                    data = scratch[: piece.length]
                    await self._fill(device, piece.offset, data)
                    self._node.read_bytes += piece.length
                    yield chunks.encode_data(piece.offset, data)

    async def _fill(self, device: BlockDevice, offset: int, data: memoryview) -> None:
        if not device.try_read_into(offset, data):
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._node.executor, device.read_into, offset, data)

    @answers
    async def WriteSnapshot(
        self, parts: AsyncIterator[export_pb2.WriteSnapshotPart], context: Context
    ) -> export_pb2.WriteSnapshotResponse:
        first = await anext(parts, None)
        if first is None:
            raise InvalidRequest("a write names its snapshot in the first part")
        exported = self._node.find(first.volume, first.snapshot)
        overlay = exported.overlay
        if overlay is None:
            raise PermissionRefused(
                f"snapshot {first.volume}@{first.snapshot} is read-only;"
                f" `snapshot export {first.volume}@{first.snapshot} --writable` makes it writable"
            )
        loop = asyncio.get_running_loop()
        with exported.streaming(context.peer()):
            written = await loop.run_in_executor(self._node.executor, _write, overlay, first.chunk)
            async for part in parts:
                written += await loop.run_in_executor(self._node.executor, _write, overlay, part.chunk)
            await loop.run_in_executor(self._node.executor, overlay.flush)
        return export_pb2.WriteSnapshotResponse(written_bytes=written)

    @answers
    async def ChangedExtents(
        self, request: export_pb2.ChangedExtentsRequest, context: Context
    ) -> AsyncIterator[export_pb2.ChangedExtentsPart]:
        exported = self._node.find(request.volume, request.snapshot)
        if request.base:
            base = exported.instant(request.base)
        else:
            base = Instant(request.base_incarnation, request.base_generation)
        changes = exported.changes(base)
        with exported.streaming(context.peer()):
            async for part in self._changed(exported, changes):
                yield part

    async def _changed(self, exported: Exported, changes: Changes) -> AsyncIterator[export_pb2.ChangedExtentsPart]:
        """At least one part, whose `known` is said of all of them; neighbours of one window are joined."""
        loop = asyncio.get_running_loop()
        windows = changes.runs(0, exported.device.size)
        part = export_pb2.ChangedExtentsPart(known=changes.known)
        while (runs := await loop.run_in_executor(exported.executor, next, windows, None)) is not None:
            for start, end in runs:
                if part.offsets and part.offsets[-1] + part.lengths[-1] == start:
                    part.lengths[-1] = end - part.offsets[-1]
                    continue
                if len(part.offsets) == _EXTENTS_PER_PART:
                    yield part
                    part = export_pb2.ChangedExtentsPart(known=changes.known)
                part.offsets.append(start)
                part.lengths.append(end - start)
        yield part

    @answers
    async def DescribeSnapshot(
        self, request: export_pb2.DescribeSnapshotRequest, context: Context
    ) -> export_pb2.SnapshotDescription:
        exported = self._node.find(request.volume, request.snapshot)
        return export_pb2.SnapshotDescription(
            volume=request.volume,
            snapshot=request.snapshot,
            snapshot_uuid=exported.uuid,
            volume_uuid=exported.description["uuid"],
            size=exported.device.size,
            block_size=exported.block_size,
            created_ns=exported.snapshot["created_ns"],
            incarnation=exported.incarnation,
            generation=exported.device.generation,
        )

    @answers
    async def GetStatus(self, request: common_pb2.Empty, context: Context) -> export_pb2.ExportStatus:
        return export_pb2.ExportStatus(
            info=node_info("export"),
            nbd_clients=self._node.nbd.connection_count,
            streams=self._node.streams,
            read_bytes=self._node.read_bytes,
        )


def _write(overlay: OverlayDevice, chunk: common_pb2.Chunk) -> int:
    """The bytes written. Raises DataCorrupt, InvalidRequest, OutOfRange, DeviceError, SnapshotInvalid."""
    if chunk.data and chunk.hole_length:
        raise InvalidRequest("a chunk is a hole and has data")
    if crc32(chunk.data) != chunk.crc32:
        raise DataCorrupt(f"the data received for offset {chunk.offset} does not match its checksum")
    if chunk.hole_length:
        overlay.write_zeroes(chunk.offset, chunk.hole_length)
        return chunk.hole_length
    overlay.write(chunk.offset, (chunk.data,))
    return len(chunk.data)
