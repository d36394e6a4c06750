"""Disks that fail under a running pair: system calls of the real processes are made to fail with strace."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.test_mirroring import assert_same_disk, fill, flush, pair_of, pid_of, run, volume_uri, wait_until
from tests.support.cluster import LocalCluster
from tests.support.requirements import requires_root, requires_tools

pytestmark = [requires_tools("strace", "nbdcopy", "qemu-io"), requires_root, pytest.mark.timeout(180)]

SIZE = 32 << 20


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster.up(tmp_path / "cluster", f"vol:{SIZE}") as cluster:
        yield cluster


@contextlib.contextmanager
def failing(pid: int, calls: str, error: str) -> Iterator[None]:
    """While it lasts, these system calls of the process fail without being made."""
    tracer = subprocess.Popen(
        [
            "strace",
            "-f",
            "-p",
            str(pid),
            "-o",
            "/dev/null",
            "-e",
            f"trace={calls}",
            "-e",
            f"inject={calls}:error={error}",
        ],
        stderr=subprocess.PIPE,
    )
    try:
        assert tracer.stderr is not None
        assert b"attached" in tracer.stderr.readline()
        time.sleep(0.3)  # its threads are attached one by one
        yield
    finally:
        tracer.terminate()
        tracer.communicate(timeout=10)


def client_fails(cluster: LocalCluster, command: str) -> bool:
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", command, volume_uri(cluster)], capture_output=True, timeout=60, check=False
    )
    return done.returncode != 0 or b"failed" in done.stdout + done.stderr


def test_a_flush_that_failed_on_the_primary_is_never_followed_by_one_that_succeeds(pair: LocalCluster) -> None:
    fill(pair, 1)
    with failing(pid_of(pair, "primary"), "fdatasync", "EIO"):
        assert client_fails(pair, "flush")
    # The kernel may have dropped the pages: a later fdatasync that returns 0 proves nothing about them.
    assert client_fails(pair, "flush")
    status = pair.run("status")
    assert status.code == 1
    assert "vol" in status.stdout


def test_a_disk_that_failed_a_flush_is_never_copied_over_the_mirror_unless_an_operator_says_so(
    pair: LocalCluster,
) -> None:
    fill(pair, 7)
    with failing(pid_of(pair, "primary"), "fdatasync", "EIO"):
        assert client_fails(pair, "write -P 7 1M 64k; flush")
    primary, mirror = (Path(pair.env["volumes"]["vol"][side]) for side in ("primary_path", "mirror_path"))
    before = mirror.read_bytes()
    assert pair.run("mirror", "resync", "vol").code == 1  # the process still sees the disk fail
    for node in ("standby", "primary"):
        pair.kill(node)
        # What a lost page would be: content here that the mirror never had.
        with primary.open("r+b") as disk:
            disk.seek(1 << 20)
            disk.write(bytes(65536))
        pair.start(node)
        time.sleep(1.5)
        shown = pair.cli("volume", "show", "vol")
        assert (shown["pair"]["state"], "flush failed" in shown["failure"]) == ("disconnected", True)
        assert "mirror resync" in shown["pair"]["detail"]
        assert mirror.read_bytes() == before
    pair.cli("mirror", "resync", "vol")
    wait_until(pair, "in_sync")
    assert pair.cli("volume", "show", "vol")["failure"] == ""
    assert_same_disk(pair)


def test_a_write_that_failed_on_the_primary_is_refused_and_both_copies_end_equal(pair: LocalCluster) -> None:
    fill(pair, 2)
    session = pair_of(pair)["session"]
    with failing(pid_of(pair, "primary"), "pwrite64,pwritev,pwritev2", "ENOSPC"):
        assert client_fails(pair, "write -P 9 4M 1M")
    wait_until(pair, "in_sync")
    deadline = time.monotonic() + 30
    while pair_of(pair)["session"] == session or pair_of(pair)["state"] != "in_sync":
        assert time.monotonic() < deadline  # the standby had been sent what the primary then could not write
        time.sleep(0.1)
    assert_same_disk(pair)


@pytest.mark.parametrize(("calls", "error"), [("fdatasync", "EIO"), ("pwrite64,pwritev,pwritev2", "ENOSPC")])
def test_a_mirror_whose_disk_fails_says_so_and_comes_back_by_a_restart(
    pair: LocalCluster, calls: str, error: str
) -> None:
    fill(pair, 3)
    with failing(pid_of(pair, "standby"), calls, error):
        run("qemu-io", "-f", "raw", "-c", "write -P 7 8M 1M", "-c", "flush", volume_uri(pair))  # clients go on
        deadline = time.monotonic() + 20
        while pair_of(pair)["state"] != "disconnected":
            assert time.monotonic() < deadline
            time.sleep(0.1)
    mirror = next(each for each in pair.cli("mirror", "status")["mirrors"] if each["volume"] == "vol")
    assert mirror["state"] == "failed"
    refused = pair.run("snapshot", "create", "vol")
    assert refused.code == 1
    assert "failed" in refused.error
    run("qemu-io", "-f", "raw", "-c", "write -P 8 12M 1M", volume_uri(pair))
    pair.kill("standby")
    pair.start("standby")
    wait_until(pair, "in_sync")
    assert_same_disk(pair)


def test_a_store_whose_disk_fails_costs_its_snapshots_and_not_the_mirror(pair: LocalCluster, tmp_path: Path) -> None:
    """A file system of its own for the store, so that only its calls find no space."""
    folder = tmp_path / "small"
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder))
    try:
        pair.cli("store", "create", "tight", "--file", folder / "store", "--size", "64MiB")
        fill(pair, 4)
        pair.cli("snapshot", "create", "vol", "--name", "s", "--store", "tight")
        fill(pair, 5)
        assert_same_disk(pair)
        shown = pair.cli("snapshot", "show", "vol@s")
        assert shown["state"] == "invalid"
        assert pair_of(pair)["state"] == "in_sync"
        pair.cli("snapshot", "create", "vol", "--name", "next")
        flush(volume_uri(pair))
    finally:
        pair.down()
        run("umount", str(folder))


def test_a_primary_whose_disk_cannot_be_read_serves_from_the_standby_and_says_so(
    pair: LocalCluster, tmp_path: Path
) -> None:
    content = fill(pair, 6)
    with failing(pid_of(pair, "primary"), "preadv,preadv2,pread64", "EIO"):
        run("nbdcopy", volume_uri(pair), str(tmp_path / "read"))
    assert (tmp_path / "read").read_bytes() == content
    shown = pair.cli("volume", "show", "vol")
    assert shown["read_failures"] > 0
    assert shown["repaired_bytes"] >= SIZE
    status = pair.run("status")
    assert status.code == 1
    assert "FAILED" in status.stdout
    assert_same_disk(pair)
