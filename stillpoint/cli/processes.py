"""Node processes that outlive the standbyctl that started them: start, find again, stop, kill.

A process is known by its pid and the time it started, so that a pid which the system has given to another process
since is never signalled.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import StillpointError

_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    started_ticks: int  # since the machine started

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has this pid now; None when there is none or it has ended and waits to be reaped."""
        fields = _stat_fields(pid)
        return None if fields is None or fields[0] in ("Z", "X") else cls(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        return Process.of(self.pid) == self

    def send(self, number: signal.Signals) -> None:
        if self.alive:
            os.kill(self.pid, number)

    def children(self) -> list[Process]:
        found = []
        for entry in os.listdir("/proc"):
            fields = _stat_fields(int(entry)) if entry.isdecimal() else None
            if fields is not None and int(fields[1]) == self.pid and (child := Process.of(int(entry))) is not None:
                found.append(child)
        return found


def _stat_fields(pid: int) -> list[str] | None:
    """/proc/PID/stat from the state on; the name before it may hold anything, blanks and parentheses included."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


def start_module(module: str, *arguments: str, log_file: Path) -> Process:
    """Start `python -m module` in a session of its own, its output appended to `log_file`."""
    with log_file.open("ab") as log:
        # -P: a folder that happens to be called as the module must not be taken for it.
        started = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    process = Process.of(started.pid)
    # It runs on by itself: nobody waits for it, and that is no reason for a warning when this object goes.
    started.returncode = 0
    if process is None:
        raise StillpointError(f"{module} ended at once; its log is {log_file}")
    return process


def read_pid_file(path: Path) -> Process | None:
    """The process named there if it still runs."""
    try:
        pid, ticks = path.read_text().split()
        process = Process(int(pid), int(ticks))
    except (FileNotFoundError, ValueError):
        return None
    return process if process.alive else None


def write_pid_file(path: Path, process: Process) -> None:
    path.write_text(f"{process.pid} {process.started_ticks}\n")


def wait_gone(processes: Iterable[Process], *, timeout_s: float) -> list[Process]:
    """Those still there when the time is over."""
    left = list(processes)
    deadline = time.monotonic() + timeout_s
    while left := [process for process in left if process.alive]:
        if time.monotonic() > deadline:
            break
        reap(left)
        time.sleep(_POLL_S)
    return left


def reap(processes: Iterable[Process]) -> None:
    """Let go of those that were children of this process."""
    for process in processes:
        try:
            os.waitpid(process.pid, os.WNOHANG)
        except ChildProcessError:
            continue


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16384))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]
