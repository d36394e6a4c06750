"""Pulls a snapshot from the standby into the repository.

Invariants:
- What is written is gapless, of the snapshot's size, and matched its checksums. A stream that breaks is taken up where
  the repository stands, from the same snapshot (told by its uuid), or the backup fails.
- An incremental starts from an instant that both the manifest of its base and the standby name, in the same life of the
  volume. What is not known for certain to be unchanged is read. A sample of what was called unchanged is compared each
  time; one difference is an alarm, and everything is read.
- One backup of a volume at a time. How far it got is noted now and then (`repository/partials.py`), and the next one
  begins there; what is noted is no backup.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import Final

from stillpoint.config import check_name
from stillpoint.errors import DataCorrupt, PeerUnavailable, Refused, StillpointError
from stillpoint.extents import Extent

from .audit import AuditMiss, audit
from .data_nodes import DataNodes
from .pressure import BEHIND_BYTES, LOOK_S, Pressure
from .progress import Progress, Report
from .repository import BackupRecord, BackupWriter, Origin, Repository
from .source import RetryPolicy, Source, joined
from .standby_client import DamagedInTransit, SnapshotName, StandbyClient
from .starts import Start, changed_in, starts
from .taken_snapshots import TakenSnapshots
from .throttle import Throttle

logger = logging.getLogger(__name__)

# Backups at once; each may hold 20 MiB. More of them wait for their turn, before they take their snapshots.
_RUNNING_MAX: Final = 4
# Between two notes of how far a backup got; each makes what came so far durable.
CHECKPOINT_S: Final = 30.0


class Puller:
    """Runs backups of any number of volumes at once."""

    def __init__(
        self,
        standby: StandbyClient,
        repository: Repository,
        *,
        retry: RetryPolicy | None = None,
        rate_bytes_s: int = 0,
        behind_bytes: int = BEHIND_BYTES,
        look_s: float = LOOK_S,
        checkpoint_s: float = CHECKPOINT_S,
        clock: Callable[[], int] = time.time_ns,
        others: Sequence[StandbyClient] = (),
    ) -> None:
        """others: data nodes that may be the standby of a volume instead, see `DataNodes`.

        rate_bytes_s: of each backup, as received from the standby; 0: no limit.

        behind_bytes: see `Pressure`, which looks every look_s. checkpoint_s: what a crash costs at most, about.
        """
        self._nodes = DataNodes([standby, *others])
        self._repository = repository
        self._retry = retry or RetryPolicy()
        self._rate_bytes_s = rate_bytes_s
        self._checkpoint_s = checkpoint_s
        self._throttle = Throttle()
        self._pressure = Pressure(self._nodes.staged_bytes, self._throttle, behind_bytes=behind_bytes, look_s=look_s)
        self._running: set[str] = set()
        self._turns = asyncio.Semaphore(_RUNNING_MAX)
        self.succeeded_count = self.failed_count = 0  # backups since the node started
        self._snapshots = TakenSnapshots(repository.uuid, self._retry, clock)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def throttle_rate(self) -> float:
        """Bytes per second that all backups together may read now; 0: not limited."""
        return self._throttle.rate

    def is_running(self, volume: str) -> bool:
        return volume in self._running

    async def run(self, volume: str, *, snapshot: str = "", full: bool = False, report: Report) -> BackupRecord:
        """Back up the snapshot named, or one taken for this.

        full: read all of it, whatever the standby says has changed. What is stored already is not stored again.

        Raises Refused while a backup of the volume is running, PeerUnavailable when the standby cannot be reached or
        stays away, ProtocolError, DeviceError, and what the standby says. Nothing is left behind then, nor when
        cancelled: neither in the repository nor, while it can be reached, on the standby.
        """
        check_name(volume, "volume")
        if snapshot:
            check_name(snapshot, "snapshot")
        with self._only_one(volume):
            report(Progress("snapshot"))
            async with self._turns, self._pressure.watched():
                try:
                    record = await self._run(volume, snapshot, report, full=full)
                except StillpointError:
                    self.failed_count += 1
                    raise
                self.succeeded_count += 1
                return record

    async def _run(self, volume: str, snapshot: str, report: Report, *, full: bool) -> BackupRecord:
        node = await self._nodes.holding(volume, snapshot=snapshot)
        if snapshot:
            return await self._pull(node, SnapshotName(volume, snapshot), report, full=full)
        await self._snapshots.sweep(node)
        async with self._snapshots.taken(node, volume) as taken:
            record = await self._pull(node, taken.name, report, full=full)
            # The base of the next one: an instant, without the space of a snapshot.
            taken.committed = True
            return record

    async def sweep(self) -> None:
        """Delete the snapshots that backups of this repository left on data nodes.

        Raises PeerUnavailable for one that cannot be reached, after the others.
        """
        failure: StillpointError | None = None
        for node in self._nodes.all:
            try:
                await self._snapshots.sweep(node)
            except StillpointError as error:
                failure = error
        if failure is not None:
            raise failure

    @contextmanager
    def _only_one(self, volume: str) -> Iterator[None]:
        if volume in self._running:
            raise Refused(f"a backup of volume {volume} is running; wait for it or cancel it")
        self._running.add(volume)
        try:
            yield
        finally:
            self._running.discard(volume)

    async def _pull(self, node: StandbyClient, snapshot: SnapshotName, report: Report, *, full: bool) -> BackupRecord:
        source = Source(node, snapshot, self._retry, rate_bytes_s=self._rate_bytes_s, throttle=self._throttle)
        description = await source.describe()
        origin = Origin(
            volume=snapshot.volume,
            volume_uuid=description.volume_uuid,
            snapshot=snapshot.name,
            size=description.size,
            snapshot_ns=description.created_ns,
            incarnation=description.incarnation,
            generation=description.generation,
        )
        alarm = ""
        for start in await self._starts(origin) if not full else ():
            try:
                record = await self._pull_changes(source, origin, start, report)
                if record is not None:
                    return record
            except AuditMiss as miss:
                alarm = str(miss)
                logger.error("change tracking of the standby is wrong, so everything is compared: %s", miss)
                break
            except DataCorrupt as error:
                if isinstance(error, DamagedInTransit):
                    raise
                logger.warning("%s cannot be built on: %s", start, error)
        async with self._writer(origin) as writer:
            await source.copy(writer, report, checkpoint_s=self._checkpoint_s)
            return await self._commit(writer, source, report, alarm=alarm)

    async def _starts(self, origin: Origin) -> Sequence[Start]:
        """What could be built on, the best first: what an interrupted backup left, if that is newer than the last."""
        backups = (await self._repository.list(origin.volume)).backups
        partial = await self._repository.partial(origin.volume)
        return starts(origin, backups, partial)

    async def _pull_changes(self, source: Source, origin: Origin, start: Start, report: Report) -> BackupRecord | None:
        """None: nothing there is known to be unchanged. Raises AuditMiss, and DataCorrupt when it is damaged."""
        async with self._writer(replace(origin, base=start.base), resume=start.resume) as writer:
            changed = await changed_in(writer.regions, source, incarnation=origin.incarnation)
            wanted = joined([*changed, *writer.missing])
            if wanted == [Extent(0, origin.size)]:
                logger.info("nothing is known to be unchanged since %s", start)
                return None
            assert writer.base is not None, "bytes are unchanged since nothing"
            await audit(source, writer.base, wanted)
            await source.copy(writer, report, only=wanted, checkpoint_s=self._checkpoint_s)
            return await self._commit(writer, source, report)

    @asynccontextmanager
    async def _writer(self, origin: Origin, *, resume: bool = False) -> AsyncIterator[BackupWriter]:
        """Aborted unless it was committed; when the standby goes away, how far it got is noted."""
        writer = await self._repository.begin(origin, resume=resume)
        try:
            yield writer
        except (PeerUnavailable, DamagedInTransit):
            if writer.position:
                with suppress(StillpointError):
                    await writer.checkpoint()
            raise
        finally:
            await writer.abort()

    async def _commit(self, writer: BackupWriter, source: Source, report: Report, *, alarm: str = "") -> BackupRecord:
        report(Progress("commit", writer.position, writer.position, source.received_bytes))
        record = await writer.commit(received_bytes=source.received_bytes, alarm=alarm)
        logger.info("backup committed", extra={"backup": record.id, "base": record.origin.base or ""})
        return record
