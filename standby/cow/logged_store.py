"""A preservation store that outlives its process: two superblocks, a log of records in two halves, and the blocks.

Byte tables and golden files: README.md, "The store".

Invariants, and where a crash may strike:
- `preserve` writes blocks into free slots, then one batch of records at the end of the log. Until `synchronize`
  returned, nobody overwrites those blocks in place: a batch lost or torn by a crash was not needed yet.
- A batch names the newest batch known durable when it was written. After a crash the blocks of later ones are checked
  against their CRC, and the log ends before the first that fails (R6): what follows it was not durable either.
- When a half of the log is full the records still needed are written into the other half, made durable, and only then
  a superblock points there. Superblocks alternate, so a torn one leaves its predecessor and the old half intact.
- Growing: the device first, then a superblock that says so (by the same switch), then slots beyond the old size. A
  crash before the superblock leaves a larger device, all of which the next start uses.
- A slot is freed by `release` after the step that freed it is durable (R4). A record is dead when no live snapshot is
  in its interval; dead records stay dead, so a reused slot is never claimed twice.
- Before a freed slot can be reused, a durable MARK says that the records so far are durable: checking the CRC of a
  batch whose slot has gone to another block would end the log in front of records that are needed.
- After a failed write or flush the store is out of service (`failed`), but for a full disk beneath it, which is
  StoreFull: nothing was preserved and the mirror has not changed.
"""

from __future__ import annotations

import errno
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final
from uuid import UUID, uuid4

import numpy as np
import numpy.typing as npt

from stillpoint.checksum import crc32
from stillpoint.devices import BlockDevice
from stillpoint.errors import DataCorrupt, DeviceError, Refused, StoreFull

from . import record_log
from .association import ALL_ZEROES, PIECE_ENTRIES, UNIT_SIZE, Addresses
from .preservation import LiveGenerations, PreImages, PreservationStore, no_records
from .record_log import RECORD, Batch, BatchType, Records, Superblock

_LOG_SIZE_MIN: Final = 64 << 10
_LOG_SIZE_MAX: Final = 1 << 30
_LOG_SHARE: Final = 32  # each half is this part of the device: enough for blocks of 4 KiB, more than enough above
_LOG_SHARE_MOST: Final = 8  # of the device as it is, when it may become much larger
_RUN_SIZE_MAX: Final = 1 << 20


class LoggedStore(PreservationStore):
    durable = True
    kind = "file"

    def __init__(self, device: BlockDevice, root: Superblock, *, name: str) -> None:
        super().__init__(device, name=name, uuid=root.uuid, number=root.number, data_offset=root.data_offset)
        self._root = root
        self._log_end = 0
        self._next_sequence = root.first_batch
        self._durable_sequence = root.first_batch - 1
        self._recovered: dict[UUID, list[Batch]] = defaultdict(list)
        self._adopted: dict[int, list[Addresses]] = defaultdict(list)
        self._settled = False

    @classmethod
    def create(
        cls, device: BlockDevice, *, name: str, number: int, log_size: int = 0, size_max: int = 0
    ) -> LoggedStore:
        """Make the device an empty store; what it held is lost. Durable on return. Raises InvalidRequest, DeviceError.

        log_size: bytes of each half of the log; 0 for a share of what the device may become, size_max.
        """
        wanted = min(max(device.size, size_max) // _LOG_SHARE, device.size // _LOG_SHARE_MOST)
        share = min(max(wanted, _LOG_SIZE_MIN), _LOG_SIZE_MAX)
        log_size = -(-(log_size or share) // 4096) * 4096
        data_offset = record_log.LOG_OFFSET + 2 * log_size
        # Batches count only under their superblock's sequence, so beginning anywhere makes those of a store that was on
        # this device before worthless, without zeroing its log.
        root = Superblock(uuid4(), 1 + secrets.randbits(40), device.size, data_offset, log_size, 0, 1, number)
        store = cls(device, root, name=name)
        device.write_zeroes(0, record_log.LOG_OFFSET)
        store._write_root(root)
        store._settled = True
        return store

    @classmethod
    def open(cls, device: BlockDevice, *, name: str) -> LoggedStore:
        """Read the log. Raises DataCorrupt when the device holds no store of a version we read, DeviceError."""
        blocks = [
            record_log.decode_superblock(_read(device, index * record_log.SUPERBLOCK_SIZE, record_log.SUPERBLOCK_SIZE))
            for index in range(record_log.SUPERBLOCK_COUNT)
        ]
        roots = [block for block in blocks if block is not None and block.device_size <= device.size]
        if not roots:
            raise DataCorrupt(f"{device.description}: holds no preservation store of version {record_log.VERSION}")
        store = cls(device, max(roots, key=lambda root: root.sequence), name=name)
        store._recover()
        return store

    @property
    def used_size(self) -> int:
        if self._settled:
            return super().used_size
        return sum(size * len(slots) for size, parts in self._adopted.items() for slots in parts)

    def recovered(self, volume: UUID) -> Records:
        batches = self._recovered.get(volume, [])
        return np.concatenate([batch.records for batch in batches]) if batches else super().recovered(volume)

    def adopt(self, volume: UUID, live: LiveGenerations) -> None:
        with self._lock:
            self._live[volume] = live
            for batch in self._recovered.pop(volume, []):
                owners = record_log.owners(batch.records["born"], batch.records["to"], live())
                slots = _slots_of(batch.records[owners != -1], batch.block_size)
                if self._settled:
                    self._allocator.adopt_withheld(slots, batch.block_size)
                else:
                    self._adopted[batch.block_size].append(slots)

    def synchronize(self) -> None:
        with self._lock:
            sequence = self._next_sequence - 1
            if self.failed:
                raise DeviceError(f"store {self.name} is out of service: {self.failed}", errno.EIO)
        try:
            # Without the lock: other volumes may go on, and everything up to `sequence` was written before.
            self.device.flush()
        except DeviceError as error:
            self.failed = str(error)
            raise
        with self._lock:
            self._durable_sequence = max(self._durable_sequence, sequence)

    def forget(self, volume: UUID) -> None:
        with self._lock:
            self._live.pop(volume, None)
            self._append(BatchType.FORGET, volume, UNIT_SIZE, no_records())
        self.synchronize()

    def grow(self, size: int, announce: Callable[[], None]) -> None:
        with self._lock:
            self.grow_while_locked(size, announce)

    def grow_while_locked(self, size: int, announce: Callable[[], None]) -> None:
        """As `grow`, for `extend`, which is called with the lock held."""
        if self.failed:
            raise DeviceError(f"store {self.name} is out of service: {self.failed}", errno.EIO)
        if size <= self.device.size:
            raise Refused(f"store {self.name}: has {self.device.size} bytes already; it can only grow")
        self.device.resize(size)
        announce()
        try:
            self._compact(device_size=size)
        except DeviceError as error:
            self.failed = self.failed or str(error)
            raise
        self._allocator.extend(size - self._data_offset)

    def volumes_recovered(self) -> frozenset[UUID]:
        """Volumes that have records here and have not been adopted."""
        return frozenset(self._recovered)

    def _allocate(self, count: int, block_size: int) -> Addresses:
        if not self._settled:
            self._settle()
        return super()._allocate(count, block_size)

    def _settle(self) -> None:
        """From now on slots are given out; volumes not adopted by now keep whole segments until the next start."""
        # What died with the last run (a snapshot that was never finished) is free from here on.
        self._mark()
        used = {size: np.concatenate(slots) for size, slots in self._adopted.items()}
        withheld = [_slots_of(batch.records, batch.block_size) for rest in self._recovered.values() for batch in rest]
        self._allocator.rebuild(used, np.concatenate(withheld) if withheld else np.empty(0, dtype="<u8"))
        self._adopted.clear()
        self._settled = True

    def _mark(self) -> None:
        """Before slots change hands: say durably that every record so far is durable."""
        self._append(BatchType.MARK, UUID(int=0), UNIT_SIZE, no_records())
        self.device.flush()
        self._durable_sequence = self._next_sequence - 1

    def release(self, addresses: Addresses, block_size: int) -> None:
        if not len(addresses):
            return
        try:
            with self._lock:
                if not self._settled:
                    self._settle()
                self._mark()
        except DeviceError as error:
            self.failed = self.failed or str(error)
        except StoreFull:
            pass  # the slots stay taken until the next start, which frees what no snapshot needs
        else:
            super().release(addresses, block_size)

    def _log(self, images: PreImages, addresses: Addresses, zero: npt.NDArray[np.bool_]) -> None:
        starts = _record_starts(images, addresses, zero)
        ends = np.append(starts[1:], len(images.blocks))
        records: Records = np.zeros(len(starts), dtype=RECORD)
        records["block"] = images.blocks[starts]
        records["address"] = addresses[starts]
        records["count"] = ends - starts
        records["born"] = images.born[starts]
        records["to"] = images.to
        records["new_birth"] = images.new_birth
        size = images.block_size
        records["crc"] = [
            0 if zero[start] else crc32(images.data[start * size : end * size])
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        ]
        self._append(BatchType.PRESERVE, images.volume, size, records)

    def _append(self, kind: BatchType, volume: UUID, block_size: int, records: Records) -> None:
        if self._log_end + record_log.BATCH_HEADER_SIZE + records.nbytes > self._root.log_size:
            self._compact()
            if self._log_end + record_log.BATCH_HEADER_SIZE + records.nbytes > self._root.log_size:
                raise StoreFull(f"store {self.name}: its log has no room for {len(records)} more records")
        batch = Batch(kind, self._next_sequence, self._durable_sequence, volume, block_size, records)
        data = record_log.encode_batch(batch, superblock_sequence=self._root.sequence)
        self.device.write(self._root.log_offset + self._log_end, (data,))
        self._log_end += len(data)
        self._next_sequence += 1

    def _compact(self, *, device_size: int = 0) -> None:
        """Write the records still needed into the other half of the log and switch to it. Durable on return.

        device_size: what the superblock says from then on; 0: as before.
        """
        new_root = self._root.switched(first_batch=self._next_sequence)
        new_root = replace(new_root, device_size=device_size or new_root.device_size)
        sequence = new_root.first_batch
        position = 0
        for volume, block_size, records in _needed(self._read_batches(), self._live):
            batch = Batch(BatchType.PRESERVE, sequence, sequence - 1, volume, block_size, records)
            data = record_log.encode_batch(batch, superblock_sequence=new_root.sequence)
            if position + len(data) > new_root.log_size:
                raise StoreFull(f"store {self.name}: its log is full of records that are needed")
            self.device.write(new_root.log_offset + position, (data,))
            position += len(data)
            sequence += 1
        self._write_root(new_root)
        self._log_end = position
        self._next_sequence = sequence
        self._durable_sequence = sequence - 1

    def _write_root(self, root: Superblock) -> None:
        """Switch to `root`, after making durable what it points to. Durable on return."""
        offset = root.sequence % record_log.SUPERBLOCK_COUNT * record_log.SUPERBLOCK_SIZE
        try:
            self.device.flush()
            self.device.write(offset, (record_log.encode_superblock(root),))
            self.device.flush()
        except DeviceError as error:
            # Never "full": which root the device holds is not known any more, so nothing may follow.
            raise DeviceError(str(error), errno.EIO) from error
        self._root = root

    def _read_batches(self) -> Iterator[Batch]:
        """The batches of the active half, as far as they were written."""
        for end, batch in record_log.read_batches(_Window(self.device, self._root.log_offset).read, self._root):
            if end > self._log_end:
                return
            yield batch

    def _recover(self) -> None:
        self._log_end = self._root.log_size
        batches = list(record_log.read_batches(_Window(self.device, self._root.log_offset).read, self._root))
        durable = batches[-1][1].durable if batches else 0
        self._log_end = 0
        for end, batch in batches:
            if batch.sequence > durable and not self._is_intact(batch):
                break
            self._log_end = end
            self._next_sequence = batch.sequence + 1
            if batch.type is BatchType.FORGET:
                self._recovered.pop(batch.volume, None)
            elif batch.type is BatchType.PRESERVE:
                self._recovered[batch.volume].append(batch)
        # What was read may still be in the page cache only; from now on it is relied upon.
        self.device.flush()
        self._durable_sequence = self._next_sequence - 1

    def _is_intact(self, batch: Batch) -> bool:
        for record in batch.records[batch.records["address"] != ALL_ZEROES]:
            length = int(record["count"]) * batch.block_size
            offset = int(record["address"]) * UNIT_SIZE
            if offset + length > self.device.size:
                return False
            if crc32(_read(self.device, offset, length)) != int(record["crc"]):
                return False
        return True


class _Window:
    """Reads of a log in order, through a buffer."""

    _SIZE: Final = 1 << 20

    def __init__(self, device: BlockDevice, start: int) -> None:
        self._device = device
        self._start = start
        self._offset = 0
        self._data = b""

    def read(self, offset: int, length: int) -> bytes:
        if not self._offset <= offset <= offset + length <= self._offset + len(self._data):
            reach = min(max(length, self._SIZE), self._device.size - self._start - offset)
            self._data = _read(self._device, self._start + offset, reach)
            self._offset = offset
        return self._data[offset - self._offset : offset - self._offset + length]


def _needed(batches: Iterator[Batch], live: dict[UUID, LiveGenerations]) -> Iterator[tuple[UUID, int, Records]]:
    """The records that must outlive the old half of the log, in batches of bounded size."""
    kept: dict[tuple[UUID, int], list[Records]] = defaultdict(list)
    for batch in batches:
        if batch.type is BatchType.FORGET:
            for key in [key for key in kept if key[0] == batch.volume]:
                del kept[key]
            continue
        records = batch.records
        generations = live.get(batch.volume)
        if generations is not None:
            records = records[record_log.owners(records["born"], records["to"], generations()) != -1]
        if len(records):
            kept[batch.volume, batch.block_size].append(records)
    for (volume, block_size), parts in kept.items():
        joined = np.concatenate(parts)
        for start in range(0, len(joined), PIECE_ENTRIES):
            yield volume, block_size, joined[start : start + PIECE_ENTRIES]


def _slots_of(records: Records, block_size: int) -> Addresses:
    """Every slot these records hold, one by one."""
    stored = records[records["address"] != ALL_ZEROES]
    index, position = record_log.expand(stored)
    slots: Addresses = stored["address"][index] + position.astype(np.uint64) * np.uint64(block_size // UNIT_SIZE)
    return slots


def _record_starts(images: PreImages, addresses: Addresses, zero: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Where a new record begins: neighbouring blocks of one birth, stored one after the other, share one."""
    count = len(images.blocks)
    step = images.block_size // UNIT_SIZE
    joins = (np.diff(images.blocks) == 1) & (np.diff(images.born.astype(np.int64)) == 0) & (zero[1:] == zero[:-1])
    joins &= zero[1:] | (np.diff(addresses.astype(np.int64)) == step)
    # Long runs of data are cut so that checking one needs a bounded buffer.
    joins &= zero[1:] | (np.arange(1, count) % max(1, _RUN_SIZE_MAX // images.block_size) != 0)
    return np.concatenate(([0], np.flatnonzero(~joins) + 1))


def _read(device: BlockDevice, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    device.read_into(offset, memoryview(buffer))
    return bytes(buffer)
