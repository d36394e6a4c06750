"""Keeps the repository tidy in the background: deletes what the policy does not keep, then gives back the space.

It is asked for after each backup and each deletion; what is asked while it runs is done in one more run. It takes
nothing away from backups: see `repository/collection.py`. An error is logged, and the next run tries again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from stillpoint.errors import NotFound, Refused, StillpointError

from .repository import BackupId, Repository
from .retention import RetentionPolicy, kept

logger = logging.getLogger(__name__)


class Maintenance:
    """`run` until cancelled. `delete`: of one backup, with its export."""

    def __init__(
        self, repository: Repository, policy: RetentionPolicy, delete: Callable[[BackupId], Awaitable[None]]
    ) -> None:
        self._repository = repository
        self._policy = policy
        self._delete = delete
        self._wanted = asyncio.Event()

    def ask(self) -> None:
        self._wanted.set()

    async def run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                await self.prune()
                report = await self._repository.collect()
            except StillpointError as error:
                logger.warning("the repository could not be tidied: %s", error)
                continue
            logger.info(
                "collected what no backup needs",
                extra={"deleted_bytes": report.deleted_bytes, "pending_bytes": report.pending_bytes},
            )

    async def prune(self, *, dry_run: bool = False) -> list[BackupId]:
        """Delete what the policy does not keep, of every volume. Returns what that is.

        Refuses to delete anything of a volume while the repository holds a backup whose manifest is damaged, as that
        might be one the policy counts on.
        """
        if self._policy.keeps_everything:
            return []
        listing = await self._repository.list()
        if listing.damaged:
            raise Refused(f"nothing is pruned while the manifest of {listing.damaged[0]} is damaged")
        goes: list[BackupId] = []
        for volume in sorted({record.origin.volume for record in listing.backups}):
            records = [record for record in listing.backups if record.origin.volume == volume]
            stays = kept(records, self._policy)
            goes += [record.id for record in records if record.id not in stays]
        for backup in goes if not dry_run else []:
            try:
                await self._delete(backup)
            except NotFound:
                continue
            logger.info("pruned", extra={"backup": backup})
        return goes
