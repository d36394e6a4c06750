"""Pulls a snapshot from the standby into the repository.

Invariants:
- A snapshot that this node took for a backup is deleted whatever becomes of the backup. One that a crash leaves behind
  carries this repository's mark in its name, and is deleted before the next backup.
- What is written is gapless, of the snapshot's size, and matched its checksums. A stream that breaks is taken up where
  the repository stands, from the same snapshot (told by its uuid), or the backup fails.
- One backup of a volume at a time.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Final

from stillpoint.config import check_name
from stillpoint.errors import InvalidRequest, NotFound, PeerUnavailable, ProtocolError, Refused, StillpointError

from .progress import Progress, Report
from .repository import BackupRecord, BackupWriter, Origin, Repository
from .standby_client import DamagedInTransit, SnapshotDescription, SnapshotName, StandbyClient

logger = logging.getLogger(__name__)

# Backups at once; each may hold 20 MiB. More of them wait for their turn, before they take their snapshots.
_RUNNING_MAX: Final = 4


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a broken stream is taken up again.

    attempts: in a row without a byte gained, after delays that double from `first_delay_s` to `delay_s_max`.
    interruptions_max: of one backup in all.
    """

    attempts: int = 8
    first_delay_s: float = 0.2
    delay_s_max: float = 5.0
    interruptions_max: int = 100

    def delay_s(self, attempt: int) -> float:
        return min(self.delay_s_max, self.first_delay_s * 2.0**attempt)


class Puller:
    """Runs backups of any number of volumes at once."""

    def __init__(
        self,
        standby: StandbyClient,
        repository: Repository,
        *,
        retry: RetryPolicy | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._standby = standby
        self._repository = repository
        self._retry = retry or RetryPolicy()
        self._clock = clock
        self._running: set[str] = set()
        self._turns = asyncio.Semaphore(_RUNNING_MAX)
        self._taken: set[SnapshotName] = set()
        self._releases: set[asyncio.Task[None]] = set()
        # Another backup node of the same standby has another repository, and so another mark.
        self._mark = f"backup-{repository.uuid[:8]}-"

    @property
    def running(self) -> int:
        return len(self._running)

    async def run(self, volume: str, *, snapshot: str = "", report: Report) -> BackupRecord:
        """Back up the snapshot named, or one taken for this.

        Raises Refused while a backup of the volume is running, PeerUnavailable when the standby cannot be reached or
        stays away, ProtocolError, DeviceError, and what the standby says. Nothing is left behind then, nor when
        cancelled: neither in the repository nor, while it can be reached, on the standby.
        """
        check_name(volume, "volume")
        if snapshot:
            check_name(snapshot, "snapshot")
        with self._only_one(volume):
            report(Progress("snapshot"))
            async with self._turns:
                return await self._run(volume, snapshot, report)

    async def _run(self, volume: str, snapshot: str, report: Report) -> BackupRecord:
        if snapshot:
            return await self._pull(SnapshotName(volume, snapshot), report)
        await self.sweep()
        name = SnapshotName(volume, f"{self._mark}{_stamp(self._clock())}")
        self._taken.add(name)
        try:
            if not await self._standby.create_snapshot(name):
                # Still the volume as of some instant, only an older one than the operator may think.
                logger.warning("volume %s is backed up as the standby last had it: it is not in sync", volume)
            return await self._pull(name, report)
        finally:
            await self._release(name)

    async def sweep(self) -> None:
        """Delete the snapshots that backups of this repository left on the standby. Raises PeerUnavailable."""
        for snapshot in await self._standby.list_snapshots():
            if snapshot.name.startswith(self._mark) and snapshot not in self._taken:
                logger.info("deleting a snapshot left by an interrupted backup", extra={"snapshot": str(snapshot)})
                try:
                    await self._standby.delete_snapshot(snapshot)
                except NotFound:
                    continue
                except Refused as error:
                    logger.warning("the snapshot %s cannot be deleted now: %s", snapshot, error)

    async def _release(self, snapshot: SnapshotName) -> None:
        # A task of its own: whoever is cancelled a second time does not take it along.
        task = asyncio.create_task(self._delete_taken(snapshot))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)
        await asyncio.shield(task)

    async def _delete_taken(self, snapshot: SnapshotName) -> None:
        try:
            await self._standby.delete_snapshot(snapshot)
        except NotFound:
            pass  # it was never made
        except StillpointError as error:
            logger.warning("the snapshot %s stays on the standby until the next backup: %s", snapshot, error)
        finally:
            self._taken.discard(snapshot)

    @contextmanager
    def _only_one(self, volume: str) -> Iterator[None]:
        if volume in self._running:
            raise Refused(f"a backup of volume {volume} is running; wait for it or cancel it")
        self._running.add(volume)
        try:
            yield
        finally:
            self._running.discard(volume)

    async def _pull(self, snapshot: SnapshotName, report: Report) -> BackupRecord:
        source = _Source(self._standby, snapshot, self._retry)
        description = await source.describe()
        origin = Origin(
            volume=snapshot.volume,
            volume_uuid=description.volume_uuid,
            snapshot=snapshot.name,
            size=description.size,
            snapshot_ns=description.created_ns,
        )
        writer = await self._repository.begin(origin)
        try:
            received_bytes = await source.copy(writer, report)
            report(Progress("commit", description.size, description.size, received_bytes))
            record = await writer.commit(received_bytes=received_bytes)
        except BaseException:
            await writer.abort()
            raise
        logger.info("backup committed", extra={"backup": record.id, "snapshot": str(snapshot)})
        return record


class _Source:
    """One snapshot, read from its first byte to its last over as many streams as it takes."""

    def __init__(self, standby: StandbyClient, snapshot: SnapshotName, retry: RetryPolicy) -> None:
        self._standby = standby
        self._snapshot = snapshot
        self._retry = retry
        self._description: SnapshotDescription | None = None
        self._received_bytes = 0

    async def describe(self) -> SnapshotDescription:
        """Raises NotFound, or PeerUnavailable when the export process stays away."""
        attempt = 0
        while True:
            try:
                description = await self._standby.describe_snapshot(self._snapshot)
                break
            except PeerUnavailable:
                attempt += 1
                if attempt >= self._retry.attempts:
                    raise
                await asyncio.sleep(self._retry.delay_s(attempt - 1))
        if description.size <= 0:
            raise InvalidRequest(f"snapshot {self._snapshot} has no bytes")
        self._description = description
        return description

    async def copy(self, writer: BackupWriter, report: Report) -> int:
        """Give all of it to the writer. Returns the bytes of data received."""
        attempt = interruptions = 0
        while True:
            start = writer.position
            try:
                if interruptions:
                    await self._check_it_is_the_same()
                await self._copy_stream(writer, report)
                return self._received_bytes
            except (PeerUnavailable, DamagedInTransit) as error:
                attempt = 1 if writer.position > start else attempt + 1
                interruptions += 1
                if attempt >= self._retry.attempts or interruptions >= self._retry.interruptions_max:
                    raise type(error)(
                        f"backup of {self._snapshot} given up at byte {writer.position} after {interruptions}"
                        f" interruptions: {error}"
                    ) from None
                logger.warning(
                    "the stream broke; taking it up again",
                    extra={"snapshot": str(self._snapshot), "offset": writer.position, "reason": str(error)},
                )
            await asyncio.sleep(self._retry.delay_s(attempt - 1))

    async def _check_it_is_the_same(self) -> None:
        description = await self._standby.describe_snapshot(self._snapshot)
        if description != self._description:
            raise Refused(f"snapshot {self._snapshot} was replaced by another while it was backed up; start again")

    async def _copy_stream(self, writer: BackupWriter, report: Report) -> None:
        assert self._description is not None
        size = self._description.size
        async with aclosing(self._standby.read_snapshot(self._snapshot, offset=writer.position)) as messages:
            async for chunk in messages:
                if chunk.offset != writer.position or not 0 < chunk.length <= size - chunk.offset:
                    raise ProtocolError(
                        f"the standby sent bytes {chunk.offset}+{chunk.length} of {self._snapshot}"
                        f" ({size} bytes) where {writer.position} is due"
                    )
                if chunk.hole_length:
                    await writer.hole(chunk.hole_length)
                else:
                    await writer.write(chunk.data)
                    self._received_bytes += chunk.length
                report(Progress("read", writer.position, size, self._received_bytes))
        if writer.position < size:
            raise PeerUnavailable(f"the standby ended the stream at byte {writer.position} of {size}")


def _stamp(now_ns: int) -> str:
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime(now_ns // 1_000_000_000)) + "-" + secrets.token_hex(2)
