"""When blocks were last written as of a snapshot, and so which of them changed since an earlier instant. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from stillpoint.extents import Extent

from .association import NOT_PRESERVED, AssociationMap
from .birth import Generations
from .values import ChangedExtents

_CHUNK: Final = 1 << 18  # blocks at a time: what is computed on stays in the processor's cache


def changed_extents(
    births: Generations, maps: Sequence[AssociationMap], *, base: int, block_size: int, block_count: int
) -> ChangedExtents:
    """The blocks of a snapshot whose content is newer than `base`, neighbours joined.

    maps: of the snapshot and of all newer live ones, ascending.
    """
    borders: list[npt.NDArray[np.int64]] = []
    inside = False
    for first in range(0, block_count, _CHUNK):
        newer = _newer(births, maps, base, first, min(_CHUNK, block_count - first))
        flips = np.flatnonzero(newer[1:] != newer[:-1]) + (first + 1)
        borders.append(np.concatenate(([first], flips)) if newer[0] != inside else flips)
        inside = bool(newer[-1])
    if inside:
        borders.append(np.array([block_count]))
    pairs = (np.concatenate(borders) * block_size).reshape(-1, 2).tolist()
    return ChangedExtents(known=True, extents=[Extent(start, end - start) for start, end in pairs])


def unknown_extents(size: int) -> ChangedExtents:
    """Nothing is known of the base, so everything may differ."""
    return ChangedExtents(known=False, extents=(Extent(0, size),))


def _newer(
    births: Generations, maps: Sequence[AssociationMap], base: int, first: int, count: int
) -> npt.NDArray[np.bool_]:
    as_of = births[first : first + count]
    if not (as_of > base).any():
        return np.zeros(count, dtype=np.bool_)  # what a record says of a block is older than its birth
    return births_as_of(births, maps, first, count) > base


def births_as_of(births: Generations, maps: Sequence[AssociationMap], first: int, count: int) -> Generations:
    """In which generation the content that a snapshot has of each of `count` blocks from `first` was written.

    maps: of the snapshot and of all newer live ones, ascending.
    Births are looked at before maps: a block that is preserved in between is in the map by then, or still old here.
    """
    as_of = births[first : first + count].copy()
    # The oldest snapshot that has a record decides, so they are laid over the births of now from the newest on.
    for records in reversed(maps):
        found = records.lookup(first, count)
        if found is not None:
            addresses, born = found
            np.copyto(as_of, born, where=addresses != NOT_PRESERVED)
    return as_of
