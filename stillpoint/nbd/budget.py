"""A bound on the memory that requests of all connections hold together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

_LOOK_EVERY_S: Final = 5.0


class Holder(Protocol):
    """A connection, which may hold memory while it waits for its client."""

    def end_if_stalled(self) -> None:
        """Others wait for memory: end if the client has kept you waiting too long."""
        ...


class Budget:
    """`limit` bytes, handed out in the order in which they were asked for.

    Whoever finds too little left waits in a queue and nobody overtakes it, so large requests are never starved by
    small ones. While somebody waits, holders whose client makes no progress are told to end.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.free = limit
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._holders: set[Holder] = set()
        self._timer: asyncio.TimerHandle | None = None

    def join(self, holder: Holder) -> None:
        self._holders.add(holder)

    def leave(self, holder: Holder) -> None:
        self._holders.discard(holder)

    def take(self, size: int, granted: Callable[[], None]) -> bool:
        """Take `size` bytes now, or return False and call `granted` once they have been taken for the caller.

        `size` is at most `limit`.
        """
        assert size <= self.limit
        if not self._waiting and size <= self.free:
            self.free -= size
            return True
        self._waiting.append((size, granted))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look)
        return False

    def give_back(self, size: int) -> None:
        self.free += size
        assert self.free <= self.limit
        while self._waiting and self._waiting[0][0] <= self.free:
            wanted, granted = self._waiting.popleft()
            self.free -= wanted
            granted()

    def forget(self, granted: Callable[[], None]) -> None:
        """Stop waiting."""
        self._waiting = deque(entry for entry in self._waiting if entry[1] != granted)
        self.give_back(0)

    def _look(self) -> None:
        self._timer = None
        for holder in list(self._holders):
            holder.end_if_stalled()
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look)
