"""What a primary says of its copy when it opens a session, for tests that speak for one."""

from __future__ import annotations

import uuid
from uuid import UUID

from stillpoint.replica import Fence, Generation, ReplicaState, Role
from stillpoint.replica.messages import pack_state
from stillpoint.replica.transitions import created_primary


def primary_state(volume_uuid: str, *, size: int, epoch: int = 1, node: UUID | None = None) -> bytes:
    """As OpenLink carries it. node: always a new one, if None."""
    first = Generation(epoch, uuid.uuid4())
    made: ReplicaState = created_primary(
        volume=UUID(volume_uuid), node=node or uuid.uuid4(), name="test", size=size, first=first, blank=False
    )
    assert made.role is Role.PRIMARY and made.fence == Fence(epoch, 0)
    return pack_state(made)
