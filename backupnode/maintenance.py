"""Keeps the repository tidy: deletes what the policy does not keep, then gives back the space.

`run` does it in the background. It is asked for after each backup and each deletion; what is asked while it runs is
done in one more run. It takes nothing away from backups: see `repository/collection.py`. An error is logged, and the
next run tries again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from stillpoint.errors import NotFound, Refused, StillpointError

from .repository import BackupId, BackupRecord, Repository
from .retention import RetentionPolicy, kept

logger = logging.getLogger(__name__)

# How long what an interrupted backup left keeps its space.
_PARTIAL_AGE_NS: Final = 30 * 86400 * 1_000_000_000


class Verdict(NamedTuple):
    """kept_by: the rule of the policy that keeps it; "": it goes."""

    record: BackupRecord
    kept_by: str


class Maintenance:
    """`forget`: deletes one backup, with its export."""

    def __init__(
        self,
        repository: Repository,
        policy: RetentionPolicy,
        forget: Callable[[BackupId], Awaitable[None]],
        *,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._repository = repository
        self._policy = policy
        self._forget = forget
        self._clock = clock
        self._wanted = asyncio.Event()
        # Deletions come one at a time, so that two of them never go below the minimum together.
        self._turn = asyncio.Lock()

    def ask(self) -> None:
        self._wanted.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                if not self._policy.keeps_everything:
                    await self.prune()
                await self._forget_old_partials()
                report = await self._repository.collect()
            except StillpointError as error:
                logger.warning("the repository could not be tidied: %s", error)
                continue
            logger.info(
                "collected what no backup needs",
                extra={"deleted_bytes": report.deleted_bytes, "pending_bytes": report.pending_bytes},
            )

    async def _forget_old_partials(self) -> None:
        """Of volumes that nobody backs up any more. One that is forgotten too early costs a longer backup."""
        for volume in await self._repository.partial_volumes():
            partial = await self._repository.partial(volume)
            if partial is None or self._clock() - partial.record.finished_ns > _PARTIAL_AGE_NS:
                logger.info("forgetting what an interrupted backup left", extra={"volume": volume})
                await self._repository.forget_partial(volume)

    async def delete(self, backup: BackupId) -> None:
        """Raises NotFound, and Refused for a protected one or one of the last that its volume must have."""
        async with self._turn:
            records = (await self._repository.list()).backups
            volume = next((record.origin.volume for record in records if record.id == backup), None)
            others = sum(record.origin.volume == volume and record.id != backup for record in records)
            # One whose manifest is damaged is no use to its volume, so it may always go.
            if volume is not None and others < self._policy.minimum:
                raise Refused(
                    f"backup {backup} is one of the last {self._policy.minimum} of volume {volume}, which"
                    f" retention.minimum in the backup node's configuration keeps"
                )
            await self._forget(backup)
        self.ask()

    async def prune(
        self, *, policy: RetentionPolicy | None = None, volume: str | None = None, dry_run: bool = False
    ) -> list[Verdict]:
        """Delete what the policy does not keep. Returns what that says of each backup, oldest first.

        policy: instead of the configured one, whose minimum holds nevertheless. volume: only of this one.
        Refuses to delete anything while the repository holds a backup whose manifest is damaged, as that might be one
        that the policy counts on.
        """
        policy = policy or self._policy
        if policy.keeps_everything:
            raise Refused("there is no policy to prune by: name one, or set retention in the node's configuration")
        async with self._turn:
            listing = await self._repository.list(volume)
            if listing.damaged:
                raise Refused(
                    f"nothing is pruned while the manifest of {listing.damaged[0]} is damaged; delete it first"
                )
            stays: dict[BackupId, str] = {}
            for each in {record.origin.volume for record in listing.backups}:
                records = [record for record in listing.backups if record.origin.volume == each]
                stays |= kept(records, policy.with_minimum(self._policy.minimum))
            verdicts = [Verdict(record, stays.get(record.id, "")) for record in listing.backups]
            if not dry_run:
                for verdict in verdicts:
                    if not verdict.kept_by:
                        await self._prune_one(verdict.record.id)
        return verdicts

    async def _prune_one(self, backup: BackupId) -> None:
        try:
            await self._forget(backup)
        except NotFound:
            return
        except Refused as error:
            # It was protected since the policy was asked.
            logger.warning("backup %s was not pruned: %s", backup, error)
            return
        logger.info("pruned", extra={"backup": backup})
