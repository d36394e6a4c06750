"""Health that comes from the data path: every volume is really read and flushed, again and again, with a deadline.

That the RPC port answers says nothing about a disk that hangs. So gRPC health says SERVING for `volume/NAME` while the
last probe of that volume ended well in time, and for "" (what a container's health check asks) while all of them did.

Invariants
- At most one probe of a volume runs, however long it hangs: threads that a dead disk holds do not pile up.
- A probe goes where a client's requests go, threads included: when those are all taken, that is what clients meet too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final, Protocol

from .errors import StillpointError

logger = logging.getLogger(__name__)

INTERVAL_S: Final = 5.0
# Longer than a silent standby may hold up a flush before writes go on without it.
DEADLINE_S: Final = 10.0

PROBE_SIZE: Final = 4096

Probe = Callable[[], Awaitable[None]]
"""Reads and flushes; raises StillpointError when the volume is not served as it should be."""


def probe_offset(size: int) -> int:
    """Where a disk of `size` bytes is read: somewhere else each time, for what is read again comes from memory."""
    return random.randrange(max(1, size // PROBE_SIZE)) * PROBE_SIZE


class Health(Protocol):
    """`stillpoint.runtime.GrpcServer`."""

    async def set_serving(self, service: str, serving: bool) -> None: ...


class Canary:
    def __init__(
        self,
        health: Health,
        probes: Callable[[], Mapping[str, Probe]],
        *,
        interval_s: float = INTERVAL_S,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """probes: of every volume there is now, by its name. Called each time."""
        self._health = health
        self._probes = probes
        self._interval_s = interval_s
        self._deadline_s = deadline_s
        self._running: dict[str, asyncio.Task[None]] = {}
        self.wrong: dict[str, str] = {}
        """Why, by volume, for those that are not served as they should be."""
        self._told: set[str] = set()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                await self.look()
                await asyncio.sleep(self._interval_s)
        finally:
            for task in self._running.values():
                task.cancel()

    async def look(self) -> None:
        """Probe every volume once, and tell the health service. Back within the deadline."""
        probes = self._probes()
        for name, probe in probes.items():
            if name not in self._running:
                self._running[name] = asyncio.ensure_future(probe())
        started = [self._running[name] for name in probes]
        if started:
            await asyncio.wait(started, timeout=self._deadline_s)
        for name in probes:
            self._judge(name)
        for name in self._told - probes.keys():
            self._judged(name, None)
            await self._health.set_serving(f"volume/{name}", False)
        self._told = set(probes)
        for name in probes:
            await self._health.set_serving(f"volume/{name}", name not in self.wrong)
        await self._health.set_serving("", not self.wrong)

    def _judge(self, name: str) -> None:
        task = self._running[name]
        if not task.done():
            self._judged(name, f"no answer within {self._deadline_s:g} s")
            return
        del self._running[name]
        try:
            task.result()
        except (StillpointError, asyncio.CancelledError) as error:
            self._judged(name, str(error) or "the probe was cancelled")
        except Exception as error:  # a probe that breaks tells nothing good about what it probes
            logger.exception("a probe failed unexpectedly", extra={"volume": name})
            self._judged(name, f"internal error: {error}")
        else:
            self._judged(name, None)

    def _judged(self, name: str, wrong: str | None) -> None:
        before = self.wrong.get(name)
        if wrong is None:
            self.wrong.pop(name, None)
            if before is not None:
                logger.info("the data path works again", extra={"volume": name})
            return
        self.wrong[name] = wrong
        if wrong != before:
            logger.error("the data path does not work: %s", wrong, extra={"volume": name})


@contextlib.asynccontextmanager
async def watching(health: Health, probes: Callable[[], Mapping[str, Probe]]) -> AsyncIterator[Canary]:
    """Probe while the body runs."""
    canary = Canary(health, probes)
    task = asyncio.create_task(canary.run(), name="canary")
    try:
        yield canary
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
