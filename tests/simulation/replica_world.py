"""Copies of a volume on two or three nodes that lose each other, crash and are promoted, driven by the real transitions
and the real handshake, beside a plain account of which writes were acknowledged.

A write's content is its number, and it remembers what it overwrote; so a copy *includes* a write when its block holds
that write or one that was made on top of it. Every random choice follows from the seed.

What must hold
- The last whole copy that includes an acknowledged write is never overwritten by one that does not; unless an operator
  gave it up, or the write was never flushed and a power loss came after it, as on a single disk.
- When a resync has finished, or none is needed, the two copies hold the same bytes.
- A copy that is promoted is one the volume had: what it holds of the time after a flush, it holds on top of all that
  was flushed.
- Once all is well again, one primary can bring every copy in sync.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stillpoint.errors import Refused

from .replica_copies import Node, Violation
from .replica_sessions import Sessions

__all__ = ["Violation", "World"]


class World(Sessions):
    def run(self) -> None:
        # Each walk prefers other events, and leaves some out: what is rare beside a hundred others is common in some.
        weights = {event: often * self.random.choice((0, 1, 1, 2, 6)) for event, often in self._events().items()}
        weights[self.move_frames] = weights[self.move_frames] or 16
        weights[self.connect] = weights[self.connect] or 6
        events = self.random.choices(list(weights), list(weights.values()), k=self.steps)
        for event in events:
            self.attempt(event)
        self.settle()

    def _events(self) -> dict[Callable[[], Any], int]:
        return {
            self.client_write: 8,
            self.client_flush: 3,
            self.move_frames: 16,
            self.connect: 6,
            self.partition: 2,
            self.heal: 4,
            self.notice: 6,
            self.crash: 2,
            self.start: 4,
            self.promote: 2,
            self.demote: 1,
            self.hand_over: 1,
            self.resolve: 2,
            self.distrust: 1,
            self.restore_image: 4,
        }

    def partition(self) -> None:
        one, other = self.random.sample(self.nodes, 2)
        self.cut.add(frozenset((one.index, other.index)))

    def heal(self) -> None:
        if self.cut:
            self.cut.remove(self.random.choice(sorted(self.cut, key=sorted)))

    def notice(self) -> None:
        """One end of one session notices that the link broke, now or at some earlier time."""
        node = self.random.choice(self.nodes)
        hiccup = self.random.random() < 0.1  # a link may also end although nothing is cut
        for session in [*node.outgoing.values()]:
            if hiccup or not self.linked(node, session.standby) or not session.open_at_standby:
                self.end_outgoing(session)
        if node.incoming and (
            not self.linked(node, node.incoming.primary)
            or (not node.incoming.open_at_primary and not node.incoming.to_standby)
        ):
            self.end_incoming(node)

    def crash(self) -> None:
        node = self.random.choice(self.nodes)
        if node.up:
            self.die(node, power=self.random.random() < 0.5)

    def start(self) -> None:
        down = [node for node in self.nodes if not node.up]
        if down:
            self.start_node(self.random.choice(down))

    def start_node(self, node: Node) -> None:
        self.note(f"n{node.index} starts")
        node.up = True
        node.barrier = {}
        if node.state.role.name == "PRIMARY":
            node.state = self.transitions.demoted(node.state, clean=False)

    def promote(self, node: Node | None = None, *, force: bool | None = None) -> None:
        candidates = [node for node in self.nodes if node.up and not node.serving and not node.restored]
        if node is None:
            if not candidates or (self._primary() and self.random.random() < 0.6):
                return
            node = self.random.choice(candidates)
        force = self.random.random() < 0.3 if force is None else force
        roll_back = self.mended or self.random.random() < 0.8
        if (
            force
            and roll_back
            and node.kept
            and node.state.current
            and not node.state.has(self.replica.Flags.CONSISTENT)
        ):
            self.end_incoming(node)
            node.durable, node.cache = dict(node.kept), {}
            node.state = self.transitions.rolled_back(node.state)
            self.may_die(node)
        known = [other.state.fence.epoch for other in self.nodes if other is node or self.linked(node, other)]
        fresh = self.fresh(max(known) + 1)
        promoted = self.transitions.promoted(node.state, fresh, force=force)
        self.end_incoming(node)
        self.note(f"n{node.index} promoted{' by force' if force else ''}: {fresh.uuid.int}")
        self.check_barriers(node)
        node.state, node.kept = promoted, None
        self.may_die(node)
        node.serving = True
        node.barrier = {}

    def demote(self) -> None:
        primary = self._primary()
        if primary is None or self.random.random() < 0.5:
            return
        self.demote_node(primary, clean=self.random.random() < 0.7)

    def hand_over(self) -> None:
        """A clean cut of everything that is in sync, then another node is promoted."""
        primary = self._primary()
        if primary is None or primary.pending:
            return
        members = [
            self.node(peer)
            for peer, session in primary.outgoing.items()
            if session.awaited and not session.to_standby and not session.to_primary and not primary.maps[peer]
            and session.adopted == primary.state.current
        ]  # fmt: skip
        if not members:
            return
        self.note(f"n{primary.index} hands over to one of {[member.index for member in members]}")
        everyone = [primary, *members]
        session = max(
            self.transitions.next_session(node.state, peer.session) for node in everyone for peer in node.state.peers
        )
        token = self.fresh(primary.state.fence.epoch)
        uuids = [node.uuid for node in everyone]
        self.demote_node(primary, clean=True)
        for node in everyone:
            self.end_incoming(node)
            self.may_die(node)
            cut = self.transitions.cut_cleanly(node.state, uuids, at=primary.state.current, cut=token, session=session)
            for other in uuids:
                if other != node.uuid:
                    node.maps[other].clear()
            node.state = cut
        self.may_die(*everyone)
        self.promote(self.random.choice(members), force=False)

    def resolve(self) -> None:
        one, other = self.random.sample(self.nodes, 2)
        if self.linked(one, other):
            self.resolve_pair(one, other)

    def resolve_pair(self, winner: Node, loser: Node) -> None:
        decision = self.replica.decide(winner.side(loser), loser.side(winner))
        if decision.outcome.name in ("SPLIT_BRAIN", "UNRELATED"):
            self.note(f"n{loser.index} gives up for n{winner.index}")
            if loser.serving:
                self.demote_node(loser, clean=True)
            winner.state = self.transitions.epoch_raised(winner.state, loser.state.fence)
            self.end_incoming(loser)
            loser.state = self.transitions.discarded(loser.state)

    def distrust(self) -> None:
        standbys = [node for node in self.nodes if node.up and not node.serving]
        if standbys and self.random.random() < 0.3:
            node = self.random.choice(standbys)
            self.end_incoming(node)
            node.state = self.transitions.distrusted(node.state)

    def restore_image(self) -> None:
        """The disk of a standby that is down is put back to an earlier day, metadata and all."""
        node = self.random.choice(self.nodes)
        if node.up or node.image is None or node.state.role.name == "PRIMARY" or node.image[0].role.name == "PRIMARY":
            return
        self.note(f"n{node.index} is put back to an earlier day")
        node.state, node.durable, maps, node.kept = node.image
        node.durable, node.maps = dict(node.durable), {peer: dict(map_) for peer, map_ in maps.items()}
        node.cache, node.image, node.restored = {}, None, True

    def settle(self) -> None:
        """Everything works again: one primary has to bring every copy in sync."""
        self.note("everything is mended")
        self.mended = True
        self.cut.clear()
        for node in self.nodes:
            node.image = None
        for _ in range(40):
            if self.all_in_sync():
                return
            self.attempt(self._mend)
            for _ in range(40):
                self.attempt(self.move_frames)
        raise Violation(f"not in sync in the end: {[node.state for node in self.nodes]}")

    def all_in_sync(self) -> bool:
        serving = [node for node in self.nodes if node.up and node.serving]
        if len(serving) != 1 or serving[0].pending:
            return False
        sessions = serving[0].outgoing.values()
        if len(sessions) < len(self.nodes) - 1 or any(
            session.to_standby or not session.open_at_standby for session in sessions
        ):
            return False
        if any(session.adopted != serving[0].state.current for session in sessions):
            return False
        if any(node.content != serving[0].content for node in self.nodes):
            raise Violation(f"in sync in the end: {[node.content for node in self.nodes]}")
        return True

    def _mend(self) -> None:
        for node in self.nodes:
            if not node.up:
                self.start_node(node)
        for node in self.nodes:
            self.notice_all(node)
        serving = [node for node in self.nodes if node.serving]
        for surplus in serving[1:]:
            self.demote_node(surplus, clean=True)
        if not serving:
            self._promote_some_copy()
            return
        primary = serving[0]
        for standby in self.nodes:
            if standby is primary or standby.uuid in primary.outgoing:
                continue
            decision = self.connect(primary, standby)
            if decision is None:
                continue
            if decision.outcome.name in ("SPLIT_BRAIN", "UNRELATED"):
                self.resolve_pair(primary, standby)
            elif decision.outcome.name == "REFUSE":
                # Its own copy is the older one: another has to be promoted.
                self.demote_node(primary, clean=True)
                self.promote(standby, force=True)
                return

    def notice_all(self, node: Node) -> None:
        for session in [*node.outgoing.values()]:
            if not session.open_at_standby:
                self.end_outgoing(session)
        if node.incoming and not node.incoming.open_at_primary:
            self.end_incoming(node)

    def _promote_some_copy(self) -> None:
        usable = self.replica.Flags.CONSISTENT | self.replica.Flags.UP_TO_DATE
        for node in sorted(self.nodes, key=lambda node: (node.restored, usable not in node.state.flags)):
            if self.attempt(lambda node=node: self.promote(node, force=True)):
                return
        raise Refused("no copy is whole")
