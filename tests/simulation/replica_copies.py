"""Copies of a volume on nodes that can die, and the account of which writes were acknowledged."""

from __future__ import annotations

import random
from collections import deque
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
    def __init__(self, index: int) -> None:
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


class Copies:
    """The nodes, what the clients were promised, and what must hold. `Sessions` and `World` act on it."""

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
        self.nodes = [Node(index) for index in range(self.random.choice((2, 2, 3)))]
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

    def attempt(self, event: Any, *arguments: Any) -> bool:
        try:
            event(*arguments)
        except Interrupted:
            return False
        except (Refused, FencedError) as error:
            self.note(f"  refused: {error}")
            return False
        return True

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

    def demote_node(self, primary: Node, *, clean: bool) -> None:
        self.note(f"n{primary.index} demoted, {clean=}")
        self._stop(primary)
        if clean:
            primary.flush()
        primary.state = self.transitions.demoted(primary.state, clean=clean)

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

    def check_barriers(self, node: Node) -> None:
        for block, write in node.content.items():
            for below, flushed in self.required.get(write, {}).items():
                if flushed and not self.includes(node.content, flushed):
                    raise Violation(
                        f"n{node.index} is promoted with {write} in block {block}, without {flushed} in {below}"
                    )
