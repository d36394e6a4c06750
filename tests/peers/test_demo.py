"""standbyctl demo, as a first-time user runs it."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.cluster import STANDBYCTL, run_standbyctl
from tests.support.requirements import requires_tools

pytestmark = [pytest.mark.timeout(240), requires_tools("mke2fs", "e2fsck", "debugfs")]


def test_the_demo_passes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    result = run_standbyctl("demo", "--size", "64MiB", env={"TMPDIR": str(tmp_path)}, timeout_s=180)
    assert result.code == 0, result
    assert result.stdout.splitlines()[-1] == "PASSED"
    assert "bytes the backup read from the primary" in result.stdout
    assert "[8/8]" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_demo_in_a_directory_can_be_kept_and_says_it_in_json(tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    result = run_standbyctl("--json", "demo", "--size", "64MiB", "--dir", directory, "--keep", timeout_s=180)
    try:
        assert result.code == 0, result
        document = result.document
        assert document["passed"] is True and document["failures"] == []
        assert document["primary_read_bytes"] == 0
        assert document["preserved_bytes"] > 0
        assert document["compared_bytes"] == 64 * 1024**2
        status = run_standbyctl("--cluster", directory / "cluster" / "cluster.yaml", "status")
        assert status.code == 0, status
        assert "not empty" in run_standbyctl("demo", "--dir", directory).error
    finally:
        run_standbyctl("local", "down", "--dir", directory / "cluster")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_demo_takes_everything_down(tmp_path: Path, number: signal.Signals, code: int) -> None:
    directory = tmp_path / "demo"
    with subprocess.Popen(
        [*STANDBYCTL, "demo", "--size", "64MiB", "--dir", str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        while "[4/8]" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(0.2)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in error
    assert not directory.exists()
    running = subprocess.run(["pgrep", "-f", str(directory)], capture_output=True, text=True, check=False)
    assert running.stdout == ""


@pytest.mark.parametrize("size", ["1MiB", "100000000", "0", "many"])
def test_a_size_the_demo_cannot_take_is_wrong_usage(tmp_path: Path, size: str) -> None:
    result = run_standbyctl("demo", "--size", size, env={"TMPDIR": str(tmp_path)})
    assert result.code == 2
    assert "--size" in result.error
    assert list(tmp_path.iterdir()) == []
