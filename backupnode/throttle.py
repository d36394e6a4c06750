"""How fast backups may read from the standby, so that its mirror does not fall behind because of them.

Pure but for the sleeping: the clock is passed in. While the standby is behind the rate is halved at each look, down to
RATE_MIN, so that a backup ends some day; when it keeps up again the rate grows by a quarter, until it is not what
limits and is lifted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

RATE_MIN: Final = 1 << 20  # bytes per second
_GROWTH: Final = 1.25
# Beyond so much of what is really read, a rate limits nothing.
_SLACK: Final = 4


class Pace:
    """Hands out bytes at a rate. rate: bytes per second; 0: no limit. One second's worth may come at once."""

    def __init__(self, rate: float = 0.0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._free_at = clock()

    def take(self, size: int) -> float:
        """Count `size` bytes that came. Returns the seconds to wait before asking for more."""
        if not self.rate:
            return 0.0
        now = self._clock()
        self._free_at = max(self._free_at, now - 1.0) + size / self.rate
        return max(0.0, self._free_at - now)


class Throttle:
    """Shared by all backups that run. `look` is told now and then whether the standby is behind."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pace = Pace(clock=clock)
        self._taken_bytes = 0
        self._looked_at = clock()

    @property
    def rate(self) -> float:
        """Bytes per second; 0: no limit."""
        return self._pace.rate

    async def taken(self, size: int) -> None:
        """Wait for as long as these bytes should have taken."""
        delay_s = self.count(size)
        if delay_s > 0.01:
            await asyncio.sleep(delay_s)

    def count(self, size: int) -> float:
        """The same without waiting. Returns the seconds."""
        self._taken_bytes += size
        return self._pace.take(size)

    def look(self, *, behind: bool) -> None:
        now = self._clock()
        elapsed_s = max(now - self._looked_at, 0.001)
        measured = self._taken_bytes / elapsed_s
        self._taken_bytes, self._looked_at = 0, now
        rate = self._pace.rate
        if behind:
            self._pace.rate = max(float(RATE_MIN), min(rate or measured, measured) / 2)
        elif rate:
            grown = rate * _GROWTH
            self._pace.rate = 0.0 if grown > _SLACK * max(measured, RATE_MIN) else grown
