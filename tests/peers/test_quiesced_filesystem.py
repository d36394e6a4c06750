"""A mounted file system that is frozen for its snapshot: the snapshot is clean, and the file system always thaws."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from stillpoint.cli.cluster import load_cluster
from stillpoint.cli.nodes import Nodes
from stillpoint.errors import Refused
from stillpoint.wire.v1 import primary_pb2
from tests.support import filesystems
from tests.support.cluster import LocalCluster
from tests.support.filesystems import loop_device, mounted
from tests.support.requirements import requires_fuse, requires_loop_devices, requires_root, requires_tools

pytestmark = [
    requires_root,
    requires_fuse,
    requires_loop_devices,
    requires_tools(*filesystems.TOOLS, "fsfreeze", "dumpe2fs", "debugfs", "nbdcopy"),
    pytest.mark.timeout(240),
]

LIMIT_S = 3.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """Its volume `fs` is frozen by the mountpoint tmp_path/root."""
    with LocalCluster.up(tmp_path / "cluster", "fs:64MiB") as cluster:
        config = cluster.directory / "primary.yaml"
        document = yaml.safe_load(config.read_text())
        document["quiesce"] = {
            "limit_s": LIMIT_S,
            "hooks": [{"volume": "fs", "mountpoint": str(tmp_path / "root")}],
        }
        config.write_text(yaml.safe_dump(document))
        cluster.kill("primary")
        cluster.start("primary")
        cluster.wait_in_sync("fs")
        yield cluster


@pytest.fixture
def root(cluster: LocalCluster, tmp_path: Path) -> Iterator[Path]:
    """An ext4 on the volume, mounted."""
    with loop_device(f"{cluster.env['primary']['nbd']}/fs", tmp_path) as device:
        run("mkfs.ext4", "-q", "-F", device)
        with mounted(device, tmp_path) as root:
            try:
                yield root
            finally:
                subprocess.run(["fsfreeze", "--unfreeze", str(root)], check=False, capture_output=True)


def run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def freeze(cluster: LocalCluster) -> None:
    async def call() -> None:
        async with Nodes(load_cluster(cluster.cluster_file)) as nodes:
            request = primary_pb2.FreezeRequest(volumes=["fs"])
            for _ in range(50):
                # Just after a thaw at the limit the primary may not have heard of it yet.
                with contextlib.suppress(Refused):
                    await nodes.primary.call("Freeze", request, primary_pb2.FreezeId)
                    return
                await asyncio.sleep(0.1)
            pytest.fail("it cannot be frozen")

    asyncio.run(call())


def begin_to_write(file: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["dd", "if=/dev/zero", f"of={file}", "bs=4096", "count=1"], stderr=subprocess.DEVNULL)


def test_a_quiesced_snapshot_is_a_clean_file_system_with_all_that_was_written(
    cluster: LocalCluster, root: Path, tmp_path: Path
) -> None:
    content = random.Random(1).randbytes(3 << 20)
    (root / "file").write_bytes(content)  # and not synchronized
    cluster.cli("snapshot", "create", "fs", "--name", "torn")
    cluster.cli("snapshot", "create", "fs", "--name", "clean", "--quiesce")
    (root / "after").write_bytes(b"thawed")
    needs_recovery = {}
    for name in ("torn", "clean"):
        image = tmp_path / name
        run("nbdcopy", f"{cluster.env['standby']['nbd']}/fs@{name}", image)
        needs_recovery[name] = "needs_recovery" in run("dumpe2fs", "-h", image)
    assert needs_recovery == {"torn": True, "clean": False}
    run("e2fsck", "-f", "-n", image)
    run("debugfs", "-R", f"dump /file {tmp_path / 'restored'}", image)
    assert (tmp_path / "restored").read_bytes() == content


def test_a_frozen_file_system_thaws_at_the_limit_and_when_the_primary_is_killed(
    cluster: LocalCluster, root: Path
) -> None:
    freeze(cluster)  # and nobody thaws it
    with begin_to_write(root / "late") as writer:
        time.sleep(0.5)
        assert writer.poll() is None, "it was not frozen"
        assert writer.wait(LIMIT_S + 5) == 0
    freeze(cluster)
    with begin_to_write(root / "later") as writer:
        time.sleep(0.5)
        assert writer.poll() is None, "it was not frozen"
        cluster.kill("primary")
        writer.wait(LIMIT_S + 5)  # its disk is gone, so it may fail; it is not stuck
