"""Devices that misbehave on purpose, and one that remembers what a crash could leave behind."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from stillpoint.devices import BlockDevice, Buffer
from stillpoint.errors import DeviceError
from stillpoint.extents import MappedExtent

SECTOR_SIZE = 512


class PassingDevice:
    """A device that hands every call to the one beneath; the base of the ones below."""

    def __init__(self, beneath: BlockDevice) -> None:
        self.beneath = beneath

    @property
    def size(self) -> int:
        return self.beneath.size

    @property
    def read_only(self) -> bool:
        return self.beneath.read_only

    @property
    def description(self) -> str:
        return self.beneath.description

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return self.beneath.try_read_into(offset, buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.beneath.read_into(offset, buffer)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.beneath.write(offset, buffers)

    def trim(self, offset: int, length: int) -> None:
        self.beneath.trim(offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        self.beneath.write_zeroes(offset, length, may_trim=may_trim)

    def flush(self) -> None:
        self.beneath.flush()

    def extents(self, offset: int, length: int) -> Iterator[MappedExtent]:
        return self.beneath.extents(offset, length)

    def resize(self, size: int) -> None:
        self.beneath.resize(size)

    def close(self) -> None:
        self.beneath.close()


@dataclass
class Fault:
    """Fail calls number `first` to `last` (counted from 1) with `errno`."""

    errno: int
    first: int = 1
    last: int = 1 << 62


class FaultyDevice(PassingDevice):
    """Fails, dawdles and lies as told. A write that fails changes nothing; a flush that failed fails for ever after.

    reads, writes, flushes: the fault of that kind of call, None for none. Trims and zeroings count as writes.
    read_delay_s, write_delay_s, flush_delay_s: how long each call sleeps first.
    never_cached: `try_read_into` always says no, as for a disk that has to be waited for.
    flush_lies: flushes say yes without asking the device beneath (`flush_count` still counts them).
    """

    def __init__(self, beneath: BlockDevice) -> None:
        super().__init__(beneath)
        self.reads: Fault | None = None
        self.writes: Fault | None = None
        self.flushes: Fault | None = None
        self.read_delay_s = self.write_delay_s = self.flush_delay_s = 0.0
        self.never_cached = False
        self.flush_lies = False
        self.read_count = self.write_count = self.flush_count = 0
        self._flush_failed: Fault | None = None

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        if self.never_cached or self.read_delay_s or self.reads is not None:
            return False
        return super().try_read_into(offset, buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.read_count += 1
        self._act(self.reads, self.read_count, self.read_delay_s, "read")
        super().read_into(offset, buffer)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._before_write()
        super().write(offset, buffers)

    def trim(self, offset: int, length: int) -> None:
        self._before_write()
        super().trim(offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        self._before_write()
        super().write_zeroes(offset, length, may_trim=may_trim)

    def flush(self) -> None:
        self.flush_count += 1
        if self._flush_failed is None and self.flushes and self._strikes(self.flushes, self.flush_count):
            self._flush_failed = self.flushes
        self._act(self._flush_failed, 1 << 61, self.flush_delay_s, "flush")
        if not self.flush_lies:
            super().flush()

    def _before_write(self) -> None:
        self.write_count += 1
        self._act(self.writes, self.write_count, self.write_delay_s, "write")

    def _act(self, fault: Fault | None, count: int, delay_s: float, what: str) -> None:
        if delay_s:
            time.sleep(delay_s)
        if fault is not None and (self._strikes(fault, count) or what == "flush"):
            message = f"{self.description}: {what} failed on purpose: {os.strerror(fault.errno)}"
            raise DeviceError(message, fault.errno)

    @staticmethod
    def _strikes(fault: Fault, count: int) -> bool:
        return fault.first <= count <= fault.last


@dataclass
class _Change:
    """Bytes that were written, or zeroed (`data` is None), after the last flush."""

    offset: int
    length: int
    data: bytes | None

    def apply(self, image: bytearray, start: int, end: int) -> None:
        data = bytes(end - start) if self.data is None else self.data[start:end]
        image[self.offset + start : self.offset + end] = data


@dataclass
class RecordingDevice(PassingDevice):
    """Remembers every change since the last flush, so that the states a crash could leave can be rebuilt.

    A crash keeps all that was flushed, and of what came after any subset, each change torn at 512-byte borders.
    """

    beneath: BlockDevice
    _durable: bytearray = field(init=False)
    _pending: list[_Change] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._durable = bytearray(self.beneath.size)
        self.beneath.read_into(0, memoryview(self._durable))

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        super().write(offset, buffers)
        data = b"".join(buffers)
        self._pending.append(_Change(offset, len(data), data))

    def trim(self, offset: int, length: int) -> None:
        super().trim(offset, length)
        self._pending.append(_Change(offset, length, None))

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        super().write_zeroes(offset, length, may_trim=may_trim)
        self._pending.append(_Change(offset, length, None))

    def flush(self) -> None:
        covered = len(self._pending)
        super().flush()
        for change in self._pending[:covered]:
            change.apply(self._durable, 0, change.length)
        del self._pending[:covered]

    def resize(self, size: int) -> None:
        super().resize(size)
        self._durable.extend(bytes(size - len(self._durable)))

    def pending_count(self) -> int:
        """How many changes a crash now could lose."""
        return len(self._pending)

    def crash_image(self, choose: random.Random) -> bytes:
        """One state that a crash at this moment could leave, drawn with `choose`."""
        image = bytearray(self._durable)
        for change in self._pending:
            for start, end in _sectors(change):
                if choose.random() < 0.5:
                    change.apply(image, start, end)
        return bytes(image)

    def crash_images(self, choose: random.Random, count: int) -> Iterator[bytes]:
        """The two extremes (nothing kept, everything kept), then `count` states in between."""
        yield bytes(self._durable)
        everything = bytearray(self._durable)
        for change in self._pending:
            change.apply(everything, 0, change.length)
        yield bytes(everything)
        for _ in range(count):
            yield self.crash_image(choose)


def _sectors(change: _Change) -> Iterator[tuple[int, int]]:
    """The change cut where the device's sectors end; positions count from the change's own start."""
    start = 0
    while start < change.length:
        end = min(change.length, start + SECTOR_SIZE - (change.offset + start) % SECTOR_SIZE)
        yield start, end
        start = end
