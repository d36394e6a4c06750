"""sd_notify against a real socket: readiness, the watchdog, and what a frozen loop looks like from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A node's way of serving, without a node: run_until_stopped and serve_until are what every node runs.
PROGRAM = """
import os, sys
from stillpoint.runtime import run_until_stopped
from stillpoint.service_manager import serve_until

async def main(stop):
    await serve_until(stop, status="serving")
    print(sorted(name for name in os.environ if name.startswith(("NOTIFY", "WATCHDOG"))))

sys.exit(run_until_stopped("node", main))
"""


class Manager:
    """The service manager's end of the notification socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)

    def hears(self, *, timeout_s: float = 10.0) -> list[str]:
        """The next message; empty when none comes in time."""
        self._socket.settimeout(timeout_s)
        try:
            return self._socket.recv(4096).decode().split("\n")
        except (TimeoutError, BlockingIOError):
            return []

    def silence(self) -> None:
        """Take all that is there already."""
        while self.hears(timeout_s=0):
            pass

    @contextlib.contextmanager
    def starts(self, **environment: str) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "NOTIFY_SOCKET": self.address, **environment},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["a path", "an abstract name"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    address = str(tmp_path / "notify") if request.param == "a path" else f"@stillpoint-test-{os.getpid()}"
    manager = Manager(address)
    yield manager
    manager.close()


def test_readiness_is_told_and_so_is_the_end(manager: Manager) -> None:
    with manager.starts() as process:
        assert manager.hears() == ["READY=1", "STATUS=serving"]
        process.send_signal(signal.SIGTERM)
        assert manager.hears() == ["STOPPING=1", "STATUS=stopping"]
        output, _ = process.communicate(timeout=10)
        assert process.returncode == 0
        assert output.strip() == "[]", "a child of ours could speak for us"


def test_the_watchdog_hears_of_us_while_the_loop_turns_and_no_longer() -> None:
    manager = Manager(f"@stillpoint-test-watchdog-{os.getpid()}")
    with contextlib.closing(manager), manager.starts(WATCHDOG_USEC="400000") as process:
        assert manager.hears() == ["READY=1", "STATUS=serving"]
        times = []
        for _ in range(4):
            assert manager.hears(timeout_s=5) == ["WATCHDOG=1"]
            times.append(time.monotonic())
        assert times[-1] - times[0] < 2.0  # of 0.6: a busy machine is late, but not by much
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        manager.silence()
        assert manager.hears(timeout_s=1.0) == []
        process.send_signal(signal.SIGCONT)
        assert manager.hears() == ["WATCHDOG=1"]


def test_a_watchdog_meant_for_another_process_is_left_to_it() -> None:
    manager = Manager(f"@stillpoint-test-other-{os.getpid()}")
    with contextlib.closing(manager), manager.starts(WATCHDOG_USEC="100000", WATCHDOG_PID="1"):
        assert manager.hears() == ["READY=1", "STATUS=serving"]
        assert manager.hears(timeout_s=0.5) == []


def test_a_service_manager_that_is_gone_does_not_stop_the_node(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    with manager.starts(WATCHDOG_USEC="200000") as process:
        assert manager.hears() == ["READY=1", "STATUS=serving"]
        manager.close()
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
