"""What a process holds, as the system sees it, and whether it lets go of it again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptor_count(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s, and never: {what}"
        time.sleep(0.05)


@dataclass(frozen=True)
class Footprint:
    """Memory and descriptors of a process at one time."""

    name: str
    pid: int
    resident_bytes: int
    descriptors: int

    @classmethod
    def of(cls, name: str, pid: int) -> Footprint:
        return cls(name, pid, resident_bytes(pid), descriptor_count(pid))

    def assert_back(self, *, growth_bytes: int, descriptors: int = 4) -> None:
        """The process still runs, and holds no more than before, give or take."""
        wait_until(
            lambda: descriptor_count(self.pid) <= self.descriptors + descriptors,
            f"the {self.name} is back at {self.descriptors} descriptors",
        )
        wait_until(
            lambda: resident_bytes(self.pid) <= self.resident_bytes + growth_bytes,
            f"the {self.name} is back at {self.resident_bytes >> 20} MiB, give or take {growth_bytes >> 20}",
        )
