"""How far a long job is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Progress:
    """phase: "snapshot", "read", "commit", "restore" or "verify". moved_bytes: really read or written."""

    phase: str
    done_bytes: int = 0  # of the volume, holes included
    total_bytes: int = 0
    moved_bytes: int = 0


# Called often, in the loop's thread; must return at once.
Report: TypeAlias = Callable[[Progress], None]
