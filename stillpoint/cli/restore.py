"""A backup's bytes from the backup node onto a target where standbyctl runs."""

from __future__ import annotations

import grpc

from ..errors import ProtocolError
from ..target import Target, open_target
from ..wire.chunks import decode
from ..wire.streams import read_backup
from ..wire.v1 import backup_pb2
from .nodes import Nodes
from .output import ProgressBar


async def restore_here(nodes: Nodes, backup: backup_pb2.Backup, target: str, *, force: bool, bar: ProgressBar) -> int:
    """Bytes of data written; holes are not. The target is complete and durable on return.

    Raises AlreadyExists or Refused, with the target unchanged, when it may not or cannot take the backup; after any
    other error it never looks complete.
    """
    opened = await open_target(target, size=backup.size, force=force)
    try:
        written = await _copy(nodes, backup, opened, bar)
        await opened.finish()
    except BaseException:
        await opened.abort()
        raise
    return written


async def _copy(nodes: Nodes, backup: backup_pb2.Backup, target: Target, bar: ProgressBar) -> int:
    """Raises ProtocolError unless exactly the backup's bytes come, in order and without gaps."""
    expected = written = 0
    try:
        async for message in read_backup(nodes.backup.channel, backup_pb2.ReadBackupRequest(id=backup.id)):
            chunk = decode(message)
            if chunk.offset != expected or chunk.length > backup.size - expected:
                raise ProtocolError(f"backup {backup.id}: the backup node sent bytes out of order at {expected}")
            if chunk.hole_length:
                await target.zeroes(chunk.offset, chunk.hole_length)
            else:
                await target.write(chunk.offset, chunk.data)
                written += len(chunk.data)
            expected += chunk.length
            bar.update(expected, backup.size)
    except grpc.RpcError as error:
        raise nodes.backup.translate(error) from None
    if expected != backup.size:
        raise ProtocolError(f"backup {backup.id}: the backup node ended at byte {expected} of {backup.size}")
    return written
