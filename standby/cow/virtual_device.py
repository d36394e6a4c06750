"""A snapshot as a read-only block device, in any process: it opens the mirror, the maps and the stores by itself.

The rule of a reader, block by block: if the birth is not newer than the snapshot, read the mirror, then look at the
birth again; if the block was preserved meanwhile, use the preserved copy. The engine stores the map entry, then the
birth, then overwrites, so a birth that is still old after the read proves the bytes.

A read during which the list of live snapshots changed (`list_follower.py`) is done again. That also proves that no slot
it read had been given to somebody else.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from stillpoint.devices import BlockDevice, Buffer, MemoryDevice, open_device
from stillpoint.errors import DataCorrupt, DeviceError, NotFound, PermissionRefused, Refused
from stillpoint.extents import MappedExtent, check_range, coalesce

from .association import (
    ALL_ZEROES,
    NOT_PRESERVED,
    UNIT_SIZE,
    Addresses,
    offset_of,
    store_of,
)
from .birth import BirthMap, Generations
from .changed import births_as_of
from .list_follower import ListFollower, View
from .store_directory import read_definitions

_EXTENTS_AT_ONCE: Final = 1 << 16  # blocks looked up in one step of `extents`

OpenDevice: TypeAlias = Callable[[Sequence[str], int], BlockDevice]


def open_virtual_device(
    description: Mapping[str, Any],
    snapshot_name: str,
    *,
    fds: Mapping[str, int] | None = None,
    open_mirror: OpenDevice | None = None,
) -> VirtualDevice:
    """Open a snapshot from what `SnapshotEngine.describe` said.

    fds: descriptors of memory stores by their name, still owned by the caller; without one the store's memory is
    reached through /proc of the engine's process. open_mirror: (paths, size) -> device, read-only.
    Raises NotFound, SnapshotInvalid, DeviceError, DataCorrupt.
    """
    for snapshot in description["snapshots"]:
        if snapshot["name"] == snapshot_name:
            return VirtualDevice(description, snapshot, fds=fds or {}, open_mirror=open_mirror or _open_paths)
    raise NotFound(f"{description['volume']}@{snapshot_name}: there is no such snapshot")


class VirtualDevice:
    """A BlockDevice. May be read by several threads; `close` when none of them is in a call.

    A read raises SnapshotInvalid once the snapshot was deleted or lost blocks, or its engine has gone.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        snapshot: Mapping[str, Any],
        *,
        fds: Mapping[str, int],
        open_mirror: OpenDevice,
    ) -> None:
        self._description = f"{description['volume']}@{snapshot['name']}"
        self.generation: int = snapshot["generation"]
        self._size: int = snapshot["size"]
        self._block_size: int = description["block_size"]
        self._stores_path = Path(description["stores"])
        self._fds = fds
        self._stores: dict[int, BlockDevice] = {}
        self._outgrown: list[BlockDevice] = []
        header, maps, births = (Path(description[name]) for name in ("header", "maps", "births"))
        try:
            with ExitStack() as opened:
                self._follower = ListFollower(header, maps, self.generation, name=self._description)
                opened.callback(self._follower.close)
                self._births = BirthMap.open(births, self._size // self._block_size, writable=False)
                opened.callback(self._births.close)
                self._mirror = open_mirror(description["mirror_paths"], self._size)
                opened.callback(self._mirror.close)
                self.check()
                opened.pop_all()
        except OSError as error:
            raise DeviceError(f"{self._description}: cannot be opened: {error}", error.errno or errno.EIO) from error

    @property
    def size(self) -> int:
        return self._size

    @property
    def read_only(self) -> bool:
        return True

    @property
    def description(self) -> str:
        return self._description

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return self._read(offset, buffer, wait=False)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._read(offset, buffer, wait=True)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        raise PermissionRefused(f"{self._description}: is a read-only snapshot")

    def trim(self, offset: int, length: int) -> None:
        raise PermissionRefused(f"{self._description}: is a read-only snapshot")

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        raise PermissionRefused(f"{self._description}: is a read-only snapshot")

    def flush(self) -> None:
        """Nothing is ever written."""

    def resize(self, size: int) -> None:
        raise Refused(f"{self._description}: a snapshot has the size it was taken with")

    def extents(self, offset: int, length: int) -> Iterator[MappedExtent]:
        check_range(offset=offset, length=length, size=self._size)
        return coalesce(self._extents(offset, offset + length))

    def check(self) -> None:
        """Raise SnapshotInvalid once the snapshot was deleted or lost blocks, or its engine has gone."""
        self._follower.view()

    def births_as_of(self, first: int, count: int) -> Generations:
        """In which generation the snapshot's content of each of `count` blocks from `first` was written.

        What is newer than an earlier instant of the same incarnation has changed since. Computed in the caller's
        process, so it costs the mirror nothing. Raises as a read does.
        """
        while True:
            view = self._follower.view()
            births = births_as_of(self._births.array, tuple(view.maps.values()), first, count)
            if self._follower.is_settled(view):
                return births

    def close(self) -> None:
        for store in (*self._stores.values(), *self._outgrown):
            store.close()
        self._stores.clear()
        self._outgrown.clear()
        self._mirror.close()
        self._births.close()
        self._follower.close()

    def _read(self, offset: int, buffer: memoryview, *, wait: bool) -> bool:
        length = len(buffer)
        check_range(offset=offset, length=length, size=self._size)
        if not length:
            return True
        first = offset // self._block_size
        count = (offset + length - 1) // self._block_size - first + 1
        while True:
            view = self._follower.view()
            if count == 1 and self._read_live_block(first, offset, buffer):
                return True
            where = self._look_up(view, first, count)
            if where is None:
                if self._follower.is_settled(view):
                    raise DataCorrupt(f"{self._description}: blocks {first}+{count} are neither live nor preserved")
                continue
            if not self._fill(offset, buffer, first, where, wait=wait):
                return False
            if not self._overtaken(first, where) and self._follower.is_settled(view):
                return True

    def _read_live_block(self, block: int, offset: int, buffer: memoryview) -> bool:
        """The common case made short: one block, on the mirror, in the page cache. False: take the long way."""
        births = self._births.scalars
        return (
            births[block] <= self.generation
            and self._mirror.try_read_into(offset, buffer)
            # Also proves the snapshot was not displaced before the read: its blocks are overwritten after a new birth.
            and births[block] <= self.generation
        )

    def _look_up(self, view: View, first: int, count: int) -> Addresses | None:
        """Where each block is: NOT_PRESERVED for the mirror. None: not found, the list must have changed."""
        births = self._births.array[first : first + count]
        wanted = births > self.generation
        where: Addresses = np.zeros(count, dtype="<u8")
        for records in view.maps.values():
            if not wanted.any():
                return where
            found = records.lookup(first, count)
            if found is None:
                continue
            addresses, born = found
            here = wanted & (addresses != NOT_PRESERVED)
            if bool((born[here] > self.generation).any()):
                return None
            where[here] = addresses[here]
            wanted &= ~here
        return None if wanted.any() else where

    def _overtaken(self, first: int, where: Addresses) -> bool:
        """Whether a block that was read from the mirror has been preserved meanwhile."""
        births: Generations = self._births.array[first : first + len(where)]
        return bool(((where == NOT_PRESERVED) & (births > self.generation)).any())

    def _fill(self, offset: int, buffer: memoryview, first: int, where: Addresses, *, wait: bool) -> bool:
        size = self._block_size
        end = offset + len(buffer)
        for start_block, end_block in _stretches(where, size // UNIT_SIZE):
            address = int(where[start_block])
            start = max(offset, (first + start_block) * size)
            view = buffer[start - offset : min(end, (first + end_block) * size) - offset]
            if address == ALL_ZEROES:
                view[:] = bytes(len(view))
                continue
            device, position = self._mirror, start
            if address != NOT_PRESERVED:
                position = offset_of(address) + start - (first + start_block) * size
                device = self._store(store_of(address), reach=position + len(view))
            if not device.try_read_into(position, view):
                if not wait:
                    return False
                device.read_into(position, view)
        return True

    def _extents(self, position: int, end: int) -> Iterator[MappedExtent]:
        size = self._block_size
        while position < end:
            first = position // size
            count = min(-(-end // size) - first, _EXTENTS_AT_ONCE)
            limit = min(end, (first + count) * size)
            yield from self._settled_extents(position, limit, first, count)
            position = limit

    def _settled_extents(self, position: int, end: int, first: int, count: int) -> list[MappedExtent]:
        size = self._block_size
        while True:
            view = self._follower.view()
            where = self._look_up(view, first, count)
            if where is None:
                if self._follower.is_settled(view):
                    raise DataCorrupt(f"{self._description}: blocks {first}+{count} are neither live nor preserved")
                continue
            extents: list[MappedExtent] = []
            for start_block, end_block in _stretches(where, size // UNIT_SIZE):
                start = max(position, (first + start_block) * size)
                length = min(end, (first + end_block) * size) - start
                address = int(where[start_block])
                if address == NOT_PRESERVED:
                    extents.extend(self._mirror.extents(start, length))
                else:
                    extents.append(MappedExtent(start, length, hole=address == ALL_ZEROES))
            if not self._overtaken(first, where) and self._follower.is_settled(view):
                return extents

    def _store(self, number: int, *, reach: int) -> BlockDevice:
        """reach: bytes it must have. A store that has grown is opened again; somebody may still read the old one."""
        device = self._stores.get(number)
        if device is None or device.size < reach:
            device = self._open_store(number)
            self._outgrown.append(self._stores.pop(number, device))
            self._stores[number] = device
        return device

    def _open_store(self, number: int) -> BlockDevice:
        try:
            _, definitions = read_definitions(self._stores_path)
        except OSError as error:
            raise DeviceError(f"{self._stores_path}: {error.strerror}", error.errno or errno.EIO) from error
        for definition in definitions:
            if definition.number == number:
                if definition.name in self._fds:
                    return MemoryDevice.from_descriptor(os.dup(self._fds[definition.name]), read_only=True)
                return open_device([Path(path) for path in definition.paths], size=definition.size, read_only=True)
        raise DeviceError(f"{self._description}: store number {number} is gone", errno.EIO)


def _open_paths(paths: Sequence[str], size: int) -> BlockDevice:
    return open_device([Path(path) for path in paths], size=size, read_only=True)


def _stretches(where: npt.NDArray[np.uint64], step: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the blocks that can be read in one go: live, all zeroes, or slots one after the other."""
    if len(where) == 1:
        yield 0, 1
        return
    special = where[1:] <= ALL_ZEROES
    joined = np.where(special, where[1:] == where[:-1], where[1:] - where[:-1] == step)
    borders = (np.flatnonzero(~joined) + 1).tolist()
    yield from zip([0, *borders], [*borders, len(where)], strict=True)
