"""The promise of a backup repository, whatever keeps its bytes.

Invariants of every implementation (`tests/conformance/test_repositories.py`):
- A backup exists from the moment `BackupWriter.commit` returns, whole and durable, and not a moment earlier. Whatever
  happens before leaves nothing that is listed, and the leftovers go when the repository is next opened.
- Every backup reads as a full one, whatever it was made from, and deleting one touches no other.
- A chunk is stored once, whichever volumes and backups have it, and zeroes are stored nowhere.
- A byte that is served is the byte that was written: everything read is checked up to the manifest. What does not match
  is DataCorrupt, never data.
- A deleted backup is gone from the list before its data goes.

Writing and bookkeeping are coroutines, because a repository may be a network away. Reading is made of plain calls that
may be made from several threads at once: it feeds block devices and worker threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from stillpoint.extents import Extent

from .backup_id import BackupId


@dataclass(frozen=True, slots=True)
class Origin:
    """What a backup is a picture of."""

    volume: str
    volume_uuid: str
    snapshot: str
    size: int  # bytes of the volume
    snapshot_ns: int  # the instant it shows
    # The instant in the volume's block history, from which the next incremental starts; "": unknown.
    incarnation: str = ""
    generation: int = 0
    base: BackupId | None = None  # the backup from which unchanged chunks are taken; None: a full one


@dataclass(frozen=True, slots=True)
class BackupRecord:
    """A committed backup. Times are nanoseconds since the Unix epoch."""

    id: BackupId
    origin: Origin
    finished_ns: int
    duration_ns: int
    data_bytes: int  # of the volume, in chunks that are not all zeroes
    stored_bytes: int  # that this backup added to the repository
    received_bytes: int  # of volume data, from the standby
    alarm: str = ""  # what the audit of the standby's change tracking found wrong; "": nothing
    verified_ns: int = 0  # when all of it was last read back and found right; 0: never
    protected: bool = False  # from deletion
    tested_ns: int = 0  # when it was last exported and put to the test; 0: never
    test_error: str = ""  # why that test failed; "": it passed


class Region(NamedTuple):
    """A part of a volume up to `end`, from the region before it, as of one instant. incarnation "": never read."""

    end: int
    incarnation: str
    generation: int


@dataclass(frozen=True, slots=True)
class Partial:
    """How far an interrupted backup got. It is no backup: its regions are of different instants.

    record: of what it was to become, with the bytes so far. regions: in order, to the end of the volume.
    """

    record: BackupRecord
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class CollectionReport:
    """deleted_bytes: of packs that are gone. pending_bytes: condemned, and kept until the writers that run have ended.

    unreferenced_bytes: of packs that hold nothing any backup needs, deleted or not.
    """

    deleted_packs: int = 0
    deleted_bytes: int = 0
    repacked_bytes: int = 0
    pending_packs: int = 0
    pending_bytes: int = 0
    unreferenced_bytes: int = 0


@dataclass(slots=True)
class CheckReport:
    """affected: what is wrong with each backup that cannot be restored whole.

    damaged_notes: names of notes that cannot be read; their backups can be restored, and count as protected.
    complete: a pass over all packs has ended with this check. pass_started_ns: when it began, maybe in an earlier
    check; 0: it has not ended.
    """

    checked_bytes: int = 0
    checked_packs: int = 0
    damaged_packs: list[str] = field(default_factory=list)
    lost_blobs: int = 0
    affected: dict[BackupId, str] = field(default_factory=dict)
    damaged_notes: list[str] = field(default_factory=list)
    complete: bool = False
    pass_started_ns: int = 0

    @property
    def ok(self) -> bool:
        return not self.damaged_packs and not self.affected and not self.damaged_notes


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes as stored. referenced_bytes: of everything a backup names; unique_bytes: what no other backup names."""

    referenced_bytes: int
    unique_bytes: int


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repository holds."""

    backups: Sequence[BackupRecord]  # oldest first
    damaged: Sequence[BackupId]  # committed once, but their manifests cannot be read


class BackupWriter(Protocol):
    """Takes one volume from its first byte to its last, once.

    Each call starts at `position`: gaps and overlaps are errors of the caller (assert). One call at a time. A writer
    that is neither committed nor aborted holds files and memory. After an error or a cancelled call only `abort` makes
    sense. Memory in use is bounded, whatever the volume's size: `write` waits when too much is under way.
    """

    @property
    def id(self) -> BackupId:
        """The name the backup will have."""
        ...

    @property
    def position(self) -> int:
        """The byte of the volume expected next: everything before it has been taken."""
        ...

    @property
    def stored_bytes(self) -> int:
        """Added to the repository so far."""
        ...

    @property
    def base(self) -> BackupReader | None:
        """What unchanged bytes are taken from. The caller leaves it open."""
        ...

    @property
    def regions(self) -> tuple[Region, ...]:
        """Of which instants the base is."""
        ...

    @property
    def missing(self) -> Sequence[Extent]:
        """Where the base's chunks are lost, in order. `unchanged` must not be said of these."""
        ...

    async def write(self, data: bytes | memoryview) -> None:
        """The next `len(data)` bytes. The writer may keep the buffer; it must not change any more.

        Raises DeviceError when the repository cannot store it.
        """
        ...

    async def hole(self, length: int) -> None:
        """The next `length` bytes are zeroes. Takes no time that depends on `length`."""
        ...

    async def unchanged(self, length: int) -> None:
        """The next `length` bytes are what the base has there. Takes no time that depends on `length`."""
        ...

    async def checkpoint(self) -> None:
        """Note durably what was given so far, so that another backup of the volume can begin there: see `Partial`.

        Raises DeviceError, and Refused when a collection has fenced this writer.
        """
        ...

    async def commit(self, *, received_bytes: int, alarm: str = "") -> BackupRecord:
        """Make the backup exist. Durable on return. The whole volume must have been given (assert).

        Raises DeviceError, DataCorrupt when the base turned out damaged, and Refused when a collection has fenced this
        writer; the backup then does not exist.
        """
        ...

    async def abort(self) -> None:
        """Throw away what was written. Does nothing after `commit` or a first `abort`. Raises no operating error."""
        ...


class BackupReader(Protocol):
    """The bytes of one backup, in chunks. Calls may come from several threads at once, except `close`."""

    @property
    def record(self) -> BackupRecord: ...

    @property
    def chunk_size(self) -> int:
        """Bytes of every chunk but the last, which ends with the volume. Chunk `n` starts at `n * chunk_size`."""
        ...

    def data_chunks(self, first: int = 0) -> Iterator[int]:
        """The indices, from `first` on and ascending, of the chunks that are not all zeroes. Raises DataCorrupt."""
        ...

    def read_chunk(self, index: int) -> bytes | None:
        """A whole chunk, checked; None: it is all zeroes. Raises DataCorrupt or DeviceError."""
        ...

    def read_chunks(self, indices: range) -> Sequence[bytes | None]:
        """`read_chunk` of each of them, quicker when they are many."""
        ...

    def check_frame(self) -> None:
        """Check that the index of this backup can be read and every chunk it names is there. Raises DataCorrupt."""
        ...

    def close(self) -> None:
        """Release it. A second call does nothing. Reads that run in other threads must have ended."""
        ...


class Repository(Protocol):
    """Where backups are kept. One process at a time writes to it."""

    @property
    def description(self) -> str:
        """What an operator calls it: its path or URL."""
        ...

    @property
    def uuid(self) -> str: ...

    async def begin(self, origin: Origin, *, resume: bool = False) -> BackupWriter:
        """Start a backup, on `origin.base` if it names one. Nothing is visible before it is committed.

        resume: begin with what an interrupted one of the volume left; `origin.base` then only tells what that was from.

        Raises DeviceError, and NotFound or DataCorrupt when the base cannot be used.
        """
        ...

    async def list(self, volume: str | None = None) -> Listing:
        """All backups, or those of one volume. A damaged manifest is told by its id and hides no other backup."""
        ...

    async def get(self, backup: BackupId) -> BackupRecord:
        """Raises NotFound, or DataCorrupt when its manifest is damaged."""
        ...

    def open(self, backup: BackupId) -> BackupReader:
        """A plain call that may wait for the disk. Raises NotFound, DataCorrupt or DeviceError."""
        ...

    async def partial(self, volume: str) -> Partial | None:
        """What an interrupted backup of the volume left; None also when that is damaged."""
        ...

    async def forget_partial(self, volume: str) -> None:
        """Its space is given back by a collection. Does nothing when there is none."""
        ...

    async def partial_volumes(self) -> Sequence[str]:
        """The volumes that have one."""
        ...

    async def delete(self, backup: BackupId) -> None:
        """Forget it, durably; a collection gives its space back. A damaged backup can be deleted.

        Raises NotFound, and Refused for a protected one.
        """
        ...

    async def record_verified(self, backup: BackupId, verified_ns: int) -> None:
        """Note that all of it was read back and found right. Durable on return. Raises NotFound."""
        ...

    async def record_tested(self, backup: BackupId, tested_ns: int, error: str) -> None:
        """Note a restore test; error "": it passed. Durable on return. Raises NotFound."""
        ...

    async def protect(self, backup: BackupId, protected: bool) -> None:
        """A protected backup is not deleted, by hand or by a policy. Durable on return. Raises NotFound."""
        ...

    async def usage(self, backup: BackupId) -> Usage:
        """What it occupies. Reads the indices of all backups. Raises NotFound, DataCorrupt, DeviceError."""
        ...

    async def check(
        self, executor: Executor, *, deep: bool, report: Callable[[int, int], None], budget_s: float | None = None
    ) -> CheckReport:
        """Prove everything that is stored, and name the backups that cannot be restored whole.

        deep: also decrypt, decompress and hash every chunk. report: bytes done, and in all. budget_s: stop after so
        long; the next such check goes on there. Raises DeviceError.
        """
        ...

    async def collect(self, *, fence: bool = False, dry_run: bool = False) -> CollectionReport:
        """Give back the space of what no backup needs. Backups may run meanwhile, and never wait for it.

        fence: end the backups that run instead of leaving to the next collection what they may rely on.
        Raises DataCorrupt, with nothing deleted, when the index of a backup cannot be read, and DeviceError.
        """
        ...

    async def probe(self) -> None:
        """Read its header from where it is kept. Raises what the storage raises."""
        ...

    @property
    def quarantined_count(self) -> int:
        """Blobs found damaged and not written anew since; backups that need them are not whole."""
        ...

    async def stored_bytes(self) -> int:
        """What the repository occupies."""
        ...

    async def close(self) -> None: ...
