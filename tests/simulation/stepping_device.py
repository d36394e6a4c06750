"""A device each of whose writes and flushes is a step at which the power may fail, and how that is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stillpoint.devices import BlockDevice, Buffer
from tests.support.devices import RecordingDevice


class PowerLoss(BaseException):
    """The machine is gone. Not an Exception: nobody handles it."""


class SteppingDevice(RecordingDevice):
    """A recording device each of whose writes and flushes is a step of the world."""

    def __init__(self, beneath: BlockDevice, step: Callable[[], None]) -> None:
        super().__init__(beneath)
        self._step = step

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._step()
        super().write(offset, buffers)

    def trim(self, offset: int, length: int) -> None:
        self._step()
        super().trim(offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        self._step()
        super().write_zeroes(offset, length, may_trim=may_trim)

    def flush(self) -> None:
        self._step()
        super().flush()
        self._step()

    def everything(self) -> bytes:
        image = bytearray(self.size)
        self.beneath.read_into(0, memoryview(image))
        return bytes(image)
