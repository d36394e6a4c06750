"""A mirror as the volume itself: the block device that a promoted node serves to its clients.

Every write goes through the snapshot engine, so the snapshots taken while the node was a standby stay what they are.

Invariants
- A read shows every write that returned before it began, staged ones included. The stages are looked up before the
  mirror is read: what is applied meanwhile is then on the mirror, and what it covers is shown again from the stage.
- A staged write waits for a commit no longer than `_STAGE_S`; whoever writes while `congested` must wait for a flush.
- `write`, `trim` and `write_zeroes` are called on the loop; `flush`, `resize` and `read_into` in threads, and never in
  one of the engine's own: `flush` and `resize` wait for work that those have to do.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from stillpoint.devices import BlockDevice
from stillpoint.devices.base import Buffer
from stillpoint.errors import StillpointError
from stillpoint.extents import MappedExtent

from .cow import SnapshotEngine
from .cow.stage import overlay

logger = logging.getLogger(__name__)

_STAGE_S = 0.05


class LiveDevice:
    """Implements `stillpoint.devices.BlockDevice` over an engine. Made and written to on the engine's loop."""

    read_only = False

    def __init__(
        self, engine: SnapshotEngine, mirror: BlockDevice, grow: Callable[[int], Coroutine[Any, Any, None]]
    ) -> None:
        """grow: the mirror and what belongs to it, on the loop."""
        self._engine = engine
        self._mirror = mirror
        self._grow = grow
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._timer: asyncio.TimerHandle | None = None
        self._committing: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def size(self) -> int:
        return self._engine.size

    @property
    def description(self) -> str:
        return self._mirror.description

    @property
    def congested(self) -> bool:
        """Staged writes hold as much memory as they may: answer nothing more before a flush."""
        return self._engine.wants_commit

    # --- reading

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        if not self._mirror.try_read_into(offset, buffer):
            return False
        overlay(self._engine.staged(), offset, buffer)
        return True

    def read_into(self, offset: int, buffer: memoryview) -> None:
        staged = self._engine.staged()
        self._mirror.read_into(offset, buffer)
        overlay(staged, offset, buffer)

    def extents(self, offset: int, length: int) -> Iterator[MappedExtent]:
        """What is staged is not on the mirror yet, so while anything is, all of it counts as data."""
        if self._engine.staged_bytes:
            return iter((MappedExtent(offset, length, hole=False),)) if length else iter(())
        return self._mirror.extents(offset, length)

    # --- changing

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            view = memoryview(buffer)
            self._engine.write(offset, view)
            offset += len(view)
        self._changed()

    def trim(self, offset: int, length: int) -> None:
        self._engine.trim(offset, length)
        self._changed()

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        self._engine.write_zeroes(offset, length, may_trim=may_trim)
        self._changed()

    def _changed(self) -> None:
        if self._engine.staged_bytes and self._timer is None and self._committing is None:
            self._timer = self._loop.call_later(0 if self._engine.wants_commit else _STAGE_S, self._commit_soon)

    def _commit_soon(self) -> None:
        self._timer = None
        if not self._closed:
            self._committing = self._loop.create_task(self._commit())

    async def _commit(self) -> None:
        try:
            await self._engine.commit()
        except StillpointError as error:
            # The engine takes nothing from here on and every flush fails, so that clients learn of it.
            logger.error("the volume's disk failed: %s", error, extra={"volume": self._engine.name})
        finally:
            self._committing = None
            self._changed()

    def flush(self) -> None:
        if threading.get_ident() == self._thread:
            # Only while the volume is being opened, before the first write.
            assert not self._engine.staged_bytes
            self._mirror.flush()
            return
        asyncio.run_coroutine_threadsafe(self._engine.flush(), self._loop).result()

    def resize(self, size: int) -> None:
        asyncio.run_coroutine_threadsafe(self._grow(size), self._loop).result()

    def close(self) -> None:
        """The engine and the mirror stay open: they belong to the standby's role."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
