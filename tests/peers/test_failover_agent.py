"""Failover agents, as processes, beside data nodes without data, on a real etcd."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from stillpoint.failover.etcd import Etcd
from tests.support.etcd import EtcdServer, running_etcd
from tests.support.requirements import requires_tools

pytestmark = requires_tools("etcd")

TTL_S = 3.0
WHOLE = {"copy": {"promotable": True, "epoch": 1, "first": False}}
FIRST = {"copy": {"promotable": True, "epoch": 1, "first": True}}


class Machine:
    """An agent and its data node."""

    def __init__(self, folder: Path, name: str, server: EtcdServer, cluster: str, volume: UUID) -> None:
        self.name = name
        self.volume = volume
        self._socket = folder / f"{name}.sock"
        config = folder / f"{name}.yaml"
        config.write_text(
            f"{{node: {name}, socket: {self._socket}, etcd: ['{server.address}'], cluster: {cluster}, times: "
            f"{{ttl_s: {TTL_S}, keepalive_s: 0.5, timeout_s: 0.7, margin_s: 1, kill_after_s: 0.5}}}}"
        )
        self.agent = subprocess.Popen([sys.executable, "-m", "stillpoint.failover", "--config", str(config)])

    def wait_for_agent(self) -> None:
        give_up = time.monotonic() + 20
        while not self._socket.exists():
            assert self.agent.poll() is None and time.monotonic() < give_up
            time.sleep(0.02)

    def begin(self) -> None:
        """A life of the data node."""
        self.said: queue.Queue[dict[str, Any]] = queue.Queue()
        self.node = subprocess.Popen(
            [sys.executable, "-m", "tests.support.failover_node", str(self._socket), str(self.volume)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._listen, args=(self.node, self.said), daemon=True).start()

    def wait_for_node(self) -> None:
        self.until(lambda said: "here" in said)

    def _listen(self, node: subprocess.Popen[str], said: queue.Queue[dict[str, Any]]) -> None:
        assert node.stdout is not None
        with contextlib.suppress(ValueError):
            for line in node.stdout:
                said.put(json.loads(line))

    def tell(self, line: object) -> None:
        assert self.node.stdin is not None
        self.node.stdin.write(json.dumps(line) + "\n")
        self.node.stdin.flush()

    def until(self, fits: Callable[[dict[str, Any]], bool], *, timeout_s: float = 20) -> dict[str, Any]:
        give_up = time.monotonic() + timeout_s
        seen: list[dict[str, Any]] = []
        while True:
            try:
                said = self.said.get(timeout=max(give_up - time.monotonic(), 0.01))
            except queue.Empty:
                raise AssertionError(f"{self.name} said only {seen[-8:]}") from None
            seen.append(said)
            if fits(said):
                return said

    def until_part(self, part: str, **fields: object) -> dict[str, Any]:
        return self.until(
            lambda said: said.get("part") == part and all(said.get(name) == value for name, value in fields.items())
        )

    def is_serving(self) -> bool:
        self.tell("serving?")
        return bool(self.until(lambda said: "serving" in said)["serving"])

    def end(self) -> None:
        for process in (self.node, self.agent):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
        self.close()

    def close(self) -> None:
        for pipe in (self.node.stdin, self.node.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with running_etcd(tmp_path_factory.mktemp("etcd")) as running:
        yield running


def _started(
    machines: list[Machine], folder: Path, server: EtcdServer, cluster: str, volume: UUID
) -> tuple[Machine, Machine]:
    """Into `machines`, so that what was started is ended whatever happens."""
    machines.extend(Machine(folder, name, server, cluster, volume) for name in ("a", "b"))
    a, b = machines
    for step in (Machine.wait_for_agent, Machine.begin, Machine.wait_for_node):
        for machine in machines:
            step(machine)
    a.tell(FIRST)
    a.until_part("primary", epoch=1)
    b.tell(WHOLE)
    a.tell({"ready": "b"})
    a.until_part("primary", awaited=["b"])
    return a, b


@pytest.fixture
def pair(server: EtcdServer, tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    """A primary, and a standby in the set."""
    cluster, volume = f"test-{uuid4()}", uuid4()
    machines: list[Machine] = []
    try:
        a, b = _started(machines, tmp_path, server, cluster, volume)
        etcd = Etcd((server.address,), timeout_s=5)
        give_up = time.monotonic() + 10
        while True:
            members = etcd.read(f"/stillpoint/{cluster}", volume).members
            if members is not None and members.nodes == {"a", "b"}:
                break
            assert time.monotonic() < give_up
            time.sleep(0.05)
        etcd.close()
        # A standby that has just started promotes itself only after a pledge of a process before it would be over.
        time.sleep(max(0.0, TTL_S - 2))
        yield a, b
    finally:
        for machine in machines:
            machine.end()


def test_a_killed_primary_is_followed_by_the_standby_within_the_lease_and_three_seconds(
    pair: tuple[Machine, Machine],
) -> None:
    """Also when its agent dies with it, and nobody ends the lease early."""
    a, b = pair
    assert a.is_serving() and not b.is_serving()
    killed_s = time.monotonic()
    a.agent.kill()
    a.node.kill()
    b.until_part("primary", epoch=2, awaited=[])
    took_s = time.monotonic() - killed_s
    print(f"promoted after {took_s:.1f} s, lease {TTL_S:g} s")
    assert took_s < TTL_S + 3
    assert b.is_serving()


def test_a_data_node_that_dies_alone_is_followed_at_once_and_comes_back_as_a_standby(
    pair: tuple[Machine, Machine],
) -> None:
    a, b = pair
    a.node.kill()
    a.node.wait()
    a.close()
    b.until_part("primary", epoch=2)
    a.begin()
    a.wait_for_node()
    a.tell(WHOLE)
    a.until_part("standby")
    assert not a.is_serving()
    b.tell({"ready": "a"})
    b.until_part("primary", epoch=2, awaited=["a"])


def test_a_node_whose_data_path_hangs_loses_its_lease_and_is_killed_because_it_does_not_say_that_it_stopped(
    pair: tuple[Machine, Machine],
) -> None:
    a, b = pair
    a.tell("hang")
    assert a.node.wait(timeout=20) == -signal.SIGKILL
    b.until_part("primary", epoch=2)


def test_a_frozen_node_is_killed_before_anybody_follows_it(pair: tuple[Machine, Machine]) -> None:
    a, b = pair
    os.kill(a.node.pid, signal.SIGSTOP)
    b.until_part("primary", epoch=2)
    assert a.node.poll() == -signal.SIGKILL


def test_a_node_whose_agent_is_frozen_stops_by_itself(pair: tuple[Machine, Machine]) -> None:
    a, b = pair
    os.kill(a.agent.pid, signal.SIGSTOP)
    b.until_part("primary", epoch=2)
    assert not a.is_serving()
    os.kill(a.agent.pid, signal.SIGCONT)
    a.until_part("stopped")


def test_a_node_whose_agent_is_stopped_serves_to_its_deadline_and_is_not_followed_before(
    pair: tuple[Machine, Machine],
) -> None:
    a, b = pair
    a.agent.terminate()
    a.agent.wait()
    a.until(lambda said: "gone" in said)
    assert a.is_serving(), "the lease goes on"
    b.until_part("primary", epoch=2)
    assert not a.is_serving()


def test_a_primary_hands_over_to_the_member_it_names_at_once_and_to_nobody_else(
    pair: tuple[Machine, Machine],
) -> None:
    a, b = pair
    a.tell({"hand_over": "c"})
    assert a.until_part("primary")["left_s"] > 0
    assert a.is_serving()
    began_s = time.monotonic()
    a.tell({"hand_over": "b"})
    a.until_part("stopped")
    assert not a.is_serving()
    b.until_part("primary", epoch=2)
    took_s = time.monotonic() - began_s
    print(f"handed over in {took_s:.2f} s")
    assert took_s < TTL_S - 1, "nobody waited for a lease to end"
    assert a.node.poll() is None, "it said that it stopped"


def test_a_primary_goes_on_without_a_standby_only_when_etcd_has_removed_it(pair: tuple[Machine, Machine]) -> None:
    a, b = pair
    a.tell({"lost": "b"})
    a.until_part("primary", awaited=[])
    a.node.kill()
    a.node.wait()
    time.sleep(2)
    b.tell(WHOLE)
    with pytest.raises(AssertionError, match="said only"):
        b.until(lambda said: said.get("part") == "primary", timeout_s=3)


def test_without_etcd_a_primary_serves_as_long_as_every_member_pledges(tmp_path: Path) -> None:
    cluster, volume = "alone", uuid4()
    machines: list[Machine] = []
    with running_etcd(tmp_path / "etcd") as server:
        try:
            a, b = _started(machines, tmp_path, server, cluster, volume)
            time.sleep(1)
            server.kill()
            for _ in range(round(2 * TTL_S)):
                a.until(lambda said: said.get("pledges_of") == ["b"])
                b.tell({"pledge": 1})
                assert b.until(lambda said: "pledge" in said)["pledge"]
                a.tell({"pledged": "b"})
                time.sleep(0.3)
                assert a.is_serving()
            # Nobody pledges any more: it stops by itself.
            time.sleep(TTL_S)
            assert not a.is_serving()
            server.start()
            a.until(lambda said: said.get("part") == "primary" and said["left_s"] > 0)
        finally:
            for machine in machines:
                machine.end()
