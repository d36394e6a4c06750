"""A limit on bytes a second, for work that must leave room to clients: a pure rule, and the waiting for it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

# So much of a second may be used at once after a rest.
_BURST_S = 0.1


class Throttle:
    """May be shared: those that wait are served in the order in which they came. `rate` may change at any time."""

    def __init__(self, rate: int = 0, *, clock: Callable[[], float] = time.monotonic) -> None:
        """rate: bytes a second, at most; 0: no limit."""
        self._rate = rate
        self._clock = clock
        self._booked_until = clock()
        self._changed = asyncio.Event()  # set once, when the rate changes

    @property
    def rate(self) -> int:
        return self._rate

    @rate.setter
    def rate(self, rate: int) -> None:
        if rate != self._rate:
            self._rate, self._booked_until = rate, self._clock()
            self._changed.set()
            self._changed = asyncio.Event()

    def book(self, size: int) -> float:
        """`size` bytes are going to be used; returns the time, of the clock, from which on they may be."""
        if not self._rate:
            return self._clock()
        self._booked_until = max(self._booked_until, self._clock() - _BURST_S) + size / self._rate
        return self._booked_until

    async def take(self, size: int) -> None:
        """Wait until `size` bytes may be used. A rate that changes meanwhile lets go of whoever waits."""
        wait_s = self.book(size) - self._clock()
        if wait_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
