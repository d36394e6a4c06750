"""Which chunk or page is where: 20 bytes of memory for each, sorted, and a small dict of what came lately.

It is a cache. The packs describe themselves, so it is rebuilt from their headers whenever its file is missing, damaged
or older than the packs (`packs.py`).

Invariants:
- An id is known by its first 96 bits. Among 2^32 ids the odds that two share them are 1 in 2^33, and then reading says
  that another blob stands in its place.
- One thread changes it. Any thread may look up: what was found once is found until it is removed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from stillpoint.errors import DataCorrupt

from .blobs import ChunkId

Array = npt.NDArray[np.uint64]
Array32 = npt.NDArray[np.uint32]

# A location in 64 bits: number of the pack, offset in it, size in KiB, rounded up.
_SIZE_BITS: Final = 13
_OFFSET_BITS: Final = 26
PACK_SIZE_MAX: Final = 1 << _OFFSET_BITS
_REMOVED: Final = (1 << 64) - 1
# Entries of the dict before they are sorted into the arrays.
_RECENT_MAX: Final = 1 << 17
_KEY: Final = struct.Struct("<QI")

_MAGIC: Final = b"SPIX"
_VERSION: Final = 2
_HEAD: Final = struct.Struct("<4sIQQ32s")


class Location(NamedTuple):
    """pack: its number. size: at least the blob's, at most 1023 bytes more."""

    pack: int
    offset: int
    size: int


class ChunkIndex:
    def __init__(self) -> None:
        self._arrays: tuple[Array, Array32, Array] = (
            np.empty(0, np.uint64),
            np.empty(0, np.uint32),
            np.empty(0, np.uint64),
        )
        self._recent: dict[tuple[int, int], int] = {}
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        """Of ids, those that were removed included until the next merge."""
        return len(self._arrays[0]) + len(self._recent)

    def pack_number(self, name: str) -> int:
        """Of a pack, which need not be known before."""
        if name not in self._numbers:
            self._numbers[name] = len(self._names)
            self._names.append(name)
        return self._numbers[name]

    def pack_name(self, number: int) -> str:
        return self._names[number]

    def rename_pack(self, number: int, name: str) -> None:
        """A pack in the making has a number before it has its name."""
        self._numbers.pop(self._names[number], None)
        self._names[number] = name
        self._numbers[name] = number

    @property
    def pack_names(self) -> set[str]:
        return set(self._numbers)

    def find(self, chunk: ChunkId) -> Location | None:
        key, check = _KEY.unpack_from(chunk)
        found = self._recent.get((key, check))
        if found is None:
            found = self._find_sorted(key, check)
        return None if found is None or found == _REMOVED else _location(found)

    def _find_sorted(self, key: int, check: int) -> int | None:
        keys, checks, locations = self._arrays
        position = int(np.searchsorted(keys, np.uint64(key)))
        while position < len(keys) and int(keys[position]) == key:
            if int(checks[position]) == check:
                return int(locations[position])
            position += 1
        return None

    def find_all(self, ids: bytes) -> npt.NDArray[np.uint64]:
        """The packed location of each of the ids that `ids` is made of; 2^64-1 where there is none."""
        recent, arrays = self._recent, self._arrays
        rows = np.frombuffer(ids, np.uint8).reshape(-1, 32)
        wanted = np.ascontiguousarray(rows[:, :8]).view("<u8").ravel()
        checks = np.ascontiguousarray(rows[:, 8:12]).view("<u4").ravel()
        found = _lookup(arrays, wanted, checks)
        if recent:
            for number, pair in enumerate(zip(wanted.tolist(), checks.tolist(), strict=True)):
                location = recent.get(pair)
                if location is not None:
                    found[number] = location
        return found

    def add(self, chunk: ChunkId, location: Location) -> None:
        self._recent[_KEY.unpack_from(chunk)] = pack_location(location)
        if len(self._recent) >= _RECENT_MAX:
            self.merge()

    def remove(self, chunk: ChunkId) -> None:
        self._recent[_KEY.unpack_from(chunk)] = _REMOVED

    def remove_packs(self, numbers: Iterable[int]) -> None:
        """Forget everything that lies in these packs."""
        self.merge()
        keys, checks, locations = self._arrays
        gone = np.fromiter(numbers, np.uint64)
        keep = ~np.isin(locations >> np.uint64(_SIZE_BITS + _OFFSET_BITS), gone)
        self._arrays = (keys[keep], checks[keep], locations[keep])
        for number in gone.tolist():
            self._numbers.pop(self._names[int(number)], None)

    def remove_at(self, pack: int, kept: frozenset[int]) -> list[int]:
        """Forget what lies in a pack, but for these offsets. Returns the offsets forgotten."""
        self.merge()
        keys, checks, locations = self._arrays
        offsets = offsets_of(locations)
        lost = (packs_of(locations) == pack) & ~np.isin(offsets, np.fromiter(kept, np.int64))
        self._arrays = (keys[~lost], checks[~lost], locations[~lost])
        return [int(offset) for offset in offsets[lost]]

    def merge(self) -> None:
        """Sort what came lately into the arrays. A later location of an id takes the place of an earlier one."""
        if not self._recent:
            return
        recent = self._recent
        count = len(recent)
        new_keys = np.fromiter((key for key, _ in recent), np.uint64, count)
        new_checks = np.fromiter((check for _, check in recent), np.uint32, count)
        new_locations = np.fromiter(recent.values(), np.uint64, count)
        keys, checks, locations = self._arrays
        # The newer first, so that a stable sort puts it before the one whose place it takes.
        keys, checks = np.concatenate([new_keys, keys]), np.concatenate([new_checks, checks])
        locations = np.concatenate([new_locations, locations])
        order = np.lexsort((checks, keys))
        keys, checks, locations = keys[order], checks[order], locations[order]
        keep = np.ones(len(keys), bool)
        keep[1:] = (keys[1:] != keys[:-1]) | (checks[1:] != checks[:-1])
        keep &= locations != np.uint64(_REMOVED)
        # The arrays first: a lookup that misses in the dict must find it here.
        self._arrays = (keys[keep], checks[keep], locations[keep])
        self._recent = {}

    def dump(self) -> bytes:
        """For the cache's file. Merge first."""
        keys, checks, locations = self._arrays
        names = "\n".join(self._names).encode()
        body = names + keys.tobytes() + checks.tobytes() + locations.tobytes()
        return _HEAD.pack(_MAGIC, _VERSION, len(names), len(keys), blake3(body).digest()) + body

    @classmethod
    def load(cls, data: bytes) -> ChunkIndex:
        """Raises DataCorrupt."""
        if len(data) < _HEAD.size:
            raise DataCorrupt("the cache of the index is cut short")
        magic, version, names_length, count, digest = _HEAD.unpack_from(data)
        body = memoryview(data)[_HEAD.size :]
        if (magic, version) != (_MAGIC, _VERSION) or len(body) != names_length + 20 * count:
            raise DataCorrupt("the cache of the index is of another version or length")
        if blake3(body).digest() != digest:
            raise DataCorrupt("the cache of the index is damaged")
        index = cls()
        for name in bytes(body[:names_length]).decode().split("\n") if names_length else []:
            index.pack_number(name)
        at = names_length
        index._arrays = (
            np.frombuffer(body[at : at + 8 * count], np.uint64).copy(),
            np.frombuffer(body[at + 8 * count : at + 12 * count], np.uint32).copy(),
            np.frombuffer(body[at + 12 * count :], np.uint64).copy(),
        )
        return index


def pack_location(location: Location) -> int:
    assert location.offset < PACK_SIZE_MAX
    size_kib = -(-location.size // 1024)
    return (location.pack << _OFFSET_BITS | location.offset) << _SIZE_BITS | size_kib


def _location(packed: int) -> Location:
    rest, size_kib = packed >> _SIZE_BITS, packed & ((1 << _SIZE_BITS) - 1)
    return Location(rest >> _OFFSET_BITS, rest & (PACK_SIZE_MAX - 1), size_kib * 1024)


def packs_of(locations: Array) -> npt.NDArray[np.int64]:
    return (locations >> np.uint64(_SIZE_BITS + _OFFSET_BITS)).astype(np.int64)


def offsets_of(locations: Array) -> npt.NDArray[np.int64]:
    return (locations >> np.uint64(_SIZE_BITS) & np.uint64(PACK_SIZE_MAX - 1)).astype(np.int64)


def sizes_of(locations: Array) -> npt.NDArray[np.int64]:
    return (locations & np.uint64((1 << _SIZE_BITS) - 1)).astype(np.int64) * 1024


def is_missing(locations: Array) -> npt.NDArray[np.bool_]:
    missing: npt.NDArray[np.bool_] = locations == np.uint64(_REMOVED)
    return missing


def _lookup(arrays: tuple[Array, Array32, Array], wanted: Array, checks: Array32) -> Array:
    positions = _positions(arrays, wanted, checks)
    found = np.full(len(wanted), _REMOVED, np.uint64)
    present = positions >= 0
    found[present] = arrays[2][positions[present]]
    return found


def _positions(arrays: tuple[Array, Array32, Array], wanted: Array, checks: Array32) -> npt.NDArray[np.int64]:
    keys, all_checks, _ = arrays
    result = np.full(len(wanted), -1, np.int64)
    if not len(keys):
        return result
    at = np.searchsorted(keys, wanted)
    # Ids that share 64 bits are next to each other; more than two of them there will not be.
    for step in (0, 1):
        candidate = np.minimum(at + step, len(keys) - 1)
        match = (keys[candidate] == wanted) & (all_checks[candidate] == checks)
        result[match & (result < 0)] = candidate[match & (result < 0)]
    return result
