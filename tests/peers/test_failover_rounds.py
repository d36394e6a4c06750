"""Round after round: a node is killed or frozen at a random moment under load, its place is taken, it comes back.

Every acknowledged write has to be there after each round, both copies equal before anything says in sync. Rounds:
STILLPOINT_FAILOVER_ROUNDS (2); a seed to repeat: STILLPOINT_SEED.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.peers.test_failover import SIZE, Writer, assert_same_disk, in_sync, read, roles, until, uri
from tests.support.cluster import LocalCluster
from tests.support.requirements import requires_tools

ROUNDS = int(os.environ.get("STILLPOINT_FAILOVER_ROUNDS", "2"))
SEED = int(os.environ.get("STILLPOINT_SEED", "0")) or random.SystemRandom().getrandbits(32)

pytestmark = [requires_tools("nbdcopy", "qemu-io"), pytest.mark.timeout(120 + 90 * ROUNDS)]


def image_of(cluster: LocalCluster, node: str) -> bytes:
    """What clients of that node read."""
    return read(cluster, node)


class Truth:
    """What the volume has to hold: what was acknowledged, and what may or may not have happened."""

    def __init__(self) -> None:
        self.blocks: dict[int, list[bytes]] = {}

    def learn(self, writer: Writer) -> None:
        for block, content in writer.acknowledged.items():
            self.blocks[block] = [content]
        for block, contents in writer.unsure.items():
            self.blocks.setdefault(block, [bytes(4096)]).extend(contents)

    def check(self, image: bytes) -> None:
        for block, allowed in self.blocks.items():
            found = image[block * 4096 : (block + 1) * 4096]
            assert found in allowed, f"block {block} lost its write"
            self.blocks[block] = [found]  # what was unsure is known now


def test_no_acknowledged_write_is_lost_in_any_round(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    truth = Truth()
    counts: dict[str, int] = {}
    with LocalCluster.up(tmp_path / "cluster", f"vol:{SIZE}") as cluster:
        server = "primary"
        for number in range(ROUNDS):
            other = "standby" if server == "primary" else "primary"
            victim = rng.choice((server, server, other))
            way = rng.choice(("kill", "kill", "freeze"))
            event = f"{way} the {'server' if victim == server else 'standby'}"
            counts[event] = counts.get(event, 0) + 1
            writer = Writer(uri(cluster, server), seed=rng.getrandbits(32)).start()
            writer.wait_for(rng.randrange(20, 400))
            pid = cluster.env[victim]["pid"]
            if way == "kill":
                cluster.kill(victim)
            else:
                os.kill(pid, signal.SIGSTOP)
            if victim == server:
                time.sleep(rng.random())
                cluster.cli("promote", "vol")
                server = other
            else:
                writer.wait_for(writer.count + 50)  # it goes on alone
            if way == "freeze":
                os.kill(pid, signal.SIGCONT)
            writer.stop()
            truth.learn(writer)
            truth.check(image_of(cluster, server))
            if way == "kill":
                cluster.start(victim)
            until(lambda: in_sync(cluster), cluster, timeout_s=60)
            other = "standby" if server == "primary" else "primary"
            assert roles(cluster) == {server: "primary", other: "standby"}, f"round {number}: {event}"
            assert_same_disk(cluster, server)
            if rng.random() < 0.5:
                cluster.cli("switchover", "vol")
                server = other
                until(lambda: in_sync(cluster), cluster, timeout_s=60)
                truth.check(image_of(cluster, server))
        print(f"{ROUNDS} rounds, {len(truth.blocks)} blocks: " + ", ".join(f"{k}: {v}" for k, v in counts.items()))
