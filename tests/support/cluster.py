"""A real cluster of three node processes for tests, driven as a user drives it: by standbyctl in a process of its own.

with LocalCluster.up(directory, "vol1:64MiB") as cluster:
    cluster.cli("snapshot", "create", "vol1", "--name", "s1")
    cluster.kill("standby")
    cluster.start("standby")
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

# As the console script does, without relying on PATH.
STANDBYCTL = (sys.executable, "-c", "import sys; from stillpoint.cli.standbyctl import main; sys.exit(main())")


@dataclass(frozen=True, slots=True)
class CliResult:
    """One run of standbyctl."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        return json.loads(self.stdout)

    @property
    def error(self) -> str:
        """The one line of an error. Fails the test when stderr holds anything else."""
        lines = self.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("standbyctl: "), self.stderr
        return lines[0].removeprefix("standbyctl: ")


def run_standbyctl(
    *arguments: str | os.PathLike[str],
    timeout_s: float = 90,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> CliResult:
    """Run standbyctl, whatever its exit code. `env` is added to the environment."""
    environment = {name: value for name, value in os.environ.items() if name != "STILLPOINT_CLUSTER"} | (env or {})
    done = subprocess.run(
        [*STANDBYCTL, *(os.fspath(argument) for argument in arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        cwd=cwd,
        env=environment,
    )
    return CliResult(done.returncode, done.stdout, done.stderr)


class LocalCluster:
    """Three nodes on loopback, with their state in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def up(
        cls,
        directory: Path,
        *volumes: str,
        carrier: str | None = None,
        insecure: bool = False,
        nbd_tls: bool = False,
    ) -> LocalCluster:
        """Start it (or what of it does not run), with volumes given as "NAME:SIZE", and wait until they are in sync."""
        cluster = cls(directory)
        options = [argument for volume in volumes for argument in ("--volume", volume)]
        options += ["--carrier", carrier] if carrier else []
        options += ["--insecure"] if insecure else []
        options += ["--nbd-tls"] if nbd_tls else []
        cluster._local("up", *options)
        return cluster

    @property
    def env(self) -> dict[str, Any]:
        """What `local env` says now: addresses, pids, and the volumes' paths."""
        document: dict[str, Any] = self._local("env").document
        return document

    @property
    def cluster_file(self) -> Path:
        return self.directory / "cluster.yaml"

    def run(self, *arguments: str | os.PathLike[str], timeout_s: float = 90) -> CliResult:
        """standbyctl on this cluster, whatever its exit code."""
        return run_standbyctl("--cluster", self.cluster_file, *arguments, timeout_s=timeout_s)

    def cli(self, *arguments: str | os.PathLike[str], json: bool = True, timeout_s: float = 90) -> Any:
        """standbyctl on this cluster, which must succeed: the parsed document, or the text when json=False."""
        result = self.run(*(["--json"] if json else []), *arguments, timeout_s=timeout_s)
        assert result.code == 0, f"standbyctl {arguments} ended with {result.code}: {result.stderr}{self.log_tails()}"
        return result.document if json else result.stdout

    def kill(self, node: str) -> None:
        """SIGKILL to "primary", "standby" or "backup"; back when all of its processes are gone."""
        self._local("kill", node)

    def start(self, node: str) -> None:
        """Start a node again on its old ports; back when it serves."""
        self._local("start", node)

    def wait_in_sync(self, volume: str, *, timeout_s: float = 60) -> None:
        """Until the volume's pair is in sync."""
        deadline = time.monotonic() + timeout_s
        while (state := self.cli("volume", "show", volume)["pair"]["state"]) != "in_sync":
            assert time.monotonic() < deadline, f"{volume} is {state}{self.log_tails()}"
            time.sleep(0.1)

    def down(self) -> None:
        self._local("down")

    def destroy(self) -> None:
        """Stop it and remove all it wrote."""
        if self.cluster_file.exists():
            self.down()
        shutil.rmtree(self.directory, ignore_errors=True)

    def log_tails(self, line_count: int = 12) -> str:
        """The last lines of every node's log, for a failed test's message."""
        tails = []
        for log in sorted((self.directory / "logs").glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-line_count:]
            tails.append(f"\n--- {log.name}\n" + "\n".join(lines))
        return "".join(tails)

    def _local(self, command: str, *arguments: str) -> CliResult:
        result = run_standbyctl("--json", "local", command, *arguments, "--dir", self.directory, timeout_s=150)
        assert result.code == 0, (
            f"standbyctl local {command} ended with {result.code}: {result.stderr}{self.log_tails()}"
        )
        return result

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()


@pytest.fixture(scope="session")
def local_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """One cluster for all the tests that leave it as they found it: all nodes running, no volume of theirs left."""
    with LocalCluster.up(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """A cluster for one test that breaks nodes."""
    with LocalCluster.up(tmp_path / "cluster") as cluster:
        yield cluster
