"""Nodes, etcd, links and disks in one event queue, running the real decisions of stillpoint.failover, with fences kept
by stillpoint.replica. Time, loss, delay and crashes follow from the seed.

Each node has its own clock (another zero, up to 10 % fast or slow), an agent and a data node. A copy is the list of the
writes it holds, each with the epoch that made it. Messages are lost, late, and in any order but within one session.

What must hold, always
- Every node of the in-sync set, as etcd has it, holds every acknowledged write; after a power loss, too.
- No write of an older epoch is applied on top of a newer one.
- A read that is answered shows every write that was acknowledged before it was asked.
And once all is well again: one node serves, all are in the set, and all copies are equal.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from stillpoint.errors import FencedError, Refused
from stillpoint.replica import Fence, transitions

from .failover_network import LOST_AFTER_S, TICK_S, TIMES, Entry, Etcd, Network, Node, Pending, Session, Violation

__all__ = ["Violation", "World"]


class World(Network):
    def __init__(self, failover: ModuleType, seed: int, *, seconds: float = 40.0) -> None:
        super().__init__(failover, seed)
        self.seconds = seconds
        self.acknowledged: set[int] = set()
        self.reads = 0
        self.promotions = 0
        self.calm = False
        self.etcd = Etcd(self, self.check_copies)
        self.nodes = [Node(self, index) for index in range(self.random.choice((2, 2, 3)))]

    def run(self) -> None:
        for node in self.nodes:
            self.at(self.random.random() * TICK_S, functools.partial(self.tick, node))
        self.at(0.1, self.client)
        self.at(6.0, self.trouble)
        while self.queue and self.now < self.seconds:
            self.step()
        self.mend()
        while self.queue and self.now < self.seconds + 20:
            self.step()
            if self.now > self.seconds + 3 and self.is_well():
                return
        raise Violation(
            f"not well in the end: {self.etcd.observed}, {[(n.name, n.member.part, n.log) for n in self.nodes]}"
        )

    # --- the agent, and the data node's side of it

    def tick(self, node: Node) -> None:
        self.at(TICK_S, lambda: self.tick(node))
        if not node.runs:
            return
        now_s = node.clock()
        node.member.copy.promotable = node.whole
        node.member.copy.epoch = max(node.state.fence.epoch, 1)
        self.keep_lease(node, now_s)
        request = node.member.next_request(now_s)
        if request is not None:
            was = node.member.part
            self.call_etcd(
                node,
                lambda: self.etcd.handle(request),
                lambda seen: self.answered(node, was, seen),
                node.member.unanswered,
            )
        for peer in self.nodes:
            if peer.name in node.member.pledges_wanted(now_s):
                self.ask_pledge(node, peer, now_s)
        if node.member.part.name == "STOPPED":
            self.restart(node, "stops")
        elif node.member.part.name == "PRIMARY":
            self.lead(node)

    def keep_lease(self, node: Node, now_s: float) -> None:
        if not node.lease.due(now_s):
            return
        node.lease.sent(now_s)
        asked = node.lease.id

        def answered(lease: int) -> None:
            if lease:
                node.lease.granted(lease, sent_s=now_s, ttl_s=TIMES["ttl_s"])
            else:
                node.lease.lost()

        self.call_etcd(node, lambda: self.etcd.keep(asked), answered, lambda: None)

    def answered(self, node: Node, was: Any, observed: Any) -> None:
        node.member.answered(observed)
        if node.member.part.name == "PRIMARY" and was.name == "STANDBY":
            self.note(f"{node.name} is primary of epoch {node.member.epoch}")
            self.promotions += 1
            node.answered = len(node.log)
            node.state = transitions.fence_raised(node.state, Fence(node.member.epoch, node.state.fence.session + 1))

    def ask_pledge(self, node: Node, peer: Node, now_s: float) -> None:
        epoch = node.member.epoch

        def asked() -> None:
            if peer.member.pledge(peer.clock(), epoch=epoch):
                self.to_node(peer.name, node, lambda: node.member.pledged(peer.name, sent_s=now_s))

        self.to_node(node.name, peer, asked)

    # --- the data path

    def lead(self, node: Node) -> None:
        """What a primary does beside serving: notice who is away, and bring them back."""
        for peer in self.nodes:
            if peer is node:
                continue
            session = node.sessions.get(peer.name)
            silent_s = self.now - session.heard_s if session else LOST_AFTER_S + 1
            if session and silent_s > LOST_AFTER_S and session.acked < len(node.log):
                del node.sessions[peer.name]
                session = None
            if session is None:
                node.member.lost(peer.name)
                if node.serves and node.handshaking.get(peer.name, 0) < self.now:
                    node.handshaking[peer.name] = self.now + LOST_AFTER_S
                    self.handshake(node, peer)
            else:
                resynced = session.acked >= session.resynced
                node.member.ready(
                    peer.name,
                    self.member.Readiness(
                        fenced=True, resynced=resynced, live=True, caught_up=session.acked >= node.answered
                    ),
                )
        self.acknowledge(node)

    def handshake(self, node: Node, peer: Node) -> None:
        epoch, known = node.member.epoch, node.state.fence.session

        def offered() -> None:
            fence = Fence(epoch, transitions.next_session(peer.state, known))
            try:
                if peer.member.part.name != "STANDBY":
                    raise Refused("it is primary")
                peer.state = transitions.fence_raised(peer.state, fence)
            except FencedError:
                self.to_node(peer.name, node, node.member.stop)
            except Refused:
                return
            else:
                self.to_node(peer.name, node, lambda: self.attach(node, peer, fence))

        self.to_node(node.name, peer, offered)

    def attach(self, node: Node, peer: Node, fence: Fence) -> None:
        if node.member.part.name != "PRIMARY" or peer.name in node.sessions:
            return
        session = node.sessions[peer.name] = Session(fence, len(node.log), heard_s=self.now)
        copy = list(node.log)
        self.stream(node, peer, session, lambda: self.resync(node, peer, session, copy))

    def stream(self, node: Node, peer: Node, session: Session, event: Callable[[], None]) -> None:
        session.broken = session.broken or self.loses(node.name, peer.name)
        if not session.broken:
            session.arrives_s = self.to_node(node.name, peer, event, at_least_s=session.arrives_s + 1e-6, sure=True)

    def resync(self, node: Node, peer: Node, session: Session, copy: list[Entry]) -> None:
        if peer.state.fence == session.fence and peer.member.part.name == "STANDBY":
            peer.log, peer.durable, peer.whole = copy, list(copy), True
            self.check_copies()
            self.acked(node, peer, session, len(copy))

    def apply(self, node: Node, peer: Node, session: Session, position: int, entry: Entry) -> None:
        if peer.state.fence != session.fence or len(peer.log) != position - 1:
            return
        if peer.log and peer.log[-1][1] > entry[1]:
            raise Violation(f"{peer.name} applies {entry} on top of {peer.log[-1]}")
        peer.log.append(entry)
        if self.power_losses:
            peer.durable = list(peer.log)
        self.acked(node, peer, session, position)

    def acked(self, node: Node, peer: Node, session: Session, position: int) -> None:
        def arrived() -> None:
            session.acked, session.heard_s = max(session.acked, position), self.now
            self.acknowledge(node)

        self.to_node(peer.name, node, arrived)

    def acknowledge(self, node: Node) -> None:
        """Worst case: the lease is not asked again here, as if the node had paused between the check and the answer."""
        while node.pending and node.member.part.name == "PRIMARY":
            request = node.pending[0]
            for peer in node.member.awaited:
                session = node.sessions.get(peer)
                if session is None or session.acked < request.position:
                    return
            node.pending.pop(0)
            node.answered = request.position
            if self.power_losses:
                node.durable = node.log[: max(request.position, len(node.durable))]
            self.acknowledged.add(request.write)
            self.check_copies()

    # --- clients

    def client(self) -> None:
        if not self.calm:
            self.at(self.random.expovariate(1 / 0.1), self.client)
        node = self.random.choice(self.nodes)
        if not node.serves:
            return
        if self.random.random() < 0.5:
            self.read(node)
        elif len(node.pending) < 6:
            self.write(node)

    def read(self, node: Node) -> None:
        """Whatever was acknowledged before it was asked has to be in what is there when the lease is looked at."""
        self.reads += 1
        missing = self.acknowledged - {write for write, _ in node.log}
        if missing:
            raise Violation(f"{node.name} answers a read without {missing}")

    def write(self, node: Node) -> None:
        self.count += 1
        entry = (self.count, node.member.epoch)
        node.log.append(entry)
        position = len(node.log)
        node.pending.append(Pending(entry[0], position, self.now))
        for peer in self.nodes:
            session = node.sessions.get(peer.name)
            if session is not None:
                self.stream(
                    node,
                    peer,
                    session,
                    lambda peer=peer, session=session: self.apply(node, peer, session, position, entry),  # type: ignore[misc]
                )
        self.acknowledge(node)

    # --- trouble

    def trouble(self) -> None:
        if self.calm:
            return
        self.at(self.random.expovariate(1 / self.trouble_s), self.trouble)
        node = self.random.choice(self.nodes)
        match self.random.randrange(11):
            case 0:
                self.crash(node)
            case 1 | 2:
                node.frozen_until = self.now + self.random.choice((0.5, 2.0, 6.0))
                self.note(f"{node.name} freezes for {node.frozen_until - self.now:.1f} s")
            case 3 | 4:
                ends = [
                    self.random.choice([*(peer.name for peer in self.nodes if peer is not node), "etcd"]),
                    node.name,
                ]
                self.random.shuffle(ends)
                pairs = {(ends[0], ends[1]), (ends[1], ends[0])} if self.random.random() < 0.5 else {(ends[0], ends[1])}
                self.cut |= pairs
                self.note(f"cut {sorted(pairs)}")
                self.at(self.random.choice((1.0, 4.0, 9.0)), lambda: self.heal(pairs))
            case 5:
                pairs = {pair for peer in self.nodes for pair in ((peer.name, "etcd"), ("etcd", peer.name))}
                self.cut |= pairs
                self.note("etcd is away")
                self.at(self.random.choice((1.0, 5.0, 9.0)), lambda: self.heal(pairs))
            case 6 | 7:
                others = ["etcd", *(peer.name for peer in self.nodes if peer is not node)]
                pairs = {pair for other in others for pair in ((node.name, other), (other, node.name))}
                self.cut |= pairs
                self.note(f"{node.name} is cut off from everybody but its clients")
                self.at(self.random.choice((1.0, 5.0, 9.0)), lambda: self.heal(pairs))
            case 8 | 9:
                with contextlib.suppress(Refused):
                    node.member.hand_over(self.random.choice(self.nodes).name)
                    self.note(f"{node.name} hands over to {node.member._hands_to}")
            case 10:
                self.slow = self.random.choice((0.01, 0.1, 0.5))

    def heal(self, pairs: set[tuple[str, str]]) -> None:
        self.cut -= pairs

    def crash(self, node: Node) -> None:
        if not node.up:
            return
        power = self.power_losses and self.random.random() < 0.7
        self.note(f"{node.name} {'loses power' if power else 'is killed'}")
        node.up = False
        node.life += 1
        if power:
            node.log = list(node.durable)
        self.check_copies()
        self.at(self.random.choice((0.1, 1.0, 5.0)), lambda: self.start(node))

    def start(self, node: Node) -> None:
        if not node.up:
            self.note(f"{node.name} starts")
            node.up = True
            node.frozen_until = 0.0
            node.begin()

    def restart(self, node: Node, why: str) -> None:
        self.note(f"{node.name} {why}")
        node.begin()

    # --- what must hold

    def check_copies(self) -> None:
        members = self.etcd.observed.members
        for node in self.nodes:
            if members is None or node.name not in members.nodes:
                continue
            held = {write for write, _ in (node.durable if self.power_losses else node.log)}
            if not self.acknowledged <= held:
                raise Violation(f"{node.name} is in the set and lacks {self.acknowledged - held}")
            epochs = [epoch for _, epoch in node.log]
            if epochs != sorted(epochs):
                raise Violation(f"{node.name} has older writes on top of newer ones: {node.log}")

    def mend(self) -> None:
        self.note("everything is mended")
        self.calm = True
        self.cut.clear()
        self.loss, self.slow, self.stray = 0.0, 0.01, 0.0
        for node in self.nodes:
            node.frozen_until = min(node.frozen_until, self.now)
            self.start(node)

    def is_well(self) -> bool:
        serving = [node for node in self.nodes if node.serves]
        members = self.etcd.observed.members
        if len(serving) != 1 or members is None or members.nodes != {node.name for node in self.nodes}:
            return False
        if serving[0].pending or any(len(node.log) < len(serving[0].log) for node in self.nodes):
            return False
        if any(node.log != serving[0].log for node in self.nodes):
            raise Violation(f"in the set and different: {[node.log for node in self.nodes]}")
        return True
