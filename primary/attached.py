"""One standby's session, attached to a volume: what waits for it, and what it is known to hold.

Invariants
- `pending` holds requests in the order of their frames; each is counted once in its `remaining`.
- The map's marks are taken away by one flush at a time (`DirtyMap.begin_flush`), whoever else waits for flushes.
- A standby is `required` from the frame that ends its resync on, and `in_sync` once that frame is durable there: so
  no write falls between the two, neither waited for nor covered by the resync.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from stillpoint.link.frames import Watermarks

from .dirty_map import DirtyMap
from .requests import Request, answer_if_done
from .sender import Sender


class AttachedStandby:
    """Made by `MirroredDevice.attach`. Everything runs on the loop."""

    __slots__ = (
        "_flushing_map",
        "_joined",
        "_moved",
        "awaited",
        "detached",
        "dirty",
        "in_sync",
        "joining",
        "pending",
        "queue_bytes",
        "required",
        "sender",
    )

    def __init__(
        self,
        sender: Sender,
        dirty: DirtyMap,
        *,
        detached: Callable[[Exception], None],
        moved: Callable[[AttachedStandby], None],
        joined: Callable[[], None],
    ) -> None:
        """`detached`: the session ended. `moved`: more is durable there. `joined`: it came in sync."""
        self.sender = sender
        self.dirty = dirty
        self.detached = detached
        self._moved = moved
        self._joined = joined
        self.pending: deque[tuple[int, Request]] = deque()
        self.awaited = False  # every write waits for it; otherwise only those beyond `queue_bytes` in flight
        self.queue_bytes = 0
        self.required = False
        self.in_sync = False
        self.joining = 0  # the sequence of the frame that ends its resync
        self._flushing_map = 0  # the sequence of the flush that the map waits for; 0: none
        dirty.connect()
        sender.acknowledged = self.acknowledged

    def hold_back(self, request: Request, sequence: int) -> None:
        """The request waits until this standby has the frame, if it has to."""
        if self.awaited or self.sender.in_flight_bytes >= self.queue_bytes:
            request.remaining += 1
            self.pending.append((sequence, request))

    @property
    def durable(self) -> int:
        """The last sequence that is durable there, with all before it."""
        return self.sender.watermarks.flushed

    def flush(self) -> int:
        """Send a flush of everything sent; returns its sequence."""
        sequence = self.sender.flush()
        self.sender.push()
        if not self._flushing_map:
            self.dirty.begin_flush()
            self._flushing_map = sequence
        return sequence

    def flush_in_background(self) -> None:
        """Let the standby make durable what it has, so that little is sent again when it restarts."""
        if not self._flushing_map and self.dirty.unflushed_bytes:
            self.flush()

    def acknowledged(self, watermarks: Watermarks) -> None:
        """The sender's watermarks moved."""
        pending = self.pending
        if pending and pending[0][0] <= watermarks.applied:
            answer_if_done(self._take_applied(watermarks.applied))
        flushed = watermarks.flushed
        if 0 < self._flushing_map <= flushed:
            self._flushing_map = 0
            self.dirty.flushed()
        if 0 < self.joining <= flushed:
            self.joining = 0
            self.in_sync = True
            self._joined()
        self._moved(self)

    def _take_applied(self, applied: int) -> Iterator[Request]:
        pending = self.pending
        while pending and pending[0][0] <= applied:
            yield pending.popleft()[1]

    def take_pending(self) -> Iterator[Request]:
        """Those that waited for it, once: nothing is acknowledged any more."""
        pending, self.pending = self.pending, deque()
        return (request for _, request in pending)
