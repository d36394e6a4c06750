"""What the parts of the engine share about one volume: its maps, its snapshots, and which of them are live.

Invariants:
- `live` are the snapshots that blocks are preserved for: CREATING or ACTIVE, ascending. It is replaced, never changed
  in place, so other threads may hold one.
- A snapshot leaves `live` only after its end is durable in the catalog, so `live` may tell a store what is needed.
- Every block's content as of a live snapshot is on the mirror (its birth is not newer) or in exactly one record, in
  the map of the oldest live snapshot at or after it that has one.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from stillpoint.devices import BlockDevice
from stillpoint.errors import NotFound

from .association import ALL_ZEROES, Addresses
from .birth import BirthMap
from .catalog import Catalog
from .counted_map import CountedMap
from .limits import OwnLimits
from .preservation import PreservationStore
from .shared_header import SharedHeader
from .store_directory import StoreDirectory
from .values import NO_GENERATION, Bookmark, Snapshot, SnapshotState

CATALOG_FILE = "catalog.log"
BIRTH_FILE = "birth.map"
HEADER_FILE = "shared.header"
MAPS_FOLDER = "maps"


@dataclass(frozen=True, slots=True)
class Targets:
    """Where the blocks a stage overwrites must go. Generations are NO_GENERATION, stores None, when there is none.

    to: the newest live snapshot that may see them. Blocks that a durable snapshot sees (born up to `durable_to`) go to
    `durable_store` even when a newer snapshot is in memory, so that a memory store never weakens a durable snapshot.
    """

    to: int
    store: PreservationStore | None
    durable_to: int
    durable_store: PreservationStore | None


@dataclass(slots=True)
class Volume:
    name: str
    folder: Path
    incarnation: UUID
    block_size: int
    size: int
    mirror: BlockDevice
    mirror_paths: tuple[str, ...]
    births: BirthMap
    header: SharedHeader
    catalog: Catalog
    stores: StoreDirectory
    current: int
    snapshots: dict[int, Snapshot]  # by generation, invalid ones too
    bookmarks: dict[str, Bookmark]
    maps: dict[int, CountedMap]  # of live snapshots, and of one that is leaving
    own_limits: OwnLimits
    live: tuple[int, ...] = ()
    store_newest: dict[str, int] = field(default_factory=dict)  # by name: the newest generation that ever used it
    preserved_size: int = 0  # bytes in stores for the snapshots of this volume
    _counting: threading.Lock = field(default_factory=threading.Lock)
    _targets: tuple[tuple[int, ...], int, Targets] | None = None

    @property
    def shift(self) -> int:
        return self.block_size.bit_length() - 1

    @property
    def block_count(self) -> int:
        return self.size // self.block_size

    @property
    def maps_folder(self) -> Path:
        return self.folder / MAPS_FOLDER

    def count_preserved(self, addresses: Addresses, sign: int) -> None:
        """Blocks were put into a store (1), or their slots are given back (-1). From any thread."""
        with self._counting:
            self.preserved_size += sign * self.block_size * int((addresses > ALL_ZEROES).sum())

    def targets(self, *, before: int) -> Targets:
        """For changes of generation `before`: the live snapshots older than it."""
        # Asked for every change that preserves at once. `live` is replaced, never changed, so its identity tells.
        if self._targets is None or self._targets[0] is not self.live or self._targets[1] != before:
            self._targets = (self.live, before, self._find_targets(before))
        return self._targets[2]

    def _find_targets(self, before: int) -> Targets:
        older = [generation for generation in self.live if generation < before]
        if not older:
            return Targets(NO_GENERATION, None, NO_GENERATION, None)
        durable = [generation for generation in older if (store := self.store_of(generation)) and store.durable]
        durable_to = durable[-1] if durable else NO_GENERATION
        return Targets(older[-1], self.store_of(older[-1]), durable_to, self.store_of(durable_to) if durable else None)

    def store_of(self, generation: int) -> PreservationStore | None:
        return self.stores.get_open(self.snapshots[generation].store)

    def may_use(self, generation: int, store: PreservationStore) -> bool:
        """Whether blocks that this snapshot sees may be in that store."""
        own = self.store_of(generation)
        if own is store:
            return True
        # Blocks went to the stores of newer snapshots, but those of a durable snapshot never into memory.
        shares = store.durable or own is None or not own.durable
        return shares and generation <= self.store_newest.get(store.name, NO_GENERATION)

    def older_than(self, generation: int) -> int:
        """The newest live snapshot before this one, or NO_GENERATION."""
        return max((other for other in self.live if other < generation), default=NO_GENERATION)

    def by_name(self, name: str) -> Snapshot:
        for snapshot in self.snapshots.values():
            if snapshot.name == name:
                return snapshot
        raise NotFound(f"{self.name}@{name}: there is no such snapshot")

    def set_state(self, generation: int, state: SnapshotState, *, reason: str = "") -> Snapshot:
        snapshot = replace(self.snapshots[generation], state=state, invalid_reason=reason)
        self.snapshots[generation] = snapshot
        return snapshot

    def publish(self) -> None:
        """Tell the readers which snapshots there are."""
        self.header.publish([(generation, self.snapshots[generation].state) for generation in sorted(self.snapshots)])

    def close(self) -> None:
        """Let go of every file, not of the mirror or the stores."""
        for records in self.maps.values():
            records.close()
        self.births.close()
        self.header.close()
        self.catalog.close()

    def describe(self) -> dict[str, Any]:
        """What a reader in another process needs to open the virtual devices; can be written as JSON."""
        return {
            "volume": self.name,
            "uuid": str(self.incarnation),
            "size": self.size,
            "block_size": self.block_size,
            "mirror_paths": list(self.mirror_paths),
            "births": str(self.folder / BIRTH_FILE),
            "header": str(self.folder / HEADER_FILE),
            "maps": str(self.maps_folder),
            "stores": str(self.stores.path),
            "pid": os.getpid(),
            "snapshots": [_described(self.snapshots[generation]) for generation in sorted(self.snapshots)],
        }


def _described(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "name": snapshot.name,
        "uuid": str(snapshot.uuid),
        "generation": snapshot.generation,
        "state": snapshot.state.name.lower(),
        "created_ns": snapshot.created_ns,
        "size": snapshot.size,
        "store": snapshot.store,
        "invalid_reason": snapshot.invalid_reason,
    }


def map_path(folder: Path, generation: int) -> Path:
    return folder / f"{generation}.map"
