"""Which node serves a volume changes: by failure, by hand, by mistake. Real processes, real clients, no write lost."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillpoint.nbd.client import NbdClient
from tests.support.cluster import LocalCluster
from tests.support.requirements import requires_tools

MIB = 1 << 20
BLOCK = 4096
SIZE = 32 * MIB
BLOCKS = SIZE // BLOCK

pytestmark = [requires_tools("nbdcopy", "qemu-io"), pytest.mark.timeout(240)]


@pytest.fixture(params=["tcp"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster.up(tmp_path / "cluster", f"vol:{SIZE}", carrier=request.param) as cluster:
        yield cluster


def uri(cluster: LocalCluster, node: str) -> str:
    env = cluster.env
    return f"{env['primary']['nbd'] if node == 'primary' else env['standby']['volume_nbd']}/vol"


class Writer:
    """Writes numbered blocks, several at once, until the volume goes away; knows what was acknowledged.

    A block that was sent and not acknowledged may hold either content afterwards.
    """

    def __init__(self, uri: str, *, seed: int) -> None:
        self.acknowledged: dict[int, bytes] = {}
        self.unsure: dict[int, list[bytes]] = {}
        self.count = 0
        self._uri = uri
        self._seed = seed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def start(self) -> Writer:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Returns when it has stopped, by itself or because of this."""
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 30
        while self.count < count and self._thread.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    async def _run(self) -> None:
        rng = random.Random(self._seed)
        async with await NbdClient.connect(self._uri) as client:
            await asyncio.gather(*(self._lane(client, rng, lane) for lane in range(8)), return_exceptions=True)

    async def _lane(self, client: NbdClient, rng: random.Random, lane: int) -> None:
        """Each lane has blocks of its own, so the last write of a block is known."""
        while not self._stop.is_set():
            block = rng.randrange(BLOCKS // 8) * 8 + lane
            content = rng.randbytes(16) * (BLOCK // 16)
            self.unsure.setdefault(block, []).append(content)
            await client.write(block * BLOCK, content)
            self.acknowledged[block] = content
            del self.unsure[block]
            self.count += 1

    def check(self, image: bytes) -> None:
        """Every acknowledged write is in the image, unless its block was written to again without an answer."""
        for block, content in self.acknowledged.items():
            found = image[block * BLOCK : (block + 1) * BLOCK]
            assert found == content or found in self.unsure.get(block, ()), f"block {block} lost its write"


def read(cluster: LocalCluster, node: str) -> bytes:
    return subprocess.run(["nbdcopy", uri(cluster, node), "-"], check=True, capture_output=True, timeout=60).stdout


def run_io(cluster: LocalCluster, node: str, *commands: str) -> subprocess.CompletedProcess[str]:
    arguments = [part for command in commands for part in ("-c", command)]
    return subprocess.run(
        ["qemu-io", "-f", "raw", *arguments, uri(cluster, node)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def volume(cluster: LocalCluster) -> dict[str, Any]:
    shown: dict[str, Any] = cluster.cli("volume", "show", "vol")
    return shown


def roles(cluster: LocalCluster) -> dict[str, str]:
    return {copy["node"]: copy["role"] for copy in cluster.cli("status")["replicas"] if copy["volume"] == "vol"}


def until(condition: Callable[[], bool], cluster: LocalCluster, *, timeout_s: float = 40) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{cluster.run('status').stdout}{cluster.log_tails(30)}"
        time.sleep(0.1)


def in_sync(cluster: LocalCluster) -> bool:
    result = cluster.run("--json", "volume", "show", "vol")
    return result.code == 0 and result.document["pair"]["state"] == "in_sync"


def assert_same_disk(cluster: LocalCluster, node: str) -> None:
    """node: the one that serves."""
    assert run_io(cluster, node, "flush").returncode == 0
    paths = cluster.env["volumes"]["vol"]
    subprocess.run(["cmp", paths["primary_path"], paths["mirror_path"]], check=True, timeout=60)


def received(cluster: LocalCluster) -> int:
    """Bytes that the node which was primary first has taken over data links."""
    total: int = sum(mirror.get("received_bytes", 0) for mirror in cluster.cli("status")["mirrors"])
    return total


def test_a_killed_primary_is_replaced_without_losing_a_write_and_comes_back_as_standby(pair: LocalCluster) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    run_io(pair, "primary", "write -P 7 0 8M", "flush")
    pair.cli("snapshot", "create", "vol", "--name", "before")
    writer = Writer(uri(pair, "primary"), seed=seed).start()
    writer.wait_for(300)
    pair.kill("primary")
    writer.stop()
    assert len(writer.acknowledged) > 100

    promoted = pair.cli("promote", "vol")
    assert promoted["node"] == "standby" and promoted["role"] == "primary" and promoted["epoch"] == 2
    image = read(pair, "standby")
    writer.check(image)

    # Clients go on; the snapshot stays what it was, though the volume under it is written to.
    again = Writer(uri(pair, "standby"), seed=seed + 1).start()
    again.wait_for(300)
    again.stop()
    again.check(read(pair, "standby"))
    env = pair.env
    snapshot = subprocess.run(
        ["nbdcopy", f"{env['standby']['nbd']}/vol@before", "-"], check=True, capture_output=True, timeout=60
    ).stdout
    assert snapshot == b"\x07" * (8 * MIB) + bytes(SIZE - 8 * MIB)

    # The old primary finds out by itself, never serves its older copy, and is sent what differs.
    pair.start("primary")
    until(lambda: in_sync(pair), pair)
    assert roles(pair) == {"primary": "standby", "standby": "primary"}
    assert "vol" in run_io(pair, "primary", "read 0 4k").stderr
    assert_same_disk(pair, "standby")

    pair.cli("switchover", "vol")
    until(lambda: in_sync(pair), pair)
    assert roles(pair) == {"primary": "primary", "standby": "standby"}
    again.check(read(pair, "primary"))
    assert_same_disk(pair, "primary")
    assert pair.run("status").code == 0


def test_only_what_differs_travels_when_the_old_primary_comes_back(pair: LocalCluster) -> None:
    run_io(pair, "primary", "write -P 1 0 24M", "flush")
    pair.kill("primary")
    pair.cli("promote", "vol")
    run_io(pair, "standby", "write -P 2 4M 1M", "write -z 9M 1M", "discard 12M 1M", "flush")
    pair.start("primary")
    until(lambda: in_sync(pair), pair)
    shown = volume(pair)["pair"]
    assert shown["resync_total_bytes"] <= 4.5 * MIB
    assert_same_disk(pair, "standby")


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_switchover_under_load_loses_nothing(pair: LocalCluster, mode: str) -> None:
    pair.cli("volume", "set", "vol", "--mode", mode)
    writer = Writer(uri(pair, "primary"), seed=5).start()
    writer.wait_for(200)
    pair.cli("switchover", "vol")
    writer.stop()
    writer.check(read(pair, "standby"))
    until(lambda: in_sync(pair), pair)
    assert_same_disk(pair, "standby")
    assert volume(pair)["mode"] == mode


def test_a_primary_that_lives_is_never_taken_over_without_force(pair: LocalCluster) -> None:
    refused = pair.run("promote", "vol")
    assert refused.code == 1 and "switchover vol" in refused.error
    assert roles(pair) == {"primary": "primary", "standby": "standby"}
    assert run_io(pair, "primary", "write -P 9 0 1M", "flush").returncode == 0


def test_a_frozen_primary_that_wakes_acknowledges_nothing_more_and_follows(pair: LocalCluster) -> None:
    writer = Writer(uri(pair, "primary"), seed=6).start()
    writer.wait_for(200)
    pid = pair.env["primary"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(0.5)
        frozen_at = writer.count
        pair.cli("promote", "vol")
        assert run_io(pair, "standby", "write -P 3 30M 1M", "flush").returncode == 0
    finally:
        os.kill(pid, signal.SIGCONT)
    writer.stop()
    assert writer.count <= frozen_at + 8  # answers that were on their way
    until(lambda: in_sync(pair), pair)
    assert roles(pair) == {"primary": "standby", "standby": "primary"}
    assert_same_disk(pair, "standby")


def test_two_primaries_are_a_split_brain_until_it_is_resolved_and_the_loser_stays_readable(pair: LocalCluster) -> None:
    run_io(pair, "primary", "write -P 1 0 4M", "flush")
    # Each node is stopped while the other one serves, as if the network between them were cut.
    primary, standby = pair.env["primary"]["pid"], pair.env["standby"]["pid"]
    os.kill(primary, signal.SIGSTOP)
    pair.cli("promote", "vol")
    assert run_io(pair, "standby", "write -P 2 1M 1M", "flush").returncode == 0
    os.kill(standby, signal.SIGSTOP)
    os.kill(primary, signal.SIGCONT)
    assert run_io(pair, "primary", "write -P 3 2M 1M", "flush").returncode == 0
    os.kill(standby, signal.SIGCONT)

    def both_say_so() -> bool:
        status = pair.run("--json", "status")
        return [volume["pair"]["state"] for volume in status.document["volumes"]] == ["split_brain"] * 2

    until(both_say_so, pair)
    assert "SPLIT BRAIN" in pair.run("status").stdout
    # Nothing is discarded meanwhile: each goes on with its own.
    assert "Pattern verification failed" not in run_io(pair, "primary", "read -P 3 2M 1M").stdout
    assert "Pattern verification failed" not in run_io(pair, "standby", "read -P 2 1M 1M").stdout

    resolved = pair.cli("resolve", "vol", "--keep", "standby")
    until(lambda: in_sync(pair), pair)
    assert roles(pair) == {"primary": "standby", "standby": "primary"}
    assert_same_disk(pair, "standby")
    image = read(pair, "standby")
    assert image[: 4 * MIB] == b"\x01" * MIB + b"\x02" * MIB + b"\x01" * (2 * MIB)
    (kept,) = resolved["snapshots"]
    loser = pair.cli("snapshot", "show", kept)
    assert loser["protected"]
    lost = subprocess.run(["nbdcopy", loser["uri"], "-"], check=True, capture_output=True, timeout=60).stdout
    assert lost[: 4 * MIB] == b"\x01" * (2 * MIB) + b"\x03" * MIB + b"\x01" * MIB


def test_resolving_what_is_not_split_is_refused(pair: LocalCluster) -> None:
    refused = pair.run("resolve", "vol", "--keep", "standby")
    assert refused.code == 1 and "not split" in refused.error


def test_a_copy_in_the_middle_of_a_resync_is_refused_and_its_state_before_is_offered(pair: LocalCluster) -> None:
    run_io(pair, "primary", "write -P 1 0 32M", "flush")
    pair.kill("standby")
    run_io(pair, "primary", "write -P 2 0 32M", "flush")
    pair.cli("volume", "set", "vol", "--resync-rate", "1MiB")
    pair.start("standby")
    until(lambda: bool(pair.cli("snapshot", "list", "vol")), pair)  # taken before the first byte of the resync
    pair.kill("primary")
    refused = pair.run("promote", "vol")
    assert refused.code == 1 and "not whole" in refused.error and "--snapshot before-resync-" in refused.error
    assert pair.run("promote", "vol", "--force").code == 1
    pair.cli("promote", "vol", "--snapshot", refused.error.rpartition(" ")[2])
    assert read(pair, "standby") == b"\x01" * SIZE


def test_a_volume_that_grew_on_the_other_node_comes_back_whole(pair: LocalCluster) -> None:
    pair.cli("switchover", "vol")
    until(lambda: in_sync(pair), pair)
    pair.cli("volume", "resize", "vol", "--size", "48MiB")
    assert run_io(pair, "standby", "write -P 6 40M 1M", "flush").returncode == 0
    pair.cli("switchover", "vol")
    until(lambda: in_sync(pair), pair)
    assert volume(pair)["size"] == 48 * MIB
    assert "failed" not in run_io(pair, "primary", "read -P 6 40M 1M").stdout
    assert_same_disk(pair, "primary")


def test_a_standby_that_was_replaced_gets_everything_when_it_is_told_to(pair: LocalCluster) -> None:
    run_io(pair, "primary", "write -P 5 0 8M", "flush")
    pair.kill("standby")
    shutil.rmtree(pair.directory / "standby")
    pair.start("standby")
    until(lambda: "holds no copy" in pair.run("status").stdout, pair)
    pair.cli("mirror", "resync", "vol")
    until(lambda: in_sync(pair), pair)
    assert_same_disk(pair, "primary")


def test_both_nodes_restarted_keep_their_roles(pair: LocalCluster) -> None:
    pair.cli("switchover", "vol")
    until(lambda: in_sync(pair), pair)
    run_io(pair, "standby", "write -P 4 0 1M", "flush")
    pair.kill("primary")
    pair.kill("standby")
    pair.start("primary")
    pair.start("standby")
    until(lambda: in_sync(pair), pair)
    assert roles(pair) == {"primary": "standby", "standby": "primary"}
    assert "failed" not in run_io(pair, "standby", "read -P 4 0 1M").stdout
    assert_same_disk(pair, "standby")
