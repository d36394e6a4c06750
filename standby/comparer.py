"""Answers the primary's questions whether the mirror has a certain content at a point of the write stream.

What is in the page cache is compared at once. Other ranges are first read in a thread; if a frame changes the range
meanwhile, the answer is UNKNOWN, as the question was about a content that is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor

from stillpoint.buffers import uninitialised
from stillpoint.devices import BlockDevice
from stillpoint.digest import digest
from stillpoint.errors import DeviceError, ProtocolError
from stillpoint.extents import Extent, check_range
from stillpoint.link.frames import Verdict

from .cow import SnapshotEngine

_PIECE_SIZE = 1 << 20
# Questions that wait for the disk; the primary keeps fewer open.
_OPEN_MAX = 64

Answer = Callable[[int, int, Verdict], None]


class Comparer:
    """Of one session. `changed` is told of every change; it is only called while `busy`."""

    def __init__(self, engine: SnapshotEngine, mirror: BlockDevice, executor: Executor, answer: Answer) -> None:
        self._engine = engine
        self._mirror = mirror
        self._executor = executor
        self._answer = answer
        self._open: dict[asyncio.Task[None], Extent] = {}
        self._disturbed: set[Extent] = set()

    @property
    def busy(self) -> bool:
        return bool(self._open)

    def ask(self, offset: int, length: int, expected: bytes) -> None:
        """expected: the digest, or nothing for zeroes. The range of a digest is at most 1 MiB."""
        check_range(offset=offset, length=length, size=self._engine.size)
        if (expected and length > _PIECE_SIZE) or len(self._open) >= _OPEN_MAX:
            raise ProtocolError(f"a comparison of {length} bytes is out of bounds")
        extent = Extent(offset, length)
        if expected and self._mirror.try_read_into(offset, uninitialised(length)):
            self._answer(offset, length, self._compare(extent, expected))
            return
        task = asyncio.get_running_loop().create_task(self._later(extent, expected))
        self._open[task] = extent
        task.add_done_callback(lambda done: self._open.pop(done, None))

    def changed(self, offset: int, length: int) -> None:
        for extent in self._open.values():
            if offset < extent.end and extent.offset < offset + length:
                self._disturbed.add(extent)

    def _compare(self, extent: Extent, expected: bytes) -> Verdict:
        same = digest(self._engine.read(extent.offset, extent.length)) == expected
        return Verdict.SAME if same else Verdict.DIFFERENT

    async def _later(self, extent: Extent, expected: bytes) -> None:
        loop = asyncio.get_running_loop()
        verdict = Verdict.UNKNOWN
        try:
            if expected:
                # Into the page cache, so that the comparison on the loop, staged changes included, is a short one.
                await loop.run_in_executor(self._executor, _read, self._mirror, extent)
                if extent not in self._disturbed:
                    verdict = self._compare(extent, expected)
            else:
                await self._engine.commit()  # a trim that is still staged is part of the content asked about
                zero = await loop.run_in_executor(self._executor, _is_zero, self._mirror, extent)
                if extent not in self._disturbed:
                    verdict = Verdict.SAME if zero else Verdict.DIFFERENT
        except DeviceError:
            verdict = Verdict.DIFFERENT  # what cannot be read is not a copy
        self._disturbed.discard(extent)
        self._answer(extent.offset, extent.length, verdict)

    def stop(self) -> None:
        for task in list(self._open):
            task.cancel()


def _read(device: BlockDevice, extent: Extent) -> memoryview:
    buffer = uninitialised(extent.length)
    device.read_into(extent.offset, buffer)
    return buffer


def _is_zero(device: BlockDevice, extent: Extent) -> bool:
    for mapped in device.extents(extent.offset, extent.length):
        if mapped.hole:
            continue
        for at in range(mapped.offset, mapped.end, _PIECE_SIZE):
            content = _read(device, Extent(at, min(_PIECE_SIZE, mapped.end - at)))
            if content != bytes(len(content)):
                return False
    return True
