"""The plain model of a volume that crashes: what each of its sectors may hold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tests.support.devices import SECTOR_SIZE


class Violation(AssertionError):
    """What the engine promised does not hold."""


class Model:
    """What the volume may hold: one stamp a sector, written 64 times into it; 0 is zeroes."""

    def __init__(self, sector_count: int) -> None:
        self.now: npt.NDArray[np.uint64] = np.zeros(sector_count, dtype=np.uint64)
        self.possible: list[set[int]] = [{0} for _ in range(sector_count)]

    def change(self, first: int, count: int, stamp: int) -> None:
        self.now[first : first + count] = stamp
        for sector in range(first, first + count):
            self.possible[sector].add(stamp)

    def flushed(self) -> None:
        self.possible = [{int(stamp)} for stamp in self.now]

    def image(self) -> bytes:
        return to_bytes(self.now)

    def adopt(self, image: bytes, *, allowed: bool) -> None:
        """A crash has left this; it must be something that was written and not flushed over."""
        stamps = to_stamps(image)
        for sector, stamp in enumerate(stamps.tolist()):
            if allowed and stamp not in self.possible[sector]:
                raise Violation(f"sector {sector} holds {stamp:#x} after a crash; it may hold {self.possible[sector]}")
        self.now = stamps
        self.flushed()


def to_bytes(stamps: npt.NDArray[np.uint64]) -> bytes:
    return np.repeat(stamps, SECTOR_SIZE // 8).tobytes()


def to_stamps(image: bytes) -> npt.NDArray[np.uint64]:
    words = np.frombuffer(image, dtype=np.uint64).reshape(-1, SECTOR_SIZE // 8)
    if not bool((words == words[:, :1]).all()):
        raise Violation("a sector holds a mixture")
    return words[:, 0].copy()
