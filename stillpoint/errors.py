"""The operating errors of Stillpoint.

Each says, in one line for an operator, what was being done to which volume or file, and where useful what to do next.
Broken invariants are not here: those are `assert`, and a node refuses to start under `python -O`.

At the edges they become a gRPC status (`wire/status.py`), an NBD errno (`nbd/server.py`) or an exit code (`cli/`).
"""

from __future__ import annotations


class StillpointError(Exception):
    """Any error an operator may see; `str()` of it is one complete line."""


class InvalidRequest(StillpointError):
    """The caller asked for something that makes no sense (bad size, bad name, bad option). Nothing was changed."""


class ConfigError(InvalidRequest):
    """A configuration file cannot be used."""


class NotFound(StillpointError):
    """The named volume, snapshot, store or backup does not exist."""


class AlreadyExists(StillpointError):
    """The name is taken."""


class Refused(StillpointError):
    """The request is well formed but the state of the volume or node forbids it now. Nothing was changed."""


class PermissionRefused(StillpointError):
    """The thing asked for is not allowed, such as a write to a read-only virtual device."""


class InUse(Refused):
    """A device, file, port or state directory is held by another process."""


class PeerUnavailable(StillpointError):
    """The other node cannot be reached, or the connection to it ended."""


class ProtocolError(StillpointError):
    """The peer sent something its protocol does not allow; the connection is closed."""


class FencedError(StillpointError):
    """The peer knows a newer epoch or session of this volume; this sender must stop serving it."""


class DeviceError(StillpointError):
    """A device failed a read, write or flush. After a failed write or flush the device is not to be trusted."""

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class OutOfRange(InvalidRequest):
    """An extent does not lie within its device."""


class StoreFull(StillpointError):
    """A preservation store has no room for more blocks."""


class SnapshotInvalid(StillpointError):
    """The snapshot lost blocks (its store was full or lost) and is never served again."""


class DataCorrupt(StillpointError):
    """Stored data does not match its checksum."""
