"""What the snapshots of one volume may take, and what happens when they want more.

The node has limits for all volumes; a volume may have some of its own, which the catalog keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from stillpoint.errors import InvalidRequest

from .values import SNAPSHOTS_MAX

# Those fields of Limits that a volume has of its own, by name; can be written as JSON.
OwnLimits: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Limits:
    """expires: when one of the others is reached, or a store is full, the oldest snapshot that is not protected is
    deleted. Else one more snapshot is refused, and for want of room the oldest becomes invalid.
    count_max: snapshots of the volume, invalid ones too; 0: SNAPSHOTS_MAX.
    preserved_size_max: bytes that they hold in stores, give or take one commit; 0: no limit. Protected snapshots may
    exceed it.
    """

    expires: bool = False
    count_max: int = 0
    preserved_size_max: int = 0

    def with_own(self, own: OwnLimits) -> Limits:
        """Raises InvalidRequest for what is no limit."""
        unknown = set(own) - set(asdict(self))
        if unknown:
            raise InvalidRequest(f"there is no limit {unknown.pop()!r} on snapshots")
        limits = replace(self, **own)
        if not 0 <= limits.count_max <= SNAPSHOTS_MAX:
            raise InvalidRequest(f"a volume may have from 0 to {SNAPSHOTS_MAX} snapshots, not {limits.count_max}")
        if limits.preserved_size_max < 0:
            raise InvalidRequest("the snapshots of a volume cannot hold less than nothing")
        return limits
