"""The meta contexts a server offers: what BLOCK_STATUS can tell about a range.

A new context is one more line in `CONTEXTS`; negotiation and replies follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

from ..extents import coalesce
from .constants import BASE_ALLOCATION, AllocationFlag
from .export import Export

# (offset, length) of a range to the (length, flags) of its parts, in order and without gaps.
StatusFunction: TypeAlias = Callable[[Export, int, int], Iterator[tuple[int, int]]]

_HOLE: Final = int(AllocationFlag.HOLE | AllocationFlag.ZERO)


def _allocation(export: Export, offset: int, length: int) -> Iterator[tuple[int, int]]:
    for extent in coalesce(export.extents(offset, length)):
        yield extent.length, _HOLE if extent.hole else 0


CONTEXTS: Final[dict[str, StatusFunction]] = {BASE_ALLOCATION: _allocation}
