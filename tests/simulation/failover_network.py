"""What the simulated failover happens on: an event queue, links that lose and delay, an etcd, nodes with clocks."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from uuid import UUID

from stillpoint.replica import Fence, ReplicaState, transitions

Entry = tuple[int, int]  # a write and the epoch that made it
TIMES = {"ttl_s": 3.0, "keepalive_s": 0.6, "timeout_s": 0.5, "margin_s": 0.6, "kill_after_s": 0.3}
TICK_S = 0.15
LOST_AFTER_S = 0.8


class Violation(AssertionError):
    """The rules let something happen that must not."""


@dataclass(eq=False)
class Session:
    """A primary's end of a link; the other end is a fence and a length."""

    fence: Fence
    resynced: int  # how much of the log has to be acknowledged before the resync has finished
    acked: int = 0
    heard_s: float = 0.0
    arrives_s: float = 0.0  # of the last frame: a stream keeps its order
    broken: bool = False  # a frame was lost, so none after it arrives


@dataclass(eq=False)
class Pending:
    write: int
    position: int
    since_s: float


class Network:
    """Time and the links. Which way the messages between two ends are cut is in `cut`."""

    def __init__(self, failover: ModuleType, seed: int) -> None:
        self.lease, self.member, self.in_sync_set = failover.lease, failover.member, failover.in_sync_set
        self.random = random.Random(seed)
        self.now = 0.0
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.log: list[str] = []
        self.count = 0
        self.cut: set[tuple[str, str]] = set()
        # With power losses, nothing is answered before it is durable on each: the mode that promises to outlive them.
        self.power_losses = self.random.random() < 0.4
        self.trouble_s = self.random.choice((1.0, 2.0, 4.0))
        self.slow = self.random.choice((0.01, 0.1, 0.5))
        self.loss = self.random.choice((0.0, 0.02, 0.2))
        self.stray = self.random.choice((0.0, 0.02))

    def note(self, text: str) -> None:
        self.log.append(f"{self.now:7.3f} {text}")

    def step(self) -> None:
        self.now, _, event = heapq.heappop(self.queue)
        event()

    def at(self, delay_s: float, event: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.queue, (self.now + delay_s, self.count, event))

    def loses(self, source: str, target: str) -> bool:
        return (source, target) in self.cut or self.random.random() < self.loss

    def send(
        self, source: str, target: str, event: Callable[[], None], *, at_least_s: float = 0.0, sure: bool = False
    ) -> float:
        """May be lost unless it is sure, and takes any time; returns when it arrives, not before `at_least_s`."""
        arrives_s = max(self.now + self.random.expovariate(1 / self.slow) + 0.001, at_least_s)
        if self.random.random() < self.stray:
            arrives_s += self.random.uniform(0, 6)
        if not sure and self.loses(source, target):
            return arrives_s
        self.at(arrives_s - self.now, event)
        return arrives_s

    def to_node(
        self, source: str, node: Node, event: Callable[[], None], *, at_least_s: float = 0.0, sure: bool = False
    ) -> float:
        """Like `send`, to this life of the node; a frozen one finds it when it thaws."""
        life = node.life

        def arrive() -> None:
            if node.up and node.life == life:
                if node.runs:
                    event()
                else:
                    self.at(node.frozen_until - self.now, arrive)

        return self.send(source, node.name, arrive, at_least_s=at_least_s, sure=sure)

    def call_etcd(
        self, node: Node, handle: Callable[[], Any], answered: Callable[[Any], None], failed: Callable[[], None]
    ) -> None:
        """A request that is answered once, or given up after the timeout; it may then still arrive."""
        done = [False]
        life = node.life

        def finish(how: Callable[[], None]) -> None:
            if not done[0]:
                done[0] = True
                if node.life == life and node.up:
                    how()

        def arrive() -> None:
            result = handle()
            self.to_node("etcd", node, lambda: finish(lambda: answered(result)))

        self.send(node.name, "etcd", arrive)

        def timeout() -> None:
            if node.life == life and not node.runs:
                self.at(max(node.frozen_until - self.now, 0.01), timeout)
            else:
                finish(failed)

        self.at(TIMES["timeout_s"] / node.rate, timeout)


class Etcd:
    """One key-value store with leases, as linearizable as the real one."""

    def __init__(self, world: Network, changed: Callable[[], None]) -> None:
        """changed: after a transaction that was done."""
        self.world = world
        self.changed = changed
        self.set = world.in_sync_set
        self.observed = self.set.Observed()
        self.revision = 1
        self.leases: dict[int, float] = {}
        self.lease_count = 0

    def expire(self) -> None:
        for lease, ends_s in list(self.leases.items()):
            if ends_s <= self.world.now:
                del self.leases[lease]
        leader = self.observed.leader
        if leader is not None and leader.lease not in self.leases:
            self.world.note(f"etcd: the lease of {leader.node} ended")
            self.observed = self._with(leader=None, leader_created=0)

    def _with(self, **changes: Any) -> Any:
        fields = {name: getattr(self.observed, name) for name in self.observed.__slots__}
        return self.set.Observed(**(fields | changes))

    def keep(self, lease: int) -> int:
        """Keep the lease alive; 0: grant a new one. Returns its id, 0 if it is gone."""
        self.expire()
        if lease == 0:
            self.lease_count += 1
            lease = self.lease_count
        elif lease not in self.leases:
            return 0
        self.leases[lease] = self.world.now + TIMES["ttl_s"]
        return lease

    def handle(self, request: Any) -> Any:
        self.expire()
        if isinstance(request, self.set.Transaction) and self._applies(request):
            self.revision += 1
            if request.leader is not None:
                self.observed = self._with(leader=request.leader, leader_created=self.revision)
            if request.members is not None:
                self.observed = self._with(members=request.members, members_modified=self.revision)
            if request.resigns:
                self.observed = self._with(leader=None, leader_created=0)
            self.world.note(f"etcd: {request}")
            self.changed()
        return self.observed

    def _applies(self, request: Any) -> bool:
        seen = self.observed
        if request.leader is not None and request.leader.lease not in self.leases:
            return False
        same = request.leader_created == seen.leader_created
        same = same and request.members_modified in (None, seen.members_modified)  # None: a fault
        return same and not (request.unless_paused and seen.paused)


class Node:
    def __init__(self, world: Network, index: int) -> None:
        self.world = world
        self.index = index
        self.name = f"n{index}"
        self.uuid = UUID(int=0xA0 + index)
        self.rate = 1 + world.random.uniform(-0.1, 0.1)
        self.zero_s = world.random.uniform(0, 1000)
        self.up = True
        self.frozen_until = 0.0
        self.log: list[Entry] = []
        self.durable: list[Entry] = []
        self.whole = index == 0
        self.state: ReplicaState = transitions.created_standby(
            volume=UUID(int=1), node=self.uuid, name=self.name, size=4096, blank=True
        )
        self.life = 0
        self.begin()

    def begin(self) -> None:
        """A start of both processes: only what is durable is left."""
        self.life += 1
        self.lease = self.world.lease.Lease(self.world.lease.LeaseTimes(**TIMES))
        copy = self.world.member.CopyState(
            promotable=self.whole, epoch=max(self.state.fence.epoch, 1), first=self.index == 0
        )
        self.member = self.world.member.Member(self.name, self.lease, copy, started_s=self.clock())
        self.sessions: dict[str, Session] = {}
        self.handshaking: dict[str, float] = {}
        self.pending: list[Pending] = []
        self.answered = len(self.log)  # the position of the last write that was, or may have been, answered

    def clock(self) -> float:
        return self.zero_s + self.world.now * self.rate

    @property
    def runs(self) -> bool:
        return self.up and self.world.now >= self.frozen_until

    @property
    def serves(self) -> bool:
        served: bool = self.member.may_serve(self.clock())
        return served and self.runs
