"""Each node within 256 MB, with a volume of 4 TiB, large writers, a reader that hardly reads, and a frozen standby."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from stillpoint.nbd import codec
from stillpoint.nbd import constants as c
from tests.support.cgroup import MemoryGroup, memory_group
from tests.support.cluster import STANDBYCTL, LocalCluster
from tests.support.nbd import RawClient
from tests.support.processes import wait_until
from tests.support.requirements import requires_memory_cgroup

pytestmark = [requires_memory_cgroup, pytest.mark.slow, pytest.mark.timeout(240)]

LIMIT_BYTES = 256 << 20
MIB = 1 << 20
TIB = 1 << 40
WRITE_SIZE = 32 * MIB
WRITER_COUNT = 8
NODES = ("standby", "primary", "backup")


class Limited:
    def __init__(self, cluster: LocalCluster, groups: dict[str, MemoryGroup]) -> None:
        self.cluster = cluster
        self.groups = groups
        self.env = cluster.env

    def port(self, node: str) -> int:
        return int(self.env[node]["nbd"].rpartition(":")[2])


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Limited]:
    """A cluster on disk (memory files would count as memory), its nodes started anew, each in a group of its own."""
    with ExitStack() as stack:
        cluster = stack.enter_context(LocalCluster.up(tmp_path / "cluster", "huge:4TiB"))
        cluster.down()
        groups = {}
        for node in NODES:
            groups[node] = stack.enter_context(memory_group(node, LIMIT_BYTES))
            start = 'echo $$ >"$0" && exec "$@"'
            command = [*STANDBYCTL, "local", "start", node, "--dir", str(cluster.directory)]
            subprocess.run(["sh", "-c", start, groups[node].procs, *command], check=True, timeout=60)
        try:
            _wait_in_sync(cluster)
            yield Limited(cluster, groups)
        finally:
            cluster.destroy()  # before the groups go


def _wait_in_sync(cluster: LocalCluster) -> None:
    wait_until(lambda: cluster.run("status").code == 0, "the cluster is in sync", timeout_s=90)


class Writer(threading.Thread):
    def __init__(self, port: int, number: int) -> None:
        super().__init__()
        self._client = RawClient(port, timeout_s=60).go("huge")
        self._offset = number * TIB // 2 + number * WRITE_SIZE  # all over the volume
        self.payload = bytes([number + 1]) * WRITE_SIZE
        self.failure: Exception | None = None

    @property
    def offset(self) -> int:
        return self._offset

    def run(self) -> None:
        try:
            for _ in range(2):
                assert self._client.ask(c.Command.WRITE, self._offset, WRITE_SIZE, payload=self.payload) == 0
            assert self._client.ask(c.Command.FLUSH) == 0
        except Exception as error:  # noqa: BLE001 - whatever it was, the test tells
            self.failure = error
        finally:
            self._client.socket.close()


def test_no_node_needs_more_than_256_mb(limited: Limited) -> None:
    cluster, env = limited.cluster, limited.env
    port = limited.port("primary")
    with RawClient(port) as client:
        client.go("huge")
        assert client.ask(c.Command.WRITE, 0, WRITE_SIZE, payload=b"\xee" * WRITE_SIZE) == 0
    cluster.cli("snapshot", "create", "huge", "--name", "s1")

    with RawClient(limited.port("standby")) as reader:
        reader.go("huge@s1")
        reader.send(codec.Request(0, c.Command.READ, 1, 0, 8 * MIB).encode() * 64)
        began, taken = time.monotonic(), 0
        writers = [Writer(port, number) for number in range(WRITER_COUNT)]
        for writer in writers:
            writer.start()
        time.sleep(0.5)
        os.kill(env["standby"]["pid"], signal.SIGSTOP)
        try:
            for writer in writers:
                while writer.is_alive():
                    if time.monotonic() - began > taken / 1024:  # 1 KiB a second
                        taken += len(reader.socket.recv(1024))
                    writer.join(timeout=0.2)
        finally:
            os.kill(env["standby"]["pid"], signal.SIGCONT)
        assert [writer.failure for writer in writers] == [None] * WRITER_COUNT
        _wait_in_sync(cluster)

    with RawClient(port) as client:
        client.go("huge")
        for writer in writers:
            cookie = client.request(c.Command.READ, writer.offset + WRITE_SIZE - 4096, 4096)
            assert client.reply() == (cookie, 0, writer.payload[-4096:])
    with RawClient(limited.port("standby")) as client:
        client.go("huge@s1")
        cookie = client.request(c.Command.READ, 4096, 4096)
        assert client.reply() == (cookie, 0, b"\xee" * 4096)  # as it was: writer 0 has overwritten it since

    now = cluster.env
    for node, group in limited.groups.items():
        print(f"{node}: at most {group.peak_bytes / MIB:.0f} MiB, page cache included")
        assert group.oom_kill_count == 0, node
        assert now[node]["pid"] == env[node]["pid"], f"the {node} was killed"
    assert now["standby"]["export_pid"] == env["standby"]["export_pid"]
