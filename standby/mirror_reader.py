"""Answers the primary's questions for the mirror's content, when its own disk cannot be read.

An answer holds everything that was sent before the question, staged changes included, and may hold what came later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor

from stillpoint.buffers import uninitialised
from stillpoint.devices import BlockDevice
from stillpoint.errors import DeviceError, ProtocolError
from stillpoint.extents import Extent, check_range
from stillpoint.link.frames import MAX_PAYLOAD_SIZE

from .cow import SnapshotEngine

# Questions that wait for the disk; the primary has fewer threads to ask with.
_OPEN_MAX = 64

# The number of the question, its range, the content, and why there is none.
Answer = Callable[[int, Extent, bytes, str], None]


class MirrorReader:
    """Of one session."""

    def __init__(self, engine: SnapshotEngine, mirror: BlockDevice, executor: Executor, answer: Answer) -> None:
        self._engine = engine
        self._mirror = mirror
        self._executor = executor
        self._answer = answer
        self._open: set[asyncio.Task[None]] = set()

    def ask(self, question: int, offset: int, length: int) -> None:
        check_range(offset=offset, length=length, size=self._engine.size)
        if not 0 < length <= MAX_PAYLOAD_SIZE or len(self._open) >= _OPEN_MAX:
            raise ProtocolError(f"a question for {length} bytes is out of bounds")
        task = asyncio.get_running_loop().create_task(self._read(question, Extent(offset, length)))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _read(self, question: int, extent: Extent) -> None:
        try:
            # Into the page cache first, so that the read on the loop, which sees what is staged, is a short one.
            buffer = uninitialised(extent.length)
            if not self._mirror.try_read_into(extent.offset, buffer):
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._executor, self._mirror.read_into, extent.offset, buffer)
            content = bytes(self._engine.read(extent.offset, extent.length))
        except DeviceError as error:
            self._answer(question, extent, b"", str(error))
        else:
            self._answer(question, extent, content, "")

    def stop(self) -> None:
        for task in list(self._open):
            task.cancel()
