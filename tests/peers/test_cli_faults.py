"""standbyctl when it is interrupted, when its reader goes away, and when nodes are dead or frozen."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any

import pytest

from tests.support.cluster import STANDBYCTL, CliResult, LocalCluster

pytestmark = pytest.mark.timeout(240)


# Interruptions


def start_cli(cluster: LocalCluster, *arguments: str, **streams: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*STANDBYCTL, "--cluster", str(cluster.cluster_file), *arguments],
        stdin=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        **streams,
    )


def test_ctrl_c_is_130_and_one_line(local_cluster: LocalCluster) -> None:
    with start_cli(local_cluster, "status", "--watch", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=20)
    assert CliResult(process.returncode, out, error.lstrip("\n")).error == "interrupted"
    assert process.returncode == 130


def test_a_reader_that_goes_away_ends_it_quietly(local_cluster: LocalCluster) -> None:
    with start_cli(local_cluster, "status", "--watch", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(20) == 1


def test_a_reader_that_was_never_there_ends_it_quietly(local_cluster: LocalCluster) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with start_cli(local_cluster, "--json", "status", stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (1, "")


# Dead and frozen nodes


def test_a_dead_node_is_one_line_that_names_it(own_cluster: LocalCluster) -> None:
    own_cluster.cli("volume", "create", "vol1", "--size", "1MiB")
    commands = {
        "primary": [["volume", "list"], ["volume", "create", "x", "--size", "1MiB"], ["volume", "delete", "vol1"]],
        "standby": [["snapshot", "create", "vol1"], ["snapshot", "list"], ["store", "list"], ["mirror", "status"]],
        "backup": [["backup", "list"], ["backup", "run", "vol1"], ["backup", "restore", "x", "/nowhere/y"]],
    }
    for node in ("backup", "standby", "primary"):
        own_cluster.kill(node)
        for arguments in commands[node]:
            result = own_cluster.run(*arguments)
            assert result.code == 1 and result.stdout == "", result
            assert node in result.error and "cannot be reached" in result.error
        status = own_cluster.run("--json", "status")
        assert status.code == 1
        assert status.document["nodes"][node]["up"] is False
        assert own_cluster.run("status").code == 1
    for node in ("standby", "primary", "backup"):
        own_cluster.start(node)
    deadline = time.monotonic() + 30
    while (status := own_cluster.run("--json", "status")).code != 0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert status.code == 0, status.stdout


def test_a_pair_that_is_apart_is_loud(own_cluster: LocalCluster) -> None:
    own_cluster.cli("volume", "create", "vol1", "--size", "1MiB")
    own_cluster.kill("standby")
    deadline = time.monotonic() + 20
    while "NOT IN SYNC" not in (result := own_cluster.run("status", "vol1")).stdout and time.monotonic() < deadline:
        time.sleep(0.2)
    assert result.code == 1
    assert "!! vol1 is NOT IN SYNC" in result.stdout
    assert "DISCONNECTED" in result.stdout
    failed = own_cluster.run("volume", "create", "vol2", "--size", "1MiB")
    assert failed.code == 1 and "standby" in failed.error
    assert [volume["name"] for volume in own_cluster.cli("volume", "list")] == ["vol1"]


def test_a_frozen_node_does_not_hang_the_status(own_cluster: LocalCluster) -> None:
    pid = own_cluster.env["backup"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        status = own_cluster.run("--json", "status")
        assert time.monotonic() - started < 20
        assert status.code == 1 and status.document["nodes"]["backup"]["up"] is False
    finally:
        os.kill(pid, signal.SIGCONT)
