"""An association map that knows, without being walked, how many records of which birth it has in which store.

So what a snapshot holds, and what deleting it would give back, is told at once however much that is.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from .association import STORE_SHIFT, Addresses, AssociationMap
from .association_forms import create_map
from .birth import Blocks, Generations

_BORN_BITS: Final = 32
_NO_STORE: Final = 0  # of blocks of zeroes; the numbers of stores begin at 1


class CountedMap:
    """The AssociationMap `records`, which nobody else puts into."""

    def __init__(self, records: AssociationMap) -> None:
        self._records = records
        self.generation = records.generation
        self._counts: Counter[int] = Counter()  # by store << 32 | born
        self._counting = threading.Lock()

    @classmethod
    def create(cls, form: str, path: Path, *, generation: int, block_count: int) -> CountedMap:
        """An empty map of that form (association_forms.py). Raises OSError."""
        return cls(create_map(form, path, generation=generation, block_count=block_count))

    @property
    def count(self) -> int:
        """Of all records."""
        with self._counting:
            return self._counts.total()

    def stored(self, *, born_after: int) -> Counter[int]:
        """Records by number of store, of those that were born after that generation; blocks of zeroes are nowhere."""
        found: Counter[int] = Counter()
        with self._counting:
            for key, count in self._counts.items():
                store, born = divmod(key, 1 << _BORN_BITS)
                if store != _NO_STORE and born > born_after:
                    found[store] += count
        return found

    def put_many(self, blocks: Blocks, addresses: Addresses, born: Generations) -> None:
        self._records.put_many(blocks, addresses, born)
        keys = (addresses >> np.uint64(STORE_SHIFT) << np.uint64(_BORN_BITS)) | born
        values, counts = np.unique(keys, return_counts=True)
        with self._counting:
            self._counts.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    def is_quick(self, count: int) -> bool:
        return self._records.is_quick(count)

    def lookup(self, first: int, count: int) -> tuple[Addresses, Generations] | None:
        return self._records.lookup(first, count)

    def pieces(self) -> Iterator[tuple[Blocks, Addresses, Generations]]:
        return self._records.pieces()

    def close(self) -> None:
        self._records.close()
