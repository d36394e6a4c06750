"""What a copy's state becomes when something happens to it: pure functions from a state to the next one.

Each result has to be durable before what its docstring names; a state found after a crash in between is always safe.

Invariants
- Nothing is acknowledged without a peer that may share the current generation (`must_mint`).
- A copy takes over a generation only when it holds all of it, flushed (`resync_finished`, `generation_adopted`).
- `bitmap` for a peer is set only when the map for it is complete from then on, and dropped as soon as the content
  changes in a way that this map does not record: in a session with another source, or when it is rolled back.
- The fence never goes down.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from uuid import UUID

from stillpoint.errors import FencedError, InvalidRequest, Refused

from .generations import Generation, remember
from .handshake import By, Role
from .state import NAME_BYTES_MAX, NO_FLAGS, PEERS_MAX, Fence, Flags, PeerState, ReplicaState

_WHOLE = Flags.CONSISTENT | Flags.UP_TO_DATE


# --- the beginning


def created_primary(*, volume: UUID, node: UUID, name: str, size: int, first: Generation, blank: bool) -> ReplicaState:
    """A new volume on the node that serves it. Durable before it is served. blank: its device reads as zeroes."""
    flags = _WHOLE | Flags.CRASHED_PRIMARY | (Flags.BLANK if blank else NO_FLAGS)
    fence = Fence(first.epoch, 0)
    return ReplicaState(volume, node, name, size, Role.PRIMARY, flags, fence, current=first)


def created_standby(*, volume: UUID, node: UUID, name: str, size: int, blank: bool) -> ReplicaState:
    """A copy that holds nothing of the volume yet."""
    return ReplicaState(volume, node, name, size, Role.STANDBY, Flags.BLANK if blank else NO_FLAGS)


def peer_added(state: ReplicaState, peer: UUID, name: str) -> ReplicaState:
    """Raises InvalidRequest; a peer that is known already keeps what is known of it, under the new name."""
    if peer == state.node:
        raise InvalidRequest(f"node {state.name} cannot be its own peer")
    if len(name.encode()) > NAME_BYTES_MAX:
        raise InvalidRequest(f"the node name {name!r} is longer than {NAME_BYTES_MAX} bytes")
    known = [entry for entry in state.peers if entry.uuid == peer]
    if not known and len(state.peers) == PEERS_MAX:
        raise InvalidRequest(f"a volume has at most {PEERS_MAX} copies besides that of node {state.name}")
    return state.with_peer(replace(known[0], name=name) if known else PeerState(peer, name))


def peer_met(state: ReplicaState, peer: UUID, name: str) -> ReplicaState:
    """As `peer_added`; where there are as many as there can be, the one known longest is forgotten: it was replaced."""
    full = len(state.peers) == PEERS_MAX and all(entry.uuid != peer for entry in state.peers)
    return peer_added(peer_removed(state, state.peers[0].uuid) if full else state, peer, name)


def peer_removed(state: ReplicaState, peer: UUID) -> ReplicaState:
    """Raises NotFound."""
    state.peer(peer)
    return replace(state, peers=tuple(entry for entry in state.peers if entry.uuid != peer))


def grown(state: ReplicaState, size: int) -> ReplicaState:
    return replace(state, size=max(state.size, size))


def written(state: ReplicaState) -> ReplicaState:
    """Durable before the first write to a blank device."""
    return replace(state, flags=state.flags & ~Flags.BLANK)


# --- sessions


def fence_raised(state: ReplicaState, fence: Fence) -> ReplicaState:
    """Durable before the session's token is given out, and so before any frame of it. Raises FencedError."""
    if fence < state.fence:
        raise FencedError(
            f"node {state.name} has fenced off epoch {fence.epoch}, session {fence.session}: "
            f"it is at {state.fence.epoch}, {state.fence.session}; that primary must stop serving"
        )
    return replace(state, fence=fence)


def next_session(state: ReplicaState, theirs: int) -> int:
    """The standby's choice; theirs: the number the primary remembers. Never one that either end has used, whatever
    the epoch: two disks that name the same session then mean the same one."""
    return max(state.fence.session, theirs, *(peer.session for peer in state.peers), 0) + 1


def session_adopted(state: ReplicaState, peer: UUID, session: int, by: By | None) -> ReplicaState:
    """Both ends took the session; durable on the standby before its first acknowledgement, then on the primary.

    by: what the handshake decided to send; None: in sync. Where that is not what the maps hold, they stop saying
    anything, in the same step in which the session becomes the same on both sides and so would vouch for them.
    A standby's content follows that primary from now on, and its maps for other nodes do not record that.
    """
    known = state.peer(peer)
    vouched = by is None or by is By.BITMAP
    adopted = state.with_peer(replace(known, session=session, bitmap=known.bitmap if vouched else None))
    if state.role is Role.PRIMARY:
        return adopted
    return _forget_others(adopted, peer)


# --- resync


def resync_prepared(state: ReplicaState, target: UUID, base: Generation) -> ReplicaState:
    """The source, for every resync but one by bitmap: durable after the map for the target has been marked with all
    that is to be sent or compared, and before the target is told `base`, a new generation. From then on an
    interruption of the resync costs only what was left of it."""
    return state.with_peer(replace(state.peer(target), bitmap=base))


def resync_begun(state: ReplicaState, source: UUID, base: Generation) -> ReplicaState:
    """The target: durable before the first frame changes its content.

    By bitmap its own map for the source has been merged into the source's, durably, before; its own is emptied after
    this. Raises Refused on a primary.
    """
    if state.role is Role.PRIMARY:
        raise Refused(f"node {state.name} is primary; it must become standby before it can take another copy's content")
    given_up = Flags.CONSISTENT | Flags.UP_TO_DATE | Flags.CRASHED_PRIMARY | Flags.FULL_SYNC_NEEDED | Flags.DISCARD
    begun = replace(state, flags=state.flags & ~given_up)
    return begun.with_peer(replace(begun.peer(source), bitmap=base))


def generation_offered(state: ReplicaState, target: UUID) -> ReplicaState:
    """The source: durable before the target is told to take over the current generation. Only from then on does an
    acknowledgement without the target need a new one."""
    return state.with_peer(replace(state.peer(target), generation=state.current))


def resync_finished(
    state: ReplicaState, source: UUID, current: Generation, history: tuple[Generation, ...]
) -> ReplicaState:
    """The target: durable after it flushed all that the source had sent, and before it says that it has finished.

    Raises Refused when no resync is going on: then a copy that is whole would be renamed, not completed.
    """
    if state.has(Flags.CONSISTENT):
        raise Refused(f"node {state.name} is in no resync that could be finished")
    whole = replace(state, flags=state.flags | _WHOLE)
    return _took_over(whole, source, current, history)


# --- generations


def must_mint(state: ReplicaState, in_sync: Iterable[UUID]) -> bool:
    """Whether a write, or a flush of what a peer may lack, needs a new generation before it is acknowledged by this
    node and those `in_sync` alone."""
    held = set(in_sync)
    return any(
        peer.generation is not None and peer.generation == state.current and peer.uuid not in held
        for peer in state.peers
    )


def minted(state: ReplicaState, fresh: Generation, in_sync: Iterable[UUID]) -> ReplicaState:
    """The primary, when it `must_mint`. Durable before the peers in sync are told of it (`generation_adopted`), and
    those have it before anything that waited is acknowledged."""
    assert state.current is not None
    held = set(in_sync)
    peers = tuple(replace(peer, generation=fresh) if peer.uuid in held else peer for peer in state.peers)
    return replace(state, current=fresh, history=remember(state.current, state.history), peers=peers)


def generation_adopted(
    state: ReplicaState, source: UUID, current: Generation, history: tuple[Generation, ...]
) -> ReplicaState:
    """A standby in sync, told by its primary that it minted. Durable before it says so. Raises Refused otherwise."""
    if state.role is Role.PRIMARY or not state.has(_WHOLE):
        raise Refused(f"node {state.name} is not in sync; it cannot take over a generation without a resync")
    return _took_over(state, source, current, history)


# --- roles


def promoted(state: ReplicaState, fresh: Generation, *, force: bool = False) -> ReplicaState:
    """Durable before the first client is served. fresh: minted in the new epoch, higher than the fence's.

    force: an operator takes responsibility for a copy that is whole and known to be behind, or that is to be discarded.
    What only other copies have will show as a split brain, not vanish.
    Raises Refused; a copy that is not whole has to be rolled back to its snapshot first (`rolled_back`).
    """
    if fresh.epoch <= state.fence.epoch:
        raise Refused(f"epoch {fresh.epoch} is not newer than {state.fence.epoch}, which node {state.name} knows of")
    if state.current is None or not state.has(Flags.CONSISTENT):
        raise Refused(
            f"node {state.name}'s copy is not whole, a resync of it was interrupted; "
            "let the resync finish, or promote the snapshot taken before it"
        )
    behind = not state.has(Flags.UP_TO_DATE) or state.has(Flags.FULL_SYNC_NEEDED) or state.has(Flags.DISCARD)
    if behind and not force:
        raise Refused(f"node {state.name}'s copy is not up to date; promote another one, or this one by force")
    flags = (state.flags | _WHOLE | Flags.CRASHED_PRIMARY) & ~(Flags.FULL_SYNC_NEEDED | Flags.DISCARD)
    return replace(
        state,
        role=Role.PRIMARY,
        flags=flags,
        fence=Fence(fresh.epoch, 0),
        current=fresh,
        history=remember(state.current, state.history),
    )


def demoted(state: ReplicaState, *, clean: bool) -> ReplicaState:
    """clean: every write was flushed here, and no client is served any more. A node also does this, not cleanly, when
    it starts and finds that it had been primary."""
    return replace(state, role=Role.STANDBY, flags=state.flags & ~Flags.CRASHED_PRIMARY if clean else state.flags)


def cut_cleanly(
    state: ReplicaState, members: Iterable[UUID], *, at: Generation | None, cut: Generation, session: int
) -> ReplicaState:
    """Every member, and the primary that hands over (a standby by now), at one flushed point of the stream: all hold
    the same bytes, in generation `at`. From now on they need no comparing among each other, whichever is promoted.

    The sessions have ended, each member's maps for the others are emptied before this is durable, and `session` is
    above all theirs. cut: a new generation that names what the maps are relative to.
    Raises Refused on a node that is primary, or whose copy is not whole and of that generation.
    """
    if state.role is Role.PRIMARY or not state.has(_WHOLE) or state.current != at:
        raise Refused(f"node {state.name} has no part in this handing over: its copy has gone another way")
    for member in members:
        if member != state.node:
            known = replace(state.peer(member), generation=state.current, bitmap=cut, session=session)
            state = state.with_peer(known)
    return state


# --- what an operator, or another node, says. A standby's session is ended before each of these


def outdated(state: ReplicaState) -> ReplicaState:
    """Told by the primary that it goes on without this copy."""
    return replace(state, flags=state.flags & ~Flags.UP_TO_DATE)


def discarded(state: ReplicaState) -> ReplicaState:
    """The loser of a split brain, after its content was kept as a snapshot. Raises Refused on a primary."""
    if state.role is Role.PRIMARY:
        raise Refused(f"node {state.name} is primary; make it standby before its copy is given up")
    return replace(state, flags=(state.flags | Flags.DISCARD) & ~Flags.UP_TO_DATE)


def epoch_raised(state: ReplicaState, above: Fence) -> ReplicaState:
    """The winner of a split brain, over the fence of the loser, which would refuse it otherwise.

    Durable before the loser is marked. Sessions that go on are not touched; the next ones are of the new epoch.
    """
    if state.fence > above:
        return state
    return replace(state, fence=Fence(above.epoch + 1, 0))


def distrusted(state: ReplicaState) -> ReplicaState:
    """Everything has to come from another copy: the disk was replaced, or an operator wants it so."""
    return replace(state, flags=(state.flags | Flags.FULL_SYNC_NEEDED) & ~Flags.UP_TO_DATE)


def rolled_back(state: ReplicaState) -> ReplicaState:
    """The content was set back to the snapshot that was taken before the resync that did not finish.

    It is again what the current generation says; but no map records what was undone.
    Raises Refused when the copy is whole, or held nothing before the resync.
    """
    if state.has(Flags.CONSISTENT) or state.current is None:
        raise Refused(f"node {state.name} has no interrupted resync that could be undone")
    peers = tuple(replace(peer, bitmap=None) for peer in state.peers)
    return replace(state, flags=state.flags | Flags.CONSISTENT, peers=peers)


# --- helpers


def _took_over(state: ReplicaState, source: UUID, current: Generation, history: tuple[Generation, ...]) -> ReplicaState:
    state = replace(state, current=current, history=history)
    return _forget_others(state.with_peer(replace(state.peer(source), generation=current)), source)


def _forget_others(state: ReplicaState, source: UUID) -> ReplicaState:
    peers = tuple(peer if peer.uuid == source else replace(peer, generation=None, bitmap=None) for peer in state.peers)
    return replace(state, peers=peers)
