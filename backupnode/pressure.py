"""Looks at the standby while backups run, and slows them down when it has trouble keeping up with its volumes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from stillpoint.errors import StillpointError

from .throttle import Throttle

logger = logging.getLogger(__name__)

LOOK_S: Final = 1.0
# Half of what the standby holds at most before its writers have to wait.
BEHIND_BYTES: Final = 8 << 20


class Pressure:
    """staged_bytes: asks the data nodes.

    behind_bytes: of one volume's writes in the standby's memory, from which on it counts as behind; 0: never.
    """

    def __init__(
        self,
        staged_bytes: Callable[[], Awaitable[int]],
        throttle: Throttle,
        *,
        behind_bytes: int = BEHIND_BYTES,
        look_s: float = LOOK_S,
    ) -> None:
        self._staged_bytes = staged_bytes
        self._throttle = throttle
        self._behind_bytes = behind_bytes
        self._look_s = look_s
        self._running_count = 0
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """For as long as a backup runs."""
        self._running_count += 1
        if self._task is None and self._behind_bytes:
            self._task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            self._running_count -= 1
            if not self._running_count and self._task is not None:
                task, self._task = self._task, None
                task.cancel()
                await asyncio.wait([task])

    async def _watch(self) -> None:
        behind = False
        while True:
            await asyncio.sleep(self._look_s)
            try:
                staged_bytes = await self._staged_bytes()
            except StillpointError as error:
                logger.debug("cannot ask the standby how it does: %s", error)
                continue
            if behind != (staged_bytes >= self._behind_bytes):
                behind = not behind
                logger.info(
                    "the standby falls behind, so backups read slower" if behind else "the standby keeps up again",
                    extra={"staged_bytes": staged_bytes},
                )
            self._throttle.look(behind=behind)
