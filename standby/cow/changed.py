"""Which blocks were written between two instants. Pure computation on births and records."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stillpoint.extents import Extent

from .association import AssociationMap
from .birth import Generations
from .values import ChangedExtents


def birth_as_of(births: Generations, maps: Sequence[AssociationMap], block_count: int) -> Generations:
    """For each block the generation its content had at a snapshot.

    maps: of the snapshot and of all newer live ones, ascending. The oldest of them that has a record decides, so they
    are laid over the births of now from the newest to the oldest.
    """
    as_of = births[:block_count].copy()
    for records in reversed(maps):
        for blocks, _, born in records.pieces():
            if int(blocks[-1]) >= block_count:  # of a volume that has grown since
                inside = blocks < block_count
                blocks, born = blocks[inside], born[inside]
            as_of[blocks] = born
    return as_of


def changed_extents(as_of: Generations | None, base: int, block_size: int, block_count: int) -> ChangedExtents:
    """The blocks whose content is newer than `base`, neighbours joined; everything when nothing is known."""
    if as_of is None:
        return ChangedExtents(known=False, extents=(Extent(0, block_count * block_size),))
    newer = np.concatenate(([False], as_of > base, [False]))
    borders = np.flatnonzero(newer[1:] != newer[:-1]) * block_size
    pairs = borders.reshape(-1, 2).tolist()
    return ChangedExtents(known=True, extents=[Extent(start, end - start) for start, end in pairs])
