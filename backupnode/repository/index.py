"""Which chunk or page is where: 16 bytes of memory for each, sorted, and a small dict of what came lately.

It is a cache. The packs describe themselves, so it is rebuilt from their headers whenever its file is missing, damaged
or older than the packs (`packs.py`).

Invariants:
- An id is known by 75 of its bits: its first byte is the number of a segment, the next eight the key within it, and
  three more stand beside the location. Among 2^28 ids, that is 64 TiB of different chunks of 256 KiB, the odds that two
  share them are 1 in 2^20, and then reading says that another blob stands in its place.
- One thread changes it. Any thread may look up: what was found once is found until it is removed.
- A change copies one segment at a time, so that it never takes much more memory than the index itself.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from stillpoint.errors import DataCorrupt

from .blobs import ID_SIZE, ChunkId

Array: TypeAlias = npt.NDArray[np.uint64]
Bools: TypeAlias = npt.NDArray[np.bool_]

# A location in 64 bits: number of the pack, offset in it, size in KiB, rounded up, and three bits of the id.
_CHECK_BITS: Final = 3
_SIZE_BITS: Final = 13
_OFFSET_BITS: Final = 26
_PACK_SHIFT: Final = _CHECK_BITS + _SIZE_BITS + _OFFSET_BITS
_OFFSET_SHIFT: Final = _CHECK_BITS + _SIZE_BITS
PACK_SIZE_MAX: Final = 1 << _OFFSET_BITS
_CHECK_MASK: Final = (1 << _CHECK_BITS) - 1
_REMOVED: Final = (1 << 64) - 1
_SEGMENTS: Final = 256
# The bytes of an id that are kept of it while it is in the dict.
_PREFIX: Final = 10
# Entries of the dict before they are sorted into the segments.
_RECENT_MAX: Final = 1 << 15

_MAGIC: Final = b"SPIX"
_VERSION: Final = 3
_HEAD: Final = struct.Struct("<4sIQ32s")
_SEGMENT_HEAD: Final = struct.Struct("<Q32s")


class Location(NamedTuple):
    """pack: its number. size: at least the blob's, at most 1023 bytes more."""

    pack: int
    offset: int
    size: int


class Segment(NamedTuple):
    """Never changed, only replaced. `keys` are in order."""

    keys: Array
    locations: Array


_EMPTY: Final = Segment(np.empty(0, np.uint64), np.empty(0, np.uint64))


class ChunkIndex:
    def __init__(self) -> None:
        self._segments: list[Segment] = [_EMPTY] * _SEGMENTS
        self._recent: dict[bytes, int] = {}
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        """Of ids, those that were removed included until the next merge."""
        return sum(len(segment.keys) for segment in self._segments) + len(self._recent)

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
        found = self._recent.get(chunk[:_PREFIX])
        if found is None:
            segment = self._segments[chunk[0]]
            position = int(_positions(segment, *_parts(chunk))[0])
            if position < 0:
                return None
            found = int(segment.locations[position])
        return None if found == _REMOVED else _location(found)

    def find_all(self, ids: bytes) -> Array:
        """The packed location of each of the ids that `ids` is made of; 2^64-1 where there is none.

        Many ids at once are quicker than a few: about 65,000 are found in the time of 1,000 twice over.
        """
        recent = self._recent
        found = locate(self._segments, ids)
        if recent:
            for number, start in enumerate(range(0, len(ids), ID_SIZE)):
                location = recent.get(ids[start : start + _PREFIX])
                if location is not None:
                    found[number] = location
        return found

    def snapshot(self) -> Sequence[Segment]:
        """What is in it now, unharmed by later changes. By the thread that changes it."""
        self.merge()
        return list(self._segments)

    def add(self, chunk: ChunkId, location: Location) -> None:
        self._recent[chunk[:_PREFIX]] = _pack(location) | (chunk[9] & _CHECK_MASK)
        if len(self._recent) >= _RECENT_MAX:
            self.merge()

    def remove(self, chunk: ChunkId) -> None:
        self._recent[chunk[:_PREFIX]] = _REMOVED

    def remove_packs(self, numbers: Iterable[int]) -> None:
        """Forget everything that lies in these packs."""
        gone = np.fromiter(numbers, np.int64)
        self._keep(lambda locations: ~np.isin(packs_of(locations), gone))
        for number in gone.tolist():
            self._numbers.pop(self._names[number], None)

    def remove_at(self, pack: int, kept: frozenset[int]) -> list[int]:
        """Forget what lies in a pack, but for these offsets. Returns the offsets forgotten."""
        right = np.fromiter(kept, np.int64)
        return self._keep(
            lambda locations: (packs_of(locations) != pack) | np.isin(offsets_of(locations), right),
        )

    def remove_places(self, places: Iterable[tuple[str, int]]) -> None:
        """Forget what lies at these offsets of these packs."""
        gone = np.fromiter(
            (self._numbers[name] << _OFFSET_BITS | offset for name, offset in places if name in self._numbers),
            np.uint64,
        )
        if len(gone):
            self._keep(lambda locations: ~np.isin(locations >> np.uint64(_OFFSET_SHIFT), gone))

    def _keep(self, wanted: Callable[[Array], Bools]) -> list[int]:
        """Returns the offsets of what was not."""
        self.merge()
        lost: list[int] = []
        for number, segment in enumerate(self._segments):
            keep = wanted(segment.locations)
            if not keep.all():
                lost += offsets_of(segment.locations[~keep]).tolist()
                self._segments[number] = Segment(segment.keys[keep], segment.locations[keep])
        return lost

    def merge(self) -> None:
        """Sort what came lately into the segments. A later location of an id takes the place of an earlier one."""
        if not self._recent:
            return
        prefixes = np.frombuffer(b"".join(self._recent), np.uint8).reshape(-1, _PREFIX)
        locations = np.fromiter(self._recent.values(), np.uint64, len(self._recent))
        numbers, keys, checks = _columns(prefixes)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            segment = self._segments[number]
            # The segments first: a lookup that misses in the dict must find it here.
            self._segments[number] = _merged(segment, keys[here], checks[here], locations[here])
        self._recent = {}

    def dump(self) -> Iterator[bytes]:
        """The cache's file, one part after the other. Merge first. Packs get new numbers there."""
        live = sorted(self._numbers.values())
        names = "\n".join(self._names[number] for number in live).encode()
        yield _HEAD.pack(_MAGIC, _VERSION, len(names), blake3(names).digest()) + names
        renumbered = np.zeros(len(self._names), np.uint64)
        renumbered[live] = np.arange(len(live), dtype=np.uint64)
        for segment in self._segments:
            rest = segment.locations & np.uint64((1 << _PACK_SHIFT) - 1)
            locations = renumbered[packs_of(segment.locations)] << np.uint64(_PACK_SHIFT) | rest
            body = segment.keys.tobytes() + locations.tobytes()
            yield _SEGMENT_HEAD.pack(len(segment.keys), blake3(body).digest()) + body

    @classmethod
    def load(cls, read: Callable[[int, int], bytes], *, size: int) -> ChunkIndex:
        """read: bytes of the cache's file from an offset on, so many or fewer at its end. size: of the file.

        Raises DataCorrupt.
        """
        head = read(0, _HEAD.size)
        if len(head) < _HEAD.size:
            raise DataCorrupt("the cache of the index is cut short")
        magic, version, names_length, digest = _HEAD.unpack(head)
        if (magic, version) != (_MAGIC, _VERSION):
            raise DataCorrupt("the cache of the index is of another version")
        index = cls()
        # A length is believed only as far as the file goes.
        names = _checked(read(_HEAD.size, min(names_length, size)), names_length, digest)
        for name in names.decode().split("\n") if names else []:
            index.pack_number(name)
        position = _HEAD.size + names_length
        for number in range(_SEGMENTS):
            head = read(position, _SEGMENT_HEAD.size)
            if len(head) < _SEGMENT_HEAD.size:
                raise DataCorrupt("the cache of the index is cut short")
            count, digest = _SEGMENT_HEAD.unpack(head)
            length = 16 * count
            body = _checked(read(position + _SEGMENT_HEAD.size, min(length, size)), length, digest)
            position += _SEGMENT_HEAD.size + length
            index._segments[number] = Segment(
                np.frombuffer(body[: 8 * count], np.uint64), np.frombuffer(body[8 * count :], np.uint64)
            )
        return index


def _checked(data: bytes, length: int, digest: bytes) -> bytes:
    if len(data) != length or blake3(data).digest() != digest:
        raise DataCorrupt("the cache of the index is damaged")
    return data


def _merged(segment: Segment, keys: Array, checks: Array, locations: Array) -> Segment:
    stay = np.ones(len(segment.keys), np.bool_)
    replaced = _positions(segment, keys, checks)
    stay[replaced[replaced >= 0]] = False
    fresh = locations != np.uint64(_REMOVED)
    order = np.argsort(keys[fresh], kind="stable")
    added_keys, added_locations = keys[fresh][order], locations[fresh][order]
    kept = segment if stay.all() else Segment(segment.keys[stay], segment.locations[stay])
    at = np.searchsorted(kept.keys, added_keys)
    return Segment(np.insert(kept.keys, at, added_keys), np.insert(kept.locations, at, added_locations))


def locate(segments: Sequence[Segment], ids: bytes) -> Array:
    """`ChunkIndex.find_all` in a snapshot."""
    found = np.full(len(ids) // ID_SIZE, _REMOVED, np.uint64)
    for here, number, positions in places(segments, ids):
        found[here] = segments[number].locations[positions]
    return found


def places(segments: Sequence[Segment], ids: bytes) -> Iterable[tuple[npt.NDArray[np.intp], int, npt.NDArray[np.intp]]]:
    """For each segment that has some of the ids: which of them, its number, and their positions in it."""
    numbers, keys, checks = _columns(np.frombuffer(ids, np.uint8).reshape(-1, ID_SIZE))
    order = np.argsort(numbers, kind="stable")
    bounds = np.searchsorted(numbers[order], np.arange(_SEGMENTS + 1))
    for number in np.flatnonzero(bounds[1:] > bounds[:-1]).tolist():
        here = order[bounds[number] : bounds[number + 1]]
        positions = _positions(segments[number], keys[here], checks[here])
        present = positions >= 0
        yield here[present], number, positions[present]


def _columns(rows: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], Array, Array]:
    """Number of the segment, key and check of each id."""
    keys = np.ascontiguousarray(rows[:, 1:9]).view("<u8").ravel()
    return rows[:, 0], keys, (rows[:, 9] & _CHECK_MASK).astype(np.uint64)


def _parts(chunk: ChunkId) -> tuple[Array, Array]:
    key, check = int.from_bytes(chunk[1:9], "little"), chunk[9] & _CHECK_MASK
    return np.array([key], np.uint64), np.array([check], np.uint64)


def _positions(segment: Segment, keys: Array, checks: Array) -> npt.NDArray[np.intp]:
    """Where each of them stands; -1: nowhere."""
    result = np.full(len(keys), -1, np.intp)
    if not len(segment.keys):
        return result
    at = np.searchsorted(segment.keys, keys)
    # Ids that share a key are next to each other; more than two of them there will not be.
    for step in (0, 1):
        candidate = np.minimum(at + step, len(segment.keys) - 1)
        match = (segment.keys[candidate] == keys) & (segment.locations[candidate] & np.uint64(_CHECK_MASK) == checks)
        match &= result < 0
        result[match] = candidate[match]
    return result


def _pack(location: Location) -> int:
    assert location.offset < PACK_SIZE_MAX
    size_kib = -(-location.size // 1024)
    return location.pack << _PACK_SHIFT | location.offset << _OFFSET_SHIFT | size_kib << _CHECK_BITS


def _location(packed: int) -> Location:
    size_kib = packed >> _CHECK_BITS & ((1 << _SIZE_BITS) - 1)
    return Location(packed >> _PACK_SHIFT, packed >> _OFFSET_SHIFT & (PACK_SIZE_MAX - 1), size_kib * 1024)


def packs_of(locations: Array) -> npt.NDArray[np.int64]:
    return (locations >> np.uint64(_PACK_SHIFT)).astype(np.int64)


def offsets_of(locations: Array) -> npt.NDArray[np.int64]:
    return (locations >> np.uint64(_OFFSET_SHIFT) & np.uint64(PACK_SIZE_MAX - 1)).astype(np.int64)


def sizes_of(locations: Array) -> npt.NDArray[np.int64]:
    return (locations >> np.uint64(_CHECK_BITS) & np.uint64((1 << _SIZE_BITS) - 1)).astype(np.int64) * 1024


def is_missing(locations: Array) -> Bools:
    missing: Bools = locations == np.uint64(_REMOVED)
    return missing
