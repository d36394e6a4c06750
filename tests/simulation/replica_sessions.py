"""Clients that write, and sessions that carry what they wrote to the standbys: each durable step may be the last."""

from __future__ import annotations

from typing import Any

from stillpoint.errors import FencedError

from .replica_copies import BLOCKS, DIRTY, Copies, Node, Pending, Session, Violation


class Sessions(Copies):
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

    def _primary(self) -> Node | None:
        serving = [node for node in self.nodes if node.up and node.serving]
        return self.random.choice(serving) if serving else None

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
