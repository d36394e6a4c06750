"""The methods whose messages are coded by hand: gRPC moves their bytes untouched.

A server registers their services through `RawServer`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
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


# The methods whose handlers get or give encoded messages: service → method → (requests, responses).
_RAW: dict[str, dict[str, tuple[bool, bool]]] = {
    _EXPORT: {"ReadSnapshot": (False, True)},
    _BACKUP: {"ReadBackup": (False, True)},
    _STANDBY: {"MirrorStream": (True, True)},
}


class RawServer:
    """Stands before the server while a generated `add_…_to_server` registers a service.

    The handlers of the methods in `_RAW` then yield, and for MirrorStream read, encoded messages.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """The same handlers come once more by `add_registered_method_handlers`; these would not be raw."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        raw = dict(handlers)
        for method, (requests, responses) in _RAW.get(service, {}).items():
            if requests:
                raw[method] = raw[method]._replace(request_deserializer=None)
            if responses:
                raw[method] = raw[method]._replace(response_serializer=None)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, raw),))
        self._server.add_registered_method_handlers(service, raw)
