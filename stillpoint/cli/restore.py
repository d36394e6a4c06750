"""A backup's bytes from the backup node onto a target where standbyctl runs."""

from __future__ import annotations

import asyncio

import grpc

from ..archive import ArchiveReader
from ..errors import ProtocolError
from ..target import Target
from ..wire.chunks import decode
from ..wire.streams import read_backup
from ..wire.v1 import backup_pb2
from .nodes import Nodes
from .output import ProgressBar


async def restore_here(nodes: Nodes, backup: backup_pb2.Backup, target: Target, bar: ProgressBar) -> int:
    """Bytes of data written; holes are not. The target is complete and durable on return.

    After any error it never looks complete.
    """
    try:
        await _copy(nodes, backup, target, bar)
        await target.finish()
    except BaseException:
        await target.abort()
        raise
    return target.written_bytes


async def extract_archive(reader: ArchiveReader, target: Target, bar: ProgressBar) -> int:
    """`restore_here` from an archive. Raises DataCorrupt."""
    pieces = reader.pieces()
    try:
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            if piece.data is None:
                await target.zeroes(piece.offset, piece.length)
            else:
                await target.write(piece.offset, piece.data)
            bar.update(piece.offset + piece.length, reader.size)
        await target.finish()
    except BaseException:
        await target.abort()
        raise
    return target.written_bytes


async def _copy(nodes: Nodes, backup: backup_pb2.Backup, target: Target, bar: ProgressBar) -> None:
    """Raises ProtocolError unless exactly the backup's bytes come, in order and without gaps."""
    expected = 0
    try:
        async for message in read_backup(nodes.backup.channel, backup_pb2.ReadBackupRequest(id=backup.id)):
            chunk = decode(message)
            if chunk.offset != expected or chunk.length > backup.size - expected:
                raise ProtocolError(f"backup {backup.id}: the backup node sent bytes out of order at {expected}")
            if chunk.hole_length:
                await target.zeroes(chunk.offset, chunk.hole_length)
            else:
                await target.write(chunk.offset, chunk.data)
            expected += chunk.length
            bar.update(expected, backup.size)
    except grpc.RpcError as error:
        raise nodes.backup.translate(error) from None
    if expected != backup.size:
        raise ProtocolError(f"backup {backup.id}: the backup node ended at byte {expected} of {backup.size}")
