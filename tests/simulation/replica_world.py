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

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from uuid import UUID

from stillpoint.errors import FencedError, Refused

BLOCKS = 4
DIRTY = 1 << 60
Content = dict[int, int]


class Violation(AssertionError):
    """The rules let something happen that must not."""


class Interrupted(Exception):
    """A node died in the middle of a step."""


@dataclass(eq=False)
class Session:
    """Both ends of a link. Each end notices its end by itself; the standby takes frames until it does."""

    primary: Node
    standby: Node
    to_standby: deque[tuple[Any, ...]] = field(default_factory=deque)
    to_primary: deque[tuple[Any, ...]] = field(default_factory=deque)
    open_at_primary: bool = True
    open_at_standby: bool = True
    awaited: bool = False  # its acknowledgement is waited for
    finishing: bool = False
    applied: int = 0
    adopted: Any = None  # the generation the standby is known to have
    expected: Content = field(default_factory=dict)  # what the standby holds when it finishes


@dataclass(eq=False)
class Pending:
    """A write (block, number) or flush that a client waits for."""

    sequence: int
    write: int | None
    flushes: set[int] = field(default_factory=set)  # writes acknowledged before this flush came


class Node:
    def __init__(self, world: World, index: int) -> None:
        self.world = world
        self.index = index
        self.uuid = UUID(int=0xA0 + index)
        self.up = True
        self.serving = False
        self.state: Any = None
        self.durable: Content = {}
        self.cache: Content = {}
        self.maps: dict[UUID, dict[int, int]] = {}
        self.kept: Content | None = None  # the snapshot before a resync
        self.barrier: Content = {}
        self.pending: list[Pending] = []
        self.outgoing: dict[UUID, Session] = {}
        self.incoming: Session | None = None
        self.image: tuple[Any, ...] | None = None
        self.restored = False

    @property
    def content(self) -> Content:
        return self.durable | self.cache

    def flush(self) -> None:
        self.durable |= self.cache
        self.cache = {}

    def side(self, peer: Node) -> Any:
        return self.state.side(peer.uuid, dirty_bytes=len(self.maps[peer.uuid]))

    def awaited(self) -> set[UUID]:
        return {uuid for uuid, session in self.outgoing.items() if session.awaited}


class World:
    def __init__(self, replica: ModuleType, seed: int, *, steps: int = 200) -> None:
        self.replica = replica
        self.transitions = replica.transitions
        self.random = random.Random(seed)
        self.steps = steps
        self.log: list[str] = []
        self.counter = 0
        self.parent: dict[int, int] = {}
        self.block_of: dict[int, int] = {}
        self.required: dict[int, Content] = {}
        self.acknowledged: dict[int, bool] = {}  # write: flushed
        self.excused: set[int] = set()
        self.outcomes: set[str] = set()
        self.mended = False
        self.cut: set[frozenset[int]] = set()
        self.nodes = [Node(self, index) for index in range(self.random.choice((2, 2, 3)))]
        self._create()

    def _create(self) -> None:
        first, *others = self.nodes
        volume = UUID(int=0xF0)
        blank = self.random.random() < 0.5
        first.state = self.transitions.created_primary(
            volume=volume, node=first.uuid, name="n0", size=4096, first=self.fresh(1), blank=blank
        )
        first.serving = True
        for node in others:
            node.state = self.transitions.created_standby(
                volume=volume, node=node.uuid, name=f"n{node.index}", size=4096, blank=True
            )
        for node in self.nodes:
            node.durable = dict.fromkeys(range(BLOCKS), 0)
            for peer in self.nodes:
                if peer is not node:
                    node.state = self.transitions.peer_added(node.state, peer.uuid, f"n{peer.index}")
                    node.maps[peer.uuid] = {}

    # --- small things

    def fresh(self, epoch: int) -> Any:
        return self.replica.mint(epoch, fresh_uuid=lambda: UUID(int=self.number()))

    def number(self) -> int:
        self.counter += 1
        return self.counter

    def note(self, text: str) -> None:
        self.log.append(text)

    def node(self, uuid: UUID) -> Node:
        return next(node for node in self.nodes if node.uuid == uuid)

    def linked(self, one: Node, other: Node) -> bool:
        return one.up and other.up and frozenset((one.index, other.index)) not in self.cut

    def includes(self, content: Content, write: int) -> bool:
        held = content[self.block_of[write]]
        while held > write:
            held = self.parent[held]
        return held == write

    def may_die(self, *nodes: Node) -> None:
        """Between two durable steps."""
        for node in nodes:
            if not self.mended and self.random.random() < 0.04:
                self.die(node, power=self.random.random() < 0.5)
                raise Interrupted

    # --- running

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

    def attempt(self, event: Any, *arguments: Any) -> bool:
        try:
            event(*arguments)
        except Interrupted:
            return False
        except (Refused, FencedError) as error:
            self.note(f"  refused: {error}")
            return False
        return True

    # --- clients

    def _primary(self) -> Node | None:
        serving = [node for node in self.nodes if node.up and node.serving]
        return self.random.choice(serving) if serving else None

    def client_write(self) -> None:
        primary = self._primary()
        if primary is None or len(primary.pending) > 5:
            return
        write, block = self.number(), self.random.randrange(BLOCKS)
        self.note(f"n{primary.index} writes {write} to block {block}")
        primary.state = self.transitions.written(primary.state)
        self.block_of[write] = block
        self.parent[write] = primary.content[block]
        self.required[write] = primary.barrier
        for peer, blocks in primary.maps.items():
            session = primary.outgoing.get(peer)
            if session is None:
                blocks[block] = DIRTY
            elif blocks.get(block) != DIRTY:
                # A dirty block of a resync is sent later, whole.
                blocks[block] = write
                session.to_standby.append(("write", write, block, write))
        primary.cache[block] = write
        primary.pending.append(Pending(write, write))
        self.acknowledge(primary)

    def client_flush(self) -> None:
        primary = self._primary()
        if primary is None:
            return
        sequence = self.number()
        self.note(f"n{primary.index} flushes {sequence}")
        before = {write for write in self.acknowledged if self.includes(primary.content, write)}
        primary.flush()
        for session in primary.outgoing.values():
            session.to_standby.append(("flush", sequence))
        primary.pending.append(Pending(sequence, None, before))
        self.acknowledge(primary)

    def acknowledge(self, primary: Node) -> None:
        """Answer in order, as far as the standbys have come; mint before an answer without one that may share."""
        while primary.pending:
            request = primary.pending[0]
            sessions = [session for session in primary.outgoing.values() if session.awaited]
            if any(session.applied < request.sequence for session in sessions):
                return
            held = primary.awaited()
            if request.write is None:
                held |= {peer for peer, blocks in primary.maps.items() if not blocks}
            if self.transitions.must_mint(primary.state, held):
                fresh = self.fresh(primary.state.fence.epoch)
                self.note(f"n{primary.index} mints {fresh.uuid.int}")
                primary.state = self.transitions.minted(primary.state, fresh, primary.awaited())
                for session in sessions:
                    session.to_standby.append(("generation", primary.state.current, primary.state.history))
            if any(session.adopted != primary.state.current for session in sessions):
                return
            primary.pending.pop(0)
            if request.write is not None:
                self.acknowledged[request.write] = False
            else:
                self.acknowledged |= dict.fromkeys(request.flushes, True)
                primary.barrier = dict(primary.durable)

    # --- links

    def move_frames(self) -> None:
        sessions = [session for node in self.nodes for session in node.outgoing.values()]
        sessions += [node.incoming for node in self.nodes if node.incoming and node.incoming not in sessions]
        if not sessions:
            return
        session = self.random.choice(sessions)
        for _ in range(self.random.randrange(1, 6)):
            if not self.attempt(self.send_dirty, session):
                return
            # What was on its way before a partition may still arrive.
            if session.open_at_standby and session.to_standby and not self.attempt(self.take_frame, session):
                return
            if session.open_at_primary and session.to_primary and not self.attempt(self.take_answer, session):
                return

    def send_dirty(self, session: Session) -> None:
        """The resync's part of the stream: one dirty block, or the end."""
        primary, peer = session.primary, session.standby.uuid
        if not session.open_at_primary or session.awaited:
            return
        blocks = primary.maps[peer]
        dirty = [block for block, mark in blocks.items() if mark == DIRTY]
        if dirty:
            block = self.random.choice(dirty)
            blocks[block] = self.number()
            session.to_standby.append(("write", blocks[block], block, primary.content[block]))
            return
        primary.state = self.transitions.generation_offered(primary.state, peer)
        self.may_die(primary)
        session.awaited = session.finishing = True
        session.applied = self.number()  # what was answered before did not wait for this standby
        session.expected = primary.content
        session.to_standby.append(("end", primary.state.current, primary.state.history))

    def take_frame(self, session: Session) -> None:
        standby, source = session.standby, session.primary.uuid
        kind, *values = session.to_standby.popleft()
        if kind == "begin":
            if standby.state.has(self.replica.Flags.CONSISTENT) and standby.state.current is not None:
                standby.flush()
                standby.kept = dict(standby.durable)
            standby.state = self.transitions.resync_begun(standby.state, source, values[0])
            self.may_die(standby)
            standby.maps[source].clear()
        elif kind == "write":
            sequence, block, value = values
            standby.state = self.transitions.written(standby.state)
            standby.cache[block] = value
            session.to_primary.append(("applied", sequence))
        elif kind == "flush":
            standby.flush()
            session.to_primary.append(("flushed", values[0]))
        elif kind == "end":
            if self.random.random() < 0.1:
                self.may_die(standby)
            standby.flush()
            standby.state = self.transitions.resync_finished(standby.state, source, *values)
            standby.kept = None
            standby.restored = False
            if standby.content != session.expected:
                raise Violation(f"n{standby.index} finished with {standby.content}, not {session.expected}")
            self.may_die(standby)
            session.to_primary.append(("finished", values[0]))
        elif kind == "generation":
            standby.state = self.transitions.generation_adopted(standby.state, source, *values)
            self.may_die(standby)
            session.to_primary.append(("adopted", values[0]))

    def take_answer(self, session: Session) -> None:
        primary = session.primary
        kind, value = session.to_primary.popleft()
        if kind == "applied":
            session.applied = max(session.applied, value)
        elif kind == "flushed":
            session.applied = max(session.applied, value)
            blocks = primary.maps[session.standby.uuid]
            for block in [block for block, mark in blocks.items() if mark < value]:
                del blocks[block]
        else:
            session.adopted = value
        self.acknowledge(primary)

    def connect(self, primary: Node | None = None, standby: Node | None = None) -> Any:
        """A session, up to the first frame. Returns the decision."""
        if primary is None:
            primary = self._primary()
        if primary is None:
            return None
        standby = standby or self.random.choice([node for node in self.nodes if node is not primary])
        if not self.linked(primary, standby) or standby.uuid in primary.outgoing:
            return None
        mine, theirs = primary.side(standby), standby.side(primary)
        decision = self.replica.decide(mine, theirs)
        self.check_decision(decision, primary, standby, theirs)
        if decision.outcome.name == "REFUSE" or (decision.source and decision.source.name == "THEIRS"):
            self.outcomes.add(decision.reason.name if decision.reason else "SOURCE_THEIRS")
            return decision
        self.outcomes.add(decision.by.name if decision.by else decision.outcome.name)
        if decision.outcome.name not in ("IN_SYNC", "RESYNC"):
            return decision
        number = self.transitions.next_session(standby.state, primary.state.peer(standby.uuid).session)
        fence = self.replica.Fence(primary.state.fence.epoch, number)
        self.note(f"n{primary.index} - n{standby.index} session {number}: {decision.outcome.name} {decision.by}")
        self.end_incoming(standby)
        try:
            standby.state = self.transitions.fence_raised(standby.state, fence)
        except FencedError:
            # It knows of a newer primary: this one stops at once.
            self.demote_node(primary, clean=False)
            raise
        self.may_die(primary, standby)
        standby.state = self.transitions.session_adopted(standby.state, primary.uuid, number, decision.by)
        self.may_die(primary, standby)
        primary.state = self.transitions.session_adopted(primary.state, standby.uuid, number, decision.by)
        self.may_die(primary, standby)
        self._attach(primary, standby, decision)
        return decision

    def _attach(self, primary: Node, standby: Node, decision: Any) -> None:
        session = Session(primary, standby)
        blocks = primary.maps[standby.uuid]
        if decision.outcome.name == "IN_SYNC":
            primary.state = self.transitions.generation_offered(primary.state, standby.uuid)
            self.may_die(primary)
            session.awaited = True
            session.applied, session.adopted = self.number(), primary.state.current
        else:
            if decision.by.name == "BITMAP":
                blocks |= dict.fromkeys(standby.maps[primary.uuid], DIRTY)
            else:
                skip = decision.by.name == "FULL_SKIP_HOLES"
                blocks |= {block: DIRTY for block in range(BLOCKS) if not skip or primary.content[block]}
                base = self.fresh(primary.state.fence.epoch)
                primary.state = self.transitions.resync_prepared(primary.state, standby.uuid, base)
            self.may_die(primary, standby)
            session.to_standby.append(("begin", primary.state.peer(standby.uuid).bitmap))
        primary.outgoing[standby.uuid] = session
        standby.incoming = session

    def check_decision(self, decision: Any, primary: Node, standby: Node, theirs: Any) -> None:
        if decision.outcome.name == "IN_SYNC" and primary.content != standby.content:
            raise Violation(f"called in sync: {primary.content} and {standby.content}")
        if decision.outcome.name == "RESYNC" and primary.side(standby).whole and theirs.whole:
            source, target = (primary, standby) if decision.source is self.replica.Source.MINE else (standby, primary)
            others = [
                node for node in self.nodes if node is not target and node.state.has(self.replica.Flags.CONSISTENT)
            ]
            lost = {
                write
                for write in set(self.acknowledged) - self.excused
                if self.includes(target.content, write)
                and not any(self.includes(node.content, write) for node in others)
            }
            if target.state.has(self.replica.Flags.DISCARD):
                self._give_up(target, source)
            elif lost and not source.restored:
                raise Violation(f"n{source.index} would overwrite n{target.index}, which alone has {lost}")

    def _give_up(self, loser: Node, winner: Node) -> None:
        """What the loser alone had is lost, loudly; and what only the loser had flushed is as good as not flushed."""
        for write in self.acknowledged:
            if self.includes(loser.content, write) and not self.includes(winner.content, write):
                self.excused.add(write)
            if not self.includes(winner.durable, write):
                self.acknowledged[write] = False

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

    def end_outgoing(self, session: Session) -> None:
        primary, peer = session.primary, session.standby.uuid
        self.note(f"n{primary.index} loses n{session.standby.index}")
        session.open_at_primary = False
        del primary.outgoing[peer]
        primary.maps[peer] = dict.fromkeys(primary.maps[peer], DIRTY)
        self.acknowledge(primary)

    def end_incoming(self, standby: Node) -> None:
        if standby.incoming:
            standby.incoming.open_at_standby = False
            standby.incoming = None

    # --- nodes

    def crash(self) -> None:
        node = self.random.choice(self.nodes)
        if node.up:
            self.die(node, power=self.random.random() < 0.5)

    def die(self, node: Node, *, power: bool) -> None:
        self.note(f"n{node.index} {'loses power' if power else 'is killed'}")
        was_primary = node.serving
        self._stop(node)
        node.up = False
        if power:
            for block, value in node.cache.items():
                if self.random.random() < 0.5:
                    node.durable[block] = value
            node.cache = {}
            if was_primary:
                for blocks in node.maps.values():
                    blocks |= dict.fromkeys(range(BLOCKS), DIRTY)
            # Those not answered yet, too: the answer that the standby gave may still be on its way.
            self.excused |= {write for write in self.block_of if not self.acknowledged.get(write)}
        if self.random.random() < 0.4:
            node.image = (
                node.state,
                dict(node.content),
                {peer: dict(map_) for peer, map_ in node.maps.items()},
                node.kept,
            )

    def _stop(self, node: Node) -> None:
        """It serves nobody any more; requests not answered are never answered."""
        node.pending = []
        for session in [*node.outgoing.values()]:
            self.end_outgoing(session)
        self.end_incoming(node)
        node.serving = False

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

    def check_barriers(self, node: Node) -> None:
        for block, write in node.content.items():
            for below, flushed in self.required.get(write, {}).items():
                if flushed and not self.includes(node.content, flushed):
                    raise Violation(
                        f"n{node.index} is promoted with {write} in block {block}, without {flushed} in {below}"
                    )

    def demote(self) -> None:
        primary = self._primary()
        if primary is None or self.random.random() < 0.5:
            return
        self.demote_node(primary, clean=self.random.random() < 0.7)

    def demote_node(self, primary: Node, *, clean: bool) -> None:
        self.note(f"n{primary.index} demoted, {clean=}")
        self._stop(primary)
        if clean:
            primary.flush()
        primary.state = self.transitions.demoted(primary.state, clean=clean)

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

    # --- the operator

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

    # --- the end

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
