"""The meta contexts a server offers: what BLOCK_STATUS can tell about a range.

`base:allocation` tells data from holes, for every export. `qemu:dirty-bitmap:BASE` tells what changed since BASE, for
exports that remember earlier instants (`ChangeSource`), under the name and with the flag that qemu gave its bitmaps, so
that qemu-img and nbdinfo read them too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol, TypeAlias, runtime_checkable

from ..errors import NotFound
from ..extents import coalesce
from .constants import BASE_ALLOCATION, DIRTY_BITMAP, AllocationFlag, BitmapFlag
from .export import Export

# (offset, length) of a range to the (length, flags) of its parts, in order and without gaps.
StatusFunction: TypeAlias = Callable[[int, int], Iterator[tuple[int, int]]]
# The same with whether the part may have changed.
ChangedFunction: TypeAlias = Callable[[int, int], Iterator[tuple[int, bool]]]

_HOLE: Final = int(AllocationFlag.HOLE | AllocationFlag.ZERO)
_DIRTY: Final = int(BitmapFlag.DIRTY)


@runtime_checkable
class ChangeSource(Protocol):
    """An export that knows what was written to it since earlier instants."""

    def bases(self) -> Sequence[str]:
        """The names of the instants."""
        ...

    def changed_since(self, base: str, /) -> ChangedFunction:
        """What may have changed since that instant, which the function keeps even if its name is given to another.

        Raises NotFound.
        """
        ...


def context_names(export: Export) -> list[str]:
    """What may be asked about `export`."""
    bases = export.bases() if isinstance(export, ChangeSource) else ()
    return [BASE_ALLOCATION, *(DIRTY_BITMAP + base for base in bases)]


def status_function(export: Export, name: str) -> StatusFunction:
    """Raises NotFound for a context that `export` does not offer."""
    if name == BASE_ALLOCATION:
        return lambda offset, length: _allocation(export, offset, length)
    if not (name.startswith(DIRTY_BITMAP) and isinstance(export, ChangeSource)):
        raise NotFound(f"{export.name}: there is no meta context {name!r}")
    changed = export.changed_since(name.removeprefix(DIRTY_BITMAP))
    return lambda offset, length: ((size, _DIRTY if dirty else 0) for size, dirty in changed(offset, length))


def matches(name: str, query: str) -> bool:
    """Whether a query of LIST_META_CONTEXT asks for the context: its name, or a beginning that ends with a colon."""
    return name == query or (query.endswith(":") and name.startswith(query))


def _allocation(export: Export, offset: int, length: int) -> Iterator[tuple[int, int]]:
    for extent in coalesce(export.extents(offset, length)):
        yield extent.length, _HOLE if extent.hole else 0
