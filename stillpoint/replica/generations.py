"""A generation names a point in the life of a volume from which its copies may have gone different ways.

A new one is minted at promotion, and at the first acknowledgement given without a copy that shared the one before.
So two copies at one generation differ at most by what their dirty maps hold; and a copy whose generation another has
left behind is older than that other one.
"""

from __future__ import annotations

import uuid as uuid_module
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

# Generations a copy remembers of its past. Each costs a role change or the loss of a copy in sync; two copies that meet
# again after more than these are refused, never guessed about.
HISTORY_MAX = 16


@dataclass(frozen=True, slots=True)
class Generation:
    """epoch: u32, that of the primary that minted it; for people, and never compared. uuid: what identifies it."""

    epoch: int
    uuid: UUID

    def __str__(self) -> str:
        return f"{self.epoch}.{self.uuid.hex[:8]}"


def mint(epoch: int, *, fresh_uuid: Callable[[], UUID] = uuid_module.uuid4) -> Generation:
    return Generation(epoch, fresh_uuid())


def remember(left: Generation, history: tuple[Generation, ...]) -> tuple[Generation, ...]:
    """The history, newest first, after `left` has been left behind."""
    return (left, *(generation for generation in history if generation != left))[:HISTORY_MAX]
