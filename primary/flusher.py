"""Flushes of one volume, here and on its standbys: one at a time, and those that come meanwhile share the next one.

Invariants
- A request is answered by a flush that began after it came.
- A flush waits for the local disk, and for every standby that was required when it began and is attached still.
- A flush that a standby's loss cut short while the gate was closed is begun again when it opens: nothing that only this
  disk has is called durable.
"""

from __future__ import annotations

import errno as errno_module
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from stillpoint.devices import BlockDevice
from stillpoint.nbd.constants import Errno
from stillpoint.nbd.errors import nbd_errno
from stillpoint.nbd.export import run_in_thread

from .attached import AttachedStandby
from .gate import Gate
from .requests import Request, answer

logger = logging.getLogger(__name__)


class _Flush:
    """One that runs, and the requests that it answers."""

    __slots__ = ("error", "here", "there", "waiting")

    def __init__(self, waiting: list[Request], there: dict[AttachedStandby, int]) -> None:
        """there: the standbys that it waits for, and the sequence of its frame to each."""
        self.waiting = waiting
        self.here = False
        self.there = there
        self.error = 0


class Flusher:
    """Everything runs on the loop, except the device's flush."""

    def __init__(
        self, name: str, device: BlockDevice, executor: Executor, gate: Gate, failed: Callable[[str], None]
    ) -> None:
        """name: of the volume. `failed`: the local disk could not be flushed."""
        self.waiting: list[Request] = []
        self.standbys: Sequence[AttachedStandby] = ()  # those that the next flush goes to
        self._gate = gate
        self._name = name
        self._device = device
        self._executor = executor
        self._failed = failed
        self._flush: _Flush | None = None

    def begin(self) -> None:
        """If there is something to do and nothing runs."""
        if not self.waiting or self._flush is not None or self._gate.closed:
            return
        waiting, self.waiting = self.waiting, []
        if self._gate.refusing:
            for request in waiting:
                request.errno = request.errno or Errno.EIO
            answer(waiting)
            return
        sent = {standby: standby.flush() for standby in self.standbys}
        there = {standby: sequence for standby, sequence in sent.items() if standby.awaited}
        self._flush = flush = _Flush(waiting, there)
        run_in_thread(self._executor, self._device.flush, lambda error: self._flushed_here(flush, error))

    def _flushed_here(self, flush: _Flush, error: Exception | None) -> None:
        flush.here = True
        if error is not None:
            flush.error = nbd_errno(error) or errno_module.EIO
            logger.error("flush failed: %s", error, extra={"volume": self._name})
            self._failed(str(error))  # before anything is answered
        self._finish()

    def moved(self, standby: AttachedStandby) -> None:
        """More is durable there."""
        flush = self._flush
        if flush is not None and standby in flush.there and flush.there[standby] <= standby.durable:
            del flush.there[standby]
            self._finish()

    def lost(self, standby: AttachedStandby) -> None:
        """It is not attached any more, and the gate knows."""
        flush = self._flush
        if flush is None or flush.there.pop(standby, None) is None:
            return
        if self._gate.closed:
            self.waiting[:0] = flush.waiting
            flush.waiting = []
        elif self._gate.refusing:
            flush.error = flush.error or Errno.EIO
        self._finish()

    def _finish(self) -> None:
        flush = self._flush
        if flush is None or not flush.here or flush.there:
            return
        self._flush = None
        if flush.error:
            for request in flush.waiting:
                request.errno = request.errno or flush.error
        answer(flush.waiting)
        self.begin()
