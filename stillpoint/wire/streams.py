"""The methods whose messages are coded by hand: gRPC moves their bytes untouched.

A server registers them before the generated handlers of the same service, which then answer the rest.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import grpc

from .v1 import backup_pb2, export_pb2

_EXPORT = "stillpoint.wire.v1.ExportService"
_STANDBY = "stillpoint.wire.v1.StandbyService"
_BACKUP = "stillpoint.wire.v1.BackupService"


def read_snapshot(channel: grpc.aio.Channel, request: export_pb2.ReadSnapshotRequest) -> AsyncIterator[bytes]:
    """ExportService.ReadSnapshot; each item is one encoded Chunk (chunks.decode)."""
    call: Any = channel.unary_stream(
        f"/{_EXPORT}/ReadSnapshot", request_serializer=export_pb2.ReadSnapshotRequest.SerializeToString
    )(request)
    return cast("AsyncIterator[bytes]", call)


def read_backup(channel: grpc.aio.Channel, request: backup_pb2.ReadBackupRequest) -> AsyncIterator[bytes]:
    """BackupService.ReadBackup; each item is one encoded Chunk (chunks.decode)."""
    call: Any = channel.unary_stream(
        f"/{_BACKUP}/ReadBackup", request_serializer=backup_pb2.ReadBackupRequest.SerializeToString
    )(request)
    return cast("AsyncIterator[bytes]", call)


def mirror_stream(channel: grpc.aio.Channel) -> grpc.aio.StreamStreamCall[bytes, bytes]:
    """StandbyService.MirrorStream; each message is one encoded Frames (chunks.encode_frames, decode_frames)."""
    return channel.stream_stream(f"/{_STANDBY}/MirrorStream")()


def _add(server: grpc.aio.Server, service: str, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> None:
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))


def serve_read_snapshot(server: grpc.aio.Server, handler: Callable[..., AsyncIterator[bytes]]) -> None:
    _add(
        server,
        _EXPORT,
        "ReadSnapshot",
        grpc.unary_stream_rpc_method_handler(handler, request_deserializer=export_pb2.ReadSnapshotRequest.FromString),
    )


def serve_read_backup(server: grpc.aio.Server, handler: Callable[..., AsyncIterator[bytes]]) -> None:
    _add(
        server,
        _BACKUP,
        "ReadBackup",
        grpc.unary_stream_rpc_method_handler(handler, request_deserializer=backup_pb2.ReadBackupRequest.FromString),
    )


def serve_mirror_stream(server: grpc.aio.Server, handler: Callable[..., Any]) -> None:
    """`handler` reads encoded Frames and writes encoded Frames through its context."""
    _add(server, _STANDBY, "MirrorStream", grpc.stream_stream_rpc_method_handler(handler))
