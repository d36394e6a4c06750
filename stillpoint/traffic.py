"""What went over an export since the process started: counts, bytes, and how long requests took.

Kept on the hot path, so plain numbers: a batch of requests adds to them once. Whoever shows them (`metrics.py`) reads
them as they are. Counters never fall; they start at 0 with the process.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, Final

# Upper bounds in seconds: from what an answer out of memory takes to what a client gives up at.
LATENCY_BOUNDS_S: Final = (
    *(50e-6, 100e-6, 250e-6, 500e-6),
    *(1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3, 250e-3, 500e-3),
    *(1.0, 2.5, 5.0, 10.0, 30.0),
)


class Latency:
    """A histogram of durations. `counts[i]` are those up to `LATENCY_BOUNDS_S[i]`; the last one is the rest."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(LATENCY_BOUNDS_S) + 1)
        self.sum_s = 0.0

    def observe(self, duration_s: float, count: int = 1) -> None:
        """`count` requests took `duration_s` each."""
        self.counts[bisect_left(LATENCY_BOUNDS_S, duration_s)] += count
        self.sum_s += duration_s * count

    def add(self, other: Latency) -> None:
        self.counts = [ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)]
        self.sum_s += other.sum_s


class Traffic:
    """The requests of one export. What was refused at once counts as an error only.

    `write_latency` is that of all that changes the disk, by itself or with FUA; an export may leave a latency out.
    """

    _COUNTS: Final = (
        *("read_count", "write_count", "flush_count", "trim_count", "zero_count"),
        *("read_bytes", "written_bytes", "error_count"),
    )
    _LATENCIES: Final = ("read_latency", "write_latency", "flush_latency")
    __slots__ = _COUNTS + _LATENCIES

    def __init__(self) -> None:
        self.read_count = self.write_count = self.flush_count = self.trim_count = self.zero_count = 0
        self.read_bytes = self.written_bytes = 0
        self.error_count = 0
        self.read_latency = Latency()
        self.write_latency = Latency()
        self.flush_latency = Latency()

    def add(self, other: Traffic) -> None:
        """Take over what `other` counted."""
        for name in self._COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in self._LATENCIES:
            getattr(self, name).add(getattr(other, name))

    def document(self) -> dict[str, Any]:
        """For another process of this node; can be written as JSON."""
        latencies = {name: getattr(self, name) for name in self._LATENCIES}
        return {name: getattr(self, name) for name in self._COUNTS} | {
            name: {"counts": latency.counts, "sum_s": latency.sum_s} for name, latency in latencies.items()
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Traffic:
        traffic = cls()
        for name in cls._COUNTS:
            setattr(traffic, name, document[name])
        for name in cls._LATENCIES:
            latency = getattr(traffic, name)
            latency.counts, latency.sum_s = document[name]["counts"], document[name]["sum_s"]
        return traffic
