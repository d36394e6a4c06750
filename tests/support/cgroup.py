"""A memory limit for processes of a test, by a cgroup of version 1 or 2. Needs root."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryGroup:
    folder: Path

    @property
    def procs(self) -> Path:
        """A process that writes its id here is in the group, with all that it starts."""
        return self.folder / "cgroup.procs"

    @property
    def oom_kill_count(self) -> int:
        events = self.folder / ("memory.events" if _is_unified() else "memory.oom_control")
        counts = dict(line.split() for line in events.read_text().splitlines())
        return int(counts["oom_kill"])

    @property
    def peak_bytes(self) -> int:
        """Page cache included, which gives way when the limit is reached."""
        name = "memory.peak" if _is_unified() else "memory.max_usage_in_bytes"
        return int((self.folder / name).read_text())


def missing_memory_cgroup() -> str | None:
    """Why no group can be made here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    return None if _parent() is not None else "needs a memory cgroup that can be written to"


@contextlib.contextmanager
def memory_group(name: str, limit_bytes: int) -> Iterator[MemoryGroup]:
    """A group of its own; its processes must have ended when it does."""
    parent = _parent()
    assert parent is not None
    folder = parent / f"stillpoint-test-{os.getpid()}-{name}"
    folder.mkdir()
    try:
        limit = "memory.max" if _is_unified() else "memory.limit_in_bytes"
        (folder / limit).write_text(str(limit_bytes))
        yield MemoryGroup(folder)
    finally:
        for _ in range(100):
            try:
                folder.rmdir()
                break
            except OSError:  # the last process is still being buried
                time.sleep(0.05)


def _is_unified() -> bool:
    return (_ROOT / "cgroup.controllers").exists()


def _parent() -> Path | None:
    if not _is_unified():
        parent = _ROOT / "memory"
        return parent if os.access(parent, os.W_OK) and (parent / "memory.limit_in_bytes").exists() else None
    if "memory" not in (_ROOT / "cgroup.controllers").read_text().split():
        return None
    with contextlib.suppress(OSError):
        (_ROOT / "cgroup.subtree_control").write_text("+memory")
    enabled = (_ROOT / "cgroup.subtree_control").read_text().split()
    return _ROOT if "memory" in enabled and os.access(_ROOT, os.W_OK) else None
