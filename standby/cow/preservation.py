"""Preservation stores: where old blocks go before they are overwritten, on any block device.

A store serves many volumes of any block sizes. `MemoryStore` keeps blocks as long as the process lives, `LoggedStore`
(logged_store.py) for ever.

Invariants:
- `preserve` keeps all of its blocks or none. Nobody overwrites them in place until `synchronize` returned.
- A slot is freed by `release` after the step that made it unneeded is durable (R4).
- After a failed write or flush the store is out of service (`failed`), but for a full disk beneath it, which is
  StoreFull: nothing was preserved and the mirror has not changed.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias
from uuid import UUID

import numpy as np
import numpy.typing as npt

from stillpoint.devices import BlockDevice
from stillpoint.errors import DeviceError, InvalidRequest, Refused, StoreFull

from .association import ALL_ZEROES, STORE_SHIFT, UNIT_SIZE, UNITS_MASK, Addresses
from .birth import Blocks, Generations
from .record_log import RECORD, Records
from .slots import SEGMENT_SIZE, SlotAllocator

LiveGenerations: TypeAlias = Callable[[], tuple[int, ...]]

logger = logging.getLogger(__name__)

WARNING_PERCENTS: Final = (70, 85, 95)  # each is said once when the store fills up to it

_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_RELEASE_SIZE: Final = 16 << 20  # bytes of slots freed at a time: some milliseconds
_MEMORY_DATA_OFFSET: Final = 4096  # addresses 0 and 1 are special, so no slot may begin there


@dataclass(frozen=True, slots=True)
class PreImages:
    """Blocks of one volume about to be overwritten; `data` holds them one after the other, `blocks` ascends."""

    volume: UUID
    block_size: int
    blocks: Blocks
    born: Generations
    to: int
    new_birth: int
    data: memoryview


class PreservationStore:
    """What both kinds have in common. `preserve`, `synchronize` and `release` may be called from any thread.

    number: of the store within its node, the high bits of every address it gives.
    size_max: bytes of the device up to which `extend` may grow it; 0: it has the size it has.
    extend: asked, by the thread that preserves and with the store's lock held, for room for that many bytes more.
    """

    durable = False
    kind = "memory"

    def __init__(self, device: BlockDevice, *, name: str, uuid: UUID, number: int, data_offset: int) -> None:
        if device.size - data_offset < SEGMENT_SIZE:
            raise InvalidRequest(f"store {name}: {device.size} bytes are too small; it needs {data_offset + (1 << 20)}")
        self.device = device
        self.name = name
        self.uuid = uuid
        self.number = number
        self.failed = ""
        self.size_max = 0
        self.extend: Callable[[int], bool] | None = None
        self._warned_percent = 0
        self._data_offset = data_offset
        self._allocator = SlotAllocator(data_offset=data_offset, data_size=device.size - data_offset)
        self._lock = threading.Lock()
        self._live: dict[UUID, LiveGenerations] = {}

    @property
    def size(self) -> int:
        """Bytes it has for blocks."""
        return self._allocator.size

    @property
    def used_size(self) -> int:
        return self._allocator.used_size

    @property
    def used_percent(self) -> int:
        """Of what it may become."""
        return 100 * self.used_size // max(self.size, self.size_max - self._data_offset)

    @property
    def warning_percent(self) -> int:
        """The highest of WARNING_PERCENTS that is reached; 0: none."""
        percent = self.used_percent
        return max((limit for limit in WARNING_PERCENTS if percent >= limit), default=0)

    def grow(self, size: int, announce: Callable[[], None]) -> None:
        """Make the device `size` bytes and use them. Durable on return. Waits for the disk.

        announce: called when the device has the size and before a slot beyond the old one is given out.
        Raises Refused (a kind or device that cannot grow), StoreFull (its log has no room to say so), DeviceError.
        """
        raise Refused(f"store {self.name}: is in memory and cannot grow")

    def recovered(self, volume: UUID) -> Records:
        """The records of this volume from before the store was opened, dead ones too, oldest first."""
        return no_records()

    def adopt(self, volume: UUID, live: LiveGenerations) -> None:
        """Keep what the live snapshots of this volume need; what they do not need is free.

        live: asked again whenever it matters which records are needed, from any thread; it may forget a snapshot only
        when that is durable.
        """
        self._live[volume] = live

    def preserve(self, images: PreImages) -> Addresses:
        """Keep the blocks. Durable after the next `synchronize`. Returns where each one is.

        Raises StoreFull (no room: nothing was kept) or DeviceError (the store failed for good).
        """
        with self._lock:
            zero = zero_rows(images.data, images.block_size)
            addresses: Addresses = np.full(len(images.blocks), ALL_ZEROES, dtype="<u8")
            stored = np.flatnonzero(~zero)
            slots: Addresses = np.empty(0, dtype="<u8")
            try:
                slots = self._allocate(len(stored), images.block_size)
                addresses[stored] = slots
                self._write_blocks(images, stored, slots)
                self._log(images, addresses, zero)
            except DeviceError as error:
                self._allocator.free(slots, images.block_size)
                if error.errno in _NO_SPACE:
                    raise StoreFull(f"store {self.name}: {error}") from error
                self.failed = self.failed or str(error)
                raise
            except StoreFull:
                self._allocator.free(slots, images.block_size)
                raise
        addresses[stored] += np.uint64(self.number << STORE_SHIFT)
        return addresses

    def synchronize(self) -> None:
        """Make everything preserved before this call durable. Raises DeviceError: the store failed for good."""

    def release(self, addresses: Addresses, block_size: int) -> None:
        """Free slots of this store. The step that made them unneeded is durable. Waits for the disk."""
        slots = np.sort(addresses & np.uint64(UNITS_MASK))  # so that most segments are emptied in one step
        step = max(1, _RELEASE_SIZE // block_size)
        for start in range(0, len(slots), step):
            with self._lock:  # not for longer: others preserve meanwhile, some of them on the event loop
                for offset, length in _joined(self._allocator.free(slots[start : start + step], block_size)):
                    self._give_back(offset, length)
        with self._lock:
            self._warn()

    def forget(self, volume: UUID) -> None:
        """The volume was deleted, its snapshots before it: nothing of it is needed any more, durably."""
        self._live.pop(volume, None)

    def close(self) -> None:
        self.device.close()

    def _allocate(self, count: int, block_size: int) -> Addresses:
        if self.failed:
            raise DeviceError(f"store {self.name} is out of service: {self.failed}", errno.EIO)
        if not count:
            return np.empty(0, dtype="<u8")
        while True:
            try:
                slots = self._allocator.allocate(count, block_size)
                break
            except StoreFull as error:
                if self.extend is None or not self.extend(count * block_size):
                    raise StoreFull(f"store {self.name}: {error}") from None
        self._warn()
        return slots

    def _warn(self) -> None:
        reached = self.warning_percent
        if reached > self._warned_percent:
            fields = {"store": self.name, "percent": self.used_percent, "used": self.used_size, "size": self.size}
            logger.warning("preservation store is %d %% full", reached, extra=fields)
        self._warned_percent = reached

    def _write_blocks(self, images: PreImages, stored: npt.NDArray[np.int64], slots: Addresses) -> None:
        for start, end in _runs(slots, images.block_size // UNIT_SIZE):
            self.device.write(int(slots[start]) * UNIT_SIZE, list(_views(images, stored[start:end])))

    def _log(self, images: PreImages, addresses: Addresses, zero: npt.NDArray[np.bool_]) -> None:
        """Remember the records as long as the blocks are kept."""

    def _give_back(self, offset: int, length: int) -> None:
        try:
            self.device.trim(offset, length)
        except DeviceError as error:
            self.failed = str(error)


class MemoryStore(PreservationStore):
    """Blocks in memory: nothing to flush, nothing left after a restart."""

    def __init__(self, device: BlockDevice, *, name: str, uuid: UUID, number: int) -> None:
        super().__init__(device, name=name, uuid=uuid, number=number, data_offset=_MEMORY_DATA_OFFSET)


def zero_rows(data: memoryview, block_size: int) -> npt.NDArray[np.bool_]:
    """Which of the blocks in `data` are all zeroes."""
    words = np.frombuffer(data, dtype=np.uint64).reshape(-1, block_size // 8)
    zero: npt.NDArray[np.bool_] = (words[:, 0] == 0) & (words[:, -1] == 0)
    for row in np.flatnonzero(zero).tolist():
        zero[row] = not words[row].any()
    return zero


def _joined(segments: list[int]) -> Iterator[tuple[int, int]]:
    """(offset, length) of the stretches of neighbouring segments, whose offsets ascend."""
    start = 0
    for index in range(1, len(segments) + 1):
        if index == len(segments) or segments[index] != segments[index - 1] + SEGMENT_SIZE:
            yield segments[start], segments[index - 1] + SEGMENT_SIZE - segments[start]
            start = index


def _runs(slots: Addresses, step: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the stretches in which each slot is `step` behind the one before."""
    if not len(slots):
        return
    borders = (np.flatnonzero(np.diff(slots) != step) + 1).tolist()
    yield from zip([0, *borders], [*borders, len(slots)], strict=True)


def _views(images: PreImages, rows: npt.NDArray[np.int64]) -> Iterator[memoryview]:
    """The blocks in `rows`, neighbours as one buffer."""
    size = images.block_size
    borders = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
    for start, end in zip([0, *borders], [*borders, len(rows)], strict=True):
        yield images.data[int(rows[start]) * size : (int(rows[end - 1]) + 1) * size]


def no_records() -> Records:
    return np.empty(0, dtype=RECORD)
