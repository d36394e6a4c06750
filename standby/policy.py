"""Snapshot policies as messages: the limits of a volume's snapshot engine under the names that operators use."""

from __future__ import annotations

from stillpoint.errors import InvalidRequest
from stillpoint.wire.v1 import standby_pb2

from .cow import OwnLimits, SnapshotEngine

# Field of the messages to field of the engine's Limits.
_FIELDS = {"expire": "expires", "count_max": "count_max", "preserved_bytes_max": "preserved_size_max"}


def merged(own: OwnLimits, request: standby_pb2.SetSnapshotPolicyRequest) -> OwnLimits:
    """The volume's own limits once the request is fulfilled. Raises InvalidRequest."""
    wanted = dict(own)
    for field in request.defaults:
        if field not in _FIELDS:
            raise InvalidRequest(f"a snapshot policy has no {field!r}; there are {', '.join(_FIELDS)}")
        wanted.pop(_FIELDS[field], None)
    for field, limit in _FIELDS.items():
        if request.HasField(field):
            wanted[limit] = getattr(request, field)
    return wanted


def describe(engine: SnapshotEngine) -> standby_pb2.SnapshotPolicy:
    limits = engine.limits
    return standby_pb2.SnapshotPolicy(
        volume=engine.name,
        expire=limits.expires,
        count_max=limits.count_max,
        preserved_bytes_max=limits.preserved_size_max,
        own=[field for field, limit in _FIELDS.items() if limit in engine.own_limits],
        count=len(engine.snapshots()),
        preserved_bytes=engine.preserved_size,
    )
