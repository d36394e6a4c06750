"""Snapshots that an engine ended by itself, for want of room: what has to follow, at once and once for many.

The engine must not wait for it, as the mirror's writes wait for the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from .cow import Snapshot


class Endings:
    """At most one call of `follow` runs for a volume; what ends meanwhile is in the next one."""

    def __init__(self, follow: Callable[[str, Sequence[Snapshot]], Awaitable[None]]) -> None:
        """follow: (volume, its snapshots that have ended); raises nothing."""
        self._follow = follow
        self._ended: dict[str, list[Snapshot]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def add(self, snapshot: Snapshot) -> None:
        volume = snapshot.volume
        self._ended.setdefault(volume, []).append(snapshot)
        if volume not in self._tasks:
            self._tasks[volume] = asyncio.create_task(self._run(volume))

    async def _run(self, volume: str) -> None:
        try:
            while ended := self._ended.pop(volume, None):
                await self._follow(volume, ended)
        finally:
            del self._tasks[volume]

    async def settle(self) -> None:
        """On return everything has followed that was added before."""
        await asyncio.gather(*self._tasks.values())
