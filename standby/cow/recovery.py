"""Making a volume's state, and opening it again after a clean close, a killed process or a power loss.

What each kind of stop leaves, and what is done about it:

- Clean: the catalog ends in CLOSED; births are exact, stores and catalog complete.
- The process was killed (the catalog names this boot): the page cache kept every store into the birth map, so births
  are exact. Records that were durable but not yet published raise the births of their blocks, which over-reports.
- Power loss (another boot): births up to the newest durable live snapshot are proven, because the map was flushed when
  that snapshot was made and every later overwrite of such a block has a durable record with its new birth. All other
  births count as written now (R2).

Snapshots whose store did not survive become invalid, durably, before anything else is done. The association maps are
built from the stores' logs (R5), and each live snapshot is proven to have every block it needs, else it becomes
invalid too (R6).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import numpy as np

from stillpoint.devices import BlockDevice
from stillpoint.document import fsync_folder
from stillpoint.errors import AlreadyExists, DataCorrupt, DeviceError, InvalidRequest, NotFound

from . import record_log
from .association import ALL_ZEROES, STORE_SHIFT, UNIT_SIZE, Addresses
from .birth import PIECE_BLOCKS, BirthMap, Blocks, Generations
from .catalog import Catalog, CatalogState, Event
from .counted_map import CountedMap
from .shared_header import SharedHeader
from .store_directory import StoreDirectory
from .values import NO_GENERATION, Bookmark, Snapshot, SnapshotState, check_block_size
from .volume import BIRTH_FILE, CATALOG_FILE, HEADER_FILE, MAPS_FOLDER, Volume, map_path

_LOST_MEMORY: Final = "its memory store did not survive the restart"
_UNPROVEN: Final = "blocks it needs are not in any store"


@dataclass(frozen=True, slots=True)
class _Entries:
    """The records of one snapshot, one row a block, ascending."""

    blocks: Blocks
    addresses: Addresses
    born: Generations
    new_birth: Generations


def create_state(folder: Path, name: str, mirror: BlockDevice, *, size: int, block_size: int) -> None:
    """Make the folder of a new volume. Durable on return, complete or (but for leftovers that are replaced) not there.

    Raises InvalidRequest, AlreadyExists, DeviceError.
    """
    check_block_size(block_size)
    if size <= 0 or size % block_size:
        raise InvalidRequest(f"volume {name}: {size} bytes are no multiple of its block size of {block_size}")
    if mirror.size < size:
        raise InvalidRequest(f"volume {name}: {mirror.description} holds {mirror.size} bytes, too small for {size}")
    if (folder / CATALOG_FILE).exists():
        raise AlreadyExists(f"volume {name}: {folder} holds the state of a volume already")
    try:
        (folder / MAPS_FOLDER).mkdir(parents=True, exist_ok=True)
        BirthMap.create(folder / BIRTH_FILE, size // block_size).close()
        fsync_folder(folder.parent)
    except OSError as error:
        raise DeviceError(f"volume {name}: cannot make {folder}: {error.strerror}", error.errno or 5) from error
    # The catalog is last: with it the volume exists.
    fields = {"name": name, "incarnation": str(uuid4()), "block_size": block_size, "size": size}
    Catalog.create(folder / CATALOG_FILE, fields).close()


def open_volume(
    folder: Path,
    mirror: BlockDevice,
    stores: StoreDirectory,
    *,
    mirror_paths: Iterable[str],
    boot: str,
) -> Volume:
    """Open the state in `folder` and recover. Raises NotFound, DataCorrupt, InvalidRequest, DeviceError."""
    try:
        catalog = Catalog.open(folder / CATALOG_FILE)
    except FileNotFoundError:
        raise NotFound(f"{folder}: holds no volume") from None
    except OSError as error:
        raise DeviceError(f"{folder}: cannot be opened: {error.strerror}", error.errno or 5) from error
    try:
        return _open(folder, catalog, mirror, stores, mirror_paths=mirror_paths, boot=boot)
    except BaseException:
        catalog.close()
        raise


def _open(
    folder: Path,
    catalog: Catalog,
    mirror: BlockDevice,
    stores: StoreDirectory,
    *,
    mirror_paths: Iterable[str],
    boot: str,
) -> Volume:
    state = catalog.state
    name, block_size = state.volume["name"], state.volume["block_size"]
    incarnation = UUID(state.volume["incarnation"])
    if mirror.size < state.size:
        raise InvalidRequest(f"volume {name}: {mirror.description} holds {mirror.size} bytes; it had {state.size}")
    births = _open_births(folder / BIRTH_FILE, state, block_size)
    lost = _lost_snapshots(state, stores)
    live = tuple(sorted(set(_valid(state)) - set(lost)))
    records = np.concatenate(
        [_with_number(store.recovered(incarnation), store.number) for store in stores.opened()] or [_none()]
    )
    current = max(state.current, births.newest(), int(records["new_birth"].max(initial=0)))
    if state.boot not in (None, boot):
        births.distrust_above(live[-1] if live else NO_GENERATION, current=current)
    entries: dict[int, _Entries] = {}
    while True:
        entries = _entries(records, live, block_size)
        for part in entries.values():
            births.raise_to(part.blocks, part.new_birth)
        unproven = _unproven(
            births, entries, {generation: state.snapshots[generation] for generation in live}, block_size
        )
        if not unproven:
            break
        lost |= dict.fromkeys(unproven, _UNPROVEN)
        live = tuple(generation for generation in live if generation not in unproven)
    for generation, reason in lost.items():
        catalog.append(Event.SNAPSHOT_INVALID, generation=generation, reason=reason)
    # On a full disk the last run's maps are the room for this run's.
    for path in (folder / MAPS_FOLDER).glob("*.map"):
        path.unlink()
    header = SharedHeader.create(folder / HEADER_FILE, uuid=incarnation, block_size=block_size, size=state.size)
    volume = Volume(
        name=name,
        folder=folder,
        incarnation=incarnation,
        block_size=block_size,
        size=state.size,
        mirror=mirror,
        mirror_paths=tuple(mirror_paths),
        births=births,
        header=header,
        catalog=catalog,
        stores=stores,
        current=current,
        snapshots={generation: _snapshot(name, fields, stores) for generation, fields in state.snapshots.items()},
        bookmarks={mark: _bookmark(name, fields) for mark, fields in state.bookmarks.items()},
        own_limits=state.limits,
        maps=_build_maps(folder / MAPS_FOLDER, entries, live, state, stores),
        live=live,
        store_newest=_store_newest(state, stores),
    )
    for part in entries.values():
        volume.count_preserved(part.addresses, 1)
    for store in stores.opened():
        store.adopt(incarnation, lambda: volume.live)
    volume.publish()
    births.synchronize()
    catalog.append(Event.OPENED, boot=boot)
    return volume


def _open_births(path: Path, state: CatalogState, block_size: int) -> BirthMap:
    try:
        return BirthMap.open(path, state.size // block_size, writable=True)
    except (OSError, ValueError) as error:
        raise DataCorrupt(f"{path}: the birth map is missing or too short: {error}") from error


def _valid(state: CatalogState) -> list[int]:
    return [generation for generation, fields in state.snapshots.items() if "invalid" not in fields]


def _lost_snapshots(state: CatalogState, stores: StoreDirectory) -> dict[int, str]:
    """Snapshots that cannot be served because of a store, with the reason.

    A snapshot in memory is lost with every restart. Older durable ones are not: what they see never went to memory.
    A durable store that is gone takes with it every snapshot up to the newest that ever used it.
    """
    lost = {generation: _LOST_MEMORY for generation in _valid(state) if not state.snapshots[generation]["durable"]}
    for store, newest in state.stores.items():
        if stores.by_uuid(UUID(store)) is None:
            reason = "its store is missing or damaged"
            lost |= {
                generation: reason for generation in _valid(state) if generation <= newest and generation not in lost
            }
    return lost


def _store_newest(state: CatalogState, stores: StoreDirectory) -> dict[str, int]:
    named = ((stores.by_uuid(UUID(uuid)), newest) for uuid, newest in state.stores.items())
    return {store.name: newest for store, newest in named if store is not None}


def _none() -> record_log.Records:
    return np.empty(0, dtype=record_log.RECORD)


def _with_number(records: record_log.Records, number: int) -> record_log.Records:
    numbered = records.copy()
    numbered["address"][numbered["address"] != ALL_ZEROES] += np.uint64(number << STORE_SHIFT)
    return numbered


def _entries(records: record_log.Records, live: tuple[int, ...], block_size: int) -> dict[int, _Entries]:
    """Which entries each live snapshot's map has."""
    owners = record_log.owners(records["born"], records["to"], live)
    entries = {}
    for generation in live:
        mine = records[owners == generation]
        index, position = record_log.expand(mine)
        blocks = mine["block"][index].astype(np.int64) + position
        addresses = mine["address"][index]
        step = np.where(addresses == ALL_ZEROES, 0, block_size // UNIT_SIZE).astype(np.uint64)
        addresses = addresses + position.astype(np.uint64) * step
        order = np.argsort(blocks, kind="stable")
        # Preserved again after its first entry found no room in the map: both records say the same, one is enough.
        ordered = blocks[order]
        order = order[np.append(ordered[1:] != ordered[:-1], True)] if len(order) else order
        entries[generation] = _Entries(
            blocks[order], addresses[order], mine["born"][index][order], mine["new_birth"][index][order]
        )
    return entries


def _unproven(
    births: BirthMap, entries: dict[int, _Entries], snapshots: dict[int, Any], block_size: int
) -> frozenset[int]:
    """Live snapshots that need a block which is neither on the mirror as it was nor in a record."""
    unproven: set[int] = set()
    newest_first = sorted(entries, reverse=True)
    for first in range(0, births.block_count if entries else 0, PIECE_BLOCKS):  # a copy of it all would be too much
        as_of: Generations = births.array[first : first + PIECE_BLOCKS].copy()
        for generation in newest_first:
            part = entries[generation]
            begin, end = np.searchsorted(part.blocks, (first, first + PIECE_BLOCKS))
            as_of[part.blocks[begin:end] - first] = part.born[begin:end]
            count = snapshots[generation]["size"] // block_size
            if bool((as_of[: max(0, count - first)] > generation).any()):
                unproven.add(generation)
    return frozenset(unproven)


def _build_maps(
    folder: Path, entries: dict[int, _Entries], live: tuple[int, ...], state: CatalogState, stores: StoreDirectory
) -> dict[int, CountedMap]:
    maps: dict[int, CountedMap] = {}
    try:
        for generation in live:
            fields = state.snapshots[generation]
            count = fields["size"] // state.volume["block_size"]
            form = stores.map_form(UUID(fields["store"]))
            maps[generation] = CountedMap.create(
                form, map_path(folder, generation), generation=generation, block_count=count
            )
            part = entries[generation]
            maps[generation].put_many(part.blocks, part.addresses, part.born)
    except OSError as error:
        raise DeviceError(f"{folder}: no space for the association maps: {error.strerror}", error.errno or 5) from error
    return maps


def _snapshot(volume: str, fields: dict[str, Any], stores: StoreDirectory) -> Snapshot:
    store = stores.by_uuid(UUID(fields["store"]))
    return Snapshot(
        volume=volume,
        name=fields["name"],
        uuid=UUID(fields["uuid"]),
        generation=fields["generation"],
        state=SnapshotState.INVALID if "invalid" in fields else SnapshotState.ACTIVE,
        created_ns=fields["created_ns"],
        size=fields["size"],
        store=store.name if store is not None else "",
        invalid_reason=fields.get("invalid", ""),
        protected=fields.get("protected", False),
    )


def _bookmark(volume: str, fields: dict[str, Any]) -> Bookmark:
    return Bookmark(
        volume=volume,
        name=fields["name"],
        generation=fields["generation"],
        incarnation=UUID(fields["incarnation"]),
        snapshot=UUID(fields["snapshot"]),
        created_ns=fields["created_ns"],
    )
