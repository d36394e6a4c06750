"""The snapshots that backups take on data nodes, and give back.

Invariants:
- A snapshot that was taken is deleted whatever becomes of the backup; after a commit its instant stays as a bookmark.
- Its name carries the repository's mark, by which what a crash or an absent node leaves behind is known and deleted.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from stillpoint.errors import NotFound, PeerUnavailable, Refused, StillpointError

from .source import RetryPolicy
from .standby_client import SnapshotName, StandbyClient

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Taken:
    """committed: set by whoever backed it up; its instant is then remembered as a bookmark."""

    name: SnapshotName
    committed: bool = False


class TakenSnapshots:
    def __init__(self, repository_uuid: str, retry: RetryPolicy, clock: Callable[[], int]) -> None:
        # Another backup node of the same standby has another repository, and so another mark.
        self._mark = f"backup-{repository_uuid[:8]}-"
        self._retry = retry
        self._clock = clock
        self._taken: set[SnapshotName] = set()
        self._releases: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def taken(self, node: StandbyClient, volume: str) -> AsyncIterator[Taken]:
        """A fresh snapshot for as long as it is needed. Raises what the node says."""
        taken = Taken(SnapshotName(volume, f"{self._mark}{_stamp(self._clock())}"))
        self._taken.add(taken.name)
        try:
            if not await node.create_snapshot(taken.name):
                # Still the volume as of some instant, only an older one than the operator may think.
                logger.warning("volume %s is backed up as the standby last had it: it is not in sync", volume)
            yield taken
        finally:
            # A task of its own: whoever is cancelled a second time does not take it along.
            task = asyncio.create_task(self._release(node, taken))
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)
            await asyncio.shield(task)

    async def sweep(self, node: StandbyClient) -> None:
        """Delete what backups of this repository left on the node. Raises PeerUnavailable."""
        for snapshot in await node.list_snapshots():
            if snapshot.name.startswith(self._mark) and snapshot not in self._taken:
                logger.info("deleting a snapshot left by an interrupted backup", extra={"snapshot": str(snapshot)})
                try:
                    await node.delete_snapshot(snapshot)
                except NotFound:
                    continue
                except Refused as error:
                    logger.warning("the snapshot %s cannot be deleted now: %s", snapshot, error)

    async def _release(self, node: StandbyClient, taken: Taken) -> None:
        name = taken.name
        bookmark = name.name if taken.committed else ""
        try:
            await self._insist(lambda: node.delete_snapshot(name, bookmark=bookmark))
            if bookmark:
                await self._insist(lambda: self._delete_older_bookmarks(node, name.volume, bookmark))
        except StillpointError as error:
            logger.warning("the snapshot or bookmark %s stays on the standby for now: %s", name, error)
        finally:
            self._taken.discard(name)

    async def _delete_older_bookmarks(self, node: StandbyClient, volume: str, kept: str) -> None:
        for old in await node.list_bookmarks(volume):
            if old.startswith(self._mark) and old != kept:
                with suppress(NotFound):
                    await node.delete_bookmark(volume, old)

    async def _insist(self, call: Callable[[], Awaitable[None]]) -> None:
        """Until it is done: what a connection that broke at the wrong moment leaves behind costs the standby space.

        NotFound means that it was never made, or that the answer to an earlier attempt was lost.
        """
        attempt = 0
        while True:
            try:
                with suppress(NotFound):
                    await call()
                return
            except PeerUnavailable:
                attempt += 1
                if attempt >= self._retry.attempts:
                    raise
            await asyncio.sleep(self._retry.delay_s(attempt - 1))


def _stamp(now_ns: int) -> str:
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime(now_ns // 1_000_000_000)) + "-" + secrets.token_hex(2)
