"""What the resyncs of a node share: how many run at once, and how fast all of them together are."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from .throttle import Throttle


class ResyncLimits:
    """One for each node."""

    def __init__(self, *, rate: int, parallel_max: int) -> None:
        """rate: bytes a second of all resyncs together, at most; 0: no limit."""
        self.total = Throttle(rate)
        self._slots = asyncio.Semaphore(parallel_max)

    @contextlib.asynccontextmanager
    async def slot(self, waiting: Callable[[], None]) -> AsyncIterator[None]:
        """One of the resyncs that run. `waiting` is called if it has to wait for another one to end."""
        if self._slots.locked():
            waiting()
        async with self._slots:
            yield
