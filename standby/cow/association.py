"""Association maps: which block of a snapshot was preserved where.

A record says "the content of this block born in generation `born` is at this address" and belongs to the map of the
newest snapshot that can see it; an older snapshot finds it by asking the maps of the snapshots from its own on,
oldest first. Maps are caches (R5): they are built again from the store's log whenever the engine starts, so they are
never flushed and never read after a crash.

Addresses (u64) are the same in every kind of map and in the store's log:

    0                      nothing is preserved here
    1                      the block was all zeroes and is stored nowhere
    store << 48 | units    byte `units * 512` of the store with that number

`AssociationMap` is the promise, `array_map.py`, `hash_map.py`, `ordered_map.py` and `unordered_map.py` are its forms.

Invariants of every form:
- Readers in other processes look while the engine puts, without a lock: a lookup finds every record that was put before
  it began, whole, and nothing that was never put.
- Records are only added. A map ends with its snapshot.
- What a `put_many` needs of the file is reserved before anything is stored, so a full disk is an OSError and no change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from .birth import Blocks, Generations

Addresses: TypeAlias = npt.NDArray[np.uint64]

NOT_PRESERVED: Final = 0
ALL_ZEROES: Final = 1
STORE_SHIFT: Final = 48
UNIT_SIZE: Final = 512
UNITS_MASK: Final = (1 << STORE_SHIFT) - 1

PIECE_ENTRIES: Final = 8192  # records handled at a time


class AssociationMap(Protocol):
    """The records of one live snapshot. Every method may be called from any thread."""

    generation: int

    def put_many(self, blocks: Blocks, addresses: Addresses, born: Generations) -> None:
        """Add records for blocks that have none; `blocks` ascends. Raises OSError (no space); nothing was put then."""
        ...

    def is_quick(self, count: int) -> bool:
        """Whether putting that many more takes a few milliseconds at most, as an event loop wants it."""
        ...

    def lookup(self, first: int, count: int) -> tuple[Addresses, Generations] | None:
        """Addresses and births of `count` blocks from `first`, NOT_PRESERVED where there is none; None: none at all."""
        ...

    def pieces(self) -> Iterator[tuple[Blocks, Addresses, Generations]]:
        """All records, ascending by block, in pieces of bounded size."""
        ...

    def close(self) -> None: ...


def store_of(address: int) -> int:
    return address >> STORE_SHIFT


def offset_of(address: int) -> int:
    """Bytes from the start of the store's device."""
    return (address & UNITS_MASK) * UNIT_SIZE
