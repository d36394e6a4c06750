"""The catalog: what is known of a volume's snapshots, as an append-only log of small records in one file.

Record: magic, version, type, length, sequence, CRC, then a JSON object (README.md, "The catalog"). The file is read
once, when the engine opens; what it says is a pure fold over its records (`CatalogState.apply`).

Invariants, and where a crash may strike:
- `append` is durable when it returns; a record torn by a crash ends the log and was answered to nobody (R3, R6).
- A failed append leaves the file's tail unknown, so nothing is ever appended after it.
- A log that has grown long is replaced: the state is written aside as a short log, fsync, rename, fsync of the folder.
  A crash leaves the long or the short one, and both say the same.
- Sequence numbers run without a gap from the first record on.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import json
import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from stillpoint.checksum import crc32
from stillpoint.devices import linux
from stillpoint.document import fsync_folder
from stillpoint.errors import DataCorrupt, DeviceError

from .values import FIRST_GENERATION

MAGIC: Final = 0x54434153  # "SACT" in the file
VERSION: Final = 2  # 1: the first; 2: LIMITS. A log may hold records of both
VERSIONS_READ: Final = (1, 2)
HEADER: Final = struct.Struct("<IHHIIQ")  # magic, version, type, length of the whole record, crc, sequence
_CRC_OFFSET: Final = 12
_RECORD_MAX: Final = 1 << 16
_MARGIN: Final = 64 << 10  # bytes reserved behind the log
_COMPACT_AT: Final = 1 << 20  # bytes; well above what SNAPSHOTS_MAX snapshots need, so a short log stays short

Fields: TypeAlias = dict[str, Any]


class Event(enum.IntEnum):
    VOLUME = 1  # first record: name, incarnation, block_size, size
    SNAPSHOT_CREATED = 2  # generation, name, uuid, store, durable, created_ns, size
    SNAPSHOT_DELETED = 3  # generation
    SNAPSHOT_INVALID = 4  # generation, reason
    SNAPSHOT_PROTECTED = 5  # generation, protected
    BOOKMARK_ADDED = 6  # name, generation, snapshot, created_ns
    BOOKMARK_DELETED = 7  # name
    RESIZED = 8  # size, generation: blocks beyond the old size count as written in that generation
    OPENED = 9  # boot: the volume is in use; the births are in the page cache of that boot
    CLOSED = 10  # everything was flushed, the birth map included
    GENERATION = 11  # current: never fall below it, whatever snapshots are listed
    LIMITS = 12  # those limits that the volume has of its own, all of them (limits.py)


@dataclass(slots=True)
class CatalogState:
    """The fold of the records. Snapshots and bookmarks are their records' fields, by generation and by name."""

    volume: Fields = field(default_factory=dict)
    size: int = 0
    current: int = FIRST_GENERATION
    snapshots: dict[int, Fields] = field(default_factory=dict)
    bookmarks: dict[str, Fields] = field(default_factory=dict)
    boot: str | None = None  # of the run that has the volume open, None after a clean close
    stores: dict[str, int] = field(default_factory=dict)  # the newest generation that ever used each store
    limits: dict[str, int] = field(default_factory=dict)

    def apply(self, event: Event, fields: Fields) -> None:
        match event:
            case Event.VOLUME:
                self.volume = fields
                self.size = fields["size"]
            case Event.SNAPSHOT_CREATED:
                self.snapshots[fields["generation"]] = dict(fields)
                self.current = max(self.current, fields["generation"] + 1)
                self.stores[fields["store"]] = max(self.stores.get(fields["store"], 0), fields["generation"])
            case Event.SNAPSHOT_DELETED:
                del self.snapshots[fields["generation"]]
            case Event.SNAPSHOT_INVALID:
                self.snapshots[fields["generation"]]["invalid"] = fields["reason"]
            case Event.SNAPSHOT_PROTECTED:
                self.snapshots[fields["generation"]]["protected"] = fields["protected"]
            case Event.BOOKMARK_ADDED:
                self.bookmarks[fields["name"]] = fields
            case Event.BOOKMARK_DELETED:
                del self.bookmarks[fields["name"]]
            case Event.RESIZED:
                self.size = fields["size"]
            case Event.OPENED:
                self.boot = fields["boot"]
            case Event.CLOSED:
                self.boot = None
            case Event.LIMITS:
                self.limits = fields
            case Event.GENERATION:
                self.current = max(self.current, fields["current"])
                for store, generation in fields["stores"].items():
                    self.stores[store] = max(self.stores.get(store, 0), generation)

    def records(self) -> Iterator[tuple[Event, Fields]]:
        """The shortest log that says the same."""
        yield Event.VOLUME, {**self.volume, "size": self.size}
        yield Event.GENERATION, {"current": self.current, "stores": self.stores}
        if self.limits:
            yield Event.LIMITS, self.limits
        for generation, fields in self.snapshots.items():
            plain = {key: value for key, value in fields.items() if key not in ("invalid", "protected")}
            yield Event.SNAPSHOT_CREATED, plain
            if "invalid" in fields:
                yield Event.SNAPSHOT_INVALID, {"generation": generation, "reason": fields["invalid"]}
            if fields.get("protected"):
                yield Event.SNAPSHOT_PROTECTED, {"generation": generation, "protected": True}
        for fields in self.bookmarks.values():
            yield Event.BOOKMARK_ADDED, fields
        if self.boot is not None:
            yield Event.OPENED, {"boot": self.boot}


class Catalog:
    """The file. `append` waits for the disk and may be called from any thread."""

    def __init__(self, path: Path, descriptor: int, state: CatalogState, *, end: int, sequence: int) -> None:
        self.path = path
        self.state = state
        self._descriptor = descriptor
        self._end = end
        self._sequence = sequence
        self._failed = ""
        self._reserved = 0
        self._lock = threading.Lock()
        if descriptor >= 0:
            self._reserve()

    @classmethod
    def create(cls, path: Path, volume: Fields) -> Catalog:
        """A new catalog whose first record is `volume`. It and its name are durable on return. Raises DeviceError."""
        state = CatalogState()
        state.apply(Event.VOLUME, volume)
        catalog = cls(path, -1, state, end=0, sequence=0)
        with catalog._lock:
            catalog._replace()
        return catalog

    @classmethod
    def open(cls, path: Path) -> Catalog:
        """Read the log and cut a torn tail. Raises OSError; DataCorrupt when it does not even name its volume."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
            state = CatalogState()
            try:
                records = list(read_records(data))
                for _, event, fields in records:
                    state.apply(event, fields)
            except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
                # Its checksum fits, so no crash tore it: nothing behind it may be cut off as if one had.
                raise DataCorrupt(f"{path}: holds a record that makes no sense ({error!r})") from None
            if not state.volume:
                raise DataCorrupt(f"{path}: is no snapshot catalog of version {VERSION}, or is damaged")
            end = records[-1][0]
            if end < len(data):
                os.ftruncate(descriptor, end)
            os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, state, end=end, sequence=len(records))

    def append(self, event: Event, **fields: Any) -> None:
        """Durable on return, and part of `state`. Raises DeviceError; nothing can be appended after that."""
        with self._lock:
            if self._failed:
                raise DeviceError(f"{self.path}: an earlier write failed: {self._failed}", errno.EIO)
            data = encode_record(event, fields, sequence=self._sequence)
            try:
                self._write(data)
                os.fdatasync(self._descriptor)
            except OSError as error:
                raise self._fail(error) from error
            self.state.apply(event, fields)
            self._end += len(data)
            self._sequence += 1
            if self._end > _COMPACT_AT:
                self._replace()
            else:
                self._reserve()

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _reserve(self) -> None:
        """Keep room for the next records, so that snapshots can be given up when the disk is full."""
        if self._end + _MARGIN // 2 > self._reserved:
            with contextlib.suppress(OSError):  # not every file system can; an append may then meet the full disk
                linux.fallocate(self._descriptor, linux.KEEP_SIZE, self._end, _MARGIN)
                self._reserved = self._end + _MARGIN

    def _write(self, data: bytes) -> None:
        if os.pwrite(self._descriptor, data, self._end) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _replace(self) -> None:
        """Write the state as a short log beside the file and put it in its place."""
        aside = self.path.with_suffix(".tmp")
        records = [encode_record(event, fields, sequence=i) for i, (event, fields) in enumerate(self.state.records())]
        data = b"".join(records)
        try:
            descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                if os.pwrite(descriptor, data, 0) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
                aside.rename(self.path)
                fsync_folder(self.path.parent)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            raise self._fail(error) from error
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = descriptor
        self._end = len(data)
        self._sequence = len(records)
        self._reserved = 0
        self._reserve()

    def _fail(self, error: OSError) -> DeviceError:
        self._failed = error.strerror or str(error)
        return DeviceError(
            f"{self.path}: writing the snapshot catalog failed: {self._failed}", error.errno or errno.EIO
        )


def encode_record(event: Event, fields: Fields, *, sequence: int) -> bytes:
    body = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    assert len(body) <= _RECORD_MAX - HEADER.size or event is Event.GENERATION
    length = HEADER.size + len(body)
    crc = crc32(body, crc32(HEADER.pack(MAGIC, VERSION, event, length, 0, sequence)))
    return HEADER.pack(MAGIC, VERSION, event, length, crc, sequence) + body


def read_records(data: bytes) -> Iterator[tuple[int, Event, Fields]]:
    """(offset of its end, event, fields) until the log ends: at the end of `data`, or before a damaged record."""
    position = sequence = 0
    while position + HEADER.size <= len(data):
        magic, version, kind, length, crc, number = HEADER.unpack_from(data, position)
        if (magic, number) != (MAGIC, sequence) or version not in VERSIONS_READ:
            return
        if not HEADER.size <= length <= len(data) - position:
            return
        body = data[position + HEADER.size : position + length]
        if crc != crc32(body, crc32(HEADER.pack(magic, version, kind, length, 0, number))):
            return
        position += length
        sequence += 1
        yield position, Event(kind), json.loads(body)
