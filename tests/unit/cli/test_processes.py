"""Processes that are found again by pid and start time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from stillpoint.cli import processes
from stillpoint.cli.processes import Process


def test_a_process_is_known_by_pid_and_start_time() -> None:
    this = Process.of(os.getpid())
    assert this is not None and this.alive
    assert not Process(this.pid, this.started_ticks + 1).alive


def test_a_pid_file_of_a_process_that_is_gone_names_nobody(tmp_path: Path) -> None:
    this = Process.of(os.getpid())
    assert this is not None
    file = tmp_path / "pid"
    assert processes.read_pid_file(file) is None
    processes.write_pid_file(file, Process(this.pid, this.started_ticks - 1))
    assert processes.read_pid_file(file) is None
    processes.write_pid_file(file, this)
    assert processes.read_pid_file(file) == this
    file.write_text("garbage")
    assert processes.read_pid_file(file) is None


def test_an_ended_child_that_nobody_waited_for_counts_as_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    process = Process.of(child.pid)
    assert process is not None
    deadline = time.monotonic() + 10
    while process.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not process.alive
    child.wait()


def test_a_started_module_runs_on_its_own_with_its_output_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    started = processes.start_module("http.server", "0", "--bind", "127.0.0.1", log_file=log)
    try:
        assert os.getsid(started.pid) == started.pid
        assert started in Process(os.getpid(), 0).children()
        deadline = time.monotonic() + 20
        # Its first line may sit in its buffer for ever; that it wrote nothing else is what counts here.
        while not Path(f"/proc/{started.pid}/cwd").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert os.readlink(f"/proc/{started.pid}/cwd") == "/"
    finally:
        started.send(signal.SIGKILL)
        assert processes.wait_gone([started], timeout_s=10) == []


def test_the_end_of_a_log_is_read_without_the_rest(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(f"line {number}" for number in range(5000)) + "\n\n")
    assert processes.last_lines(log, 2) == ["line 4998", "line 4999"]
    assert processes.last_lines(tmp_path / "none", 2) == []
