"""What each event makes of a copy's state. How they work together: tests/simulation/test_replica_walks.py."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest

from stillpoint.errors import FencedError, InvalidRequest, NotFound, Refused
from stillpoint.replica import (
    HISTORY_MAX,
    By,
    Fence,
    Flags,
    Generation,
    PeerState,
    ReplicaState,
    Role,
    mint,
    transitions,
)

VOLUME, NODE, PEER, THIRD = (UUID(int=number) for number in range(1, 5))
G1, G2, G3, BASE = (Generation(1, UUID(int=number)) for number in range(11, 15))


def _primary() -> ReplicaState:
    state = transitions.created_primary(volume=VOLUME, node=NODE, name="a", size=4096, first=G1, blank=True)
    for peer in (PEER, THIRD):
        state = transitions.peer_added(state, peer, f"peer {peer.int}")
    return state


def _standby(flags: Flags = Flags.CONSISTENT | Flags.UP_TO_DATE) -> ReplicaState:
    state = replace(_primary(), role=Role.STANDBY, flags=flags)
    for peer in (PEER, THIRD):
        state = state.with_peer(replace(state.peer(peer), generation=G1, bitmap=BASE, session=3))
    return state


def test_a_new_primary_needs_no_new_generation_before_it_has_shared_one() -> None:
    state = _primary()
    assert state.has(Flags.CONSISTENT | Flags.UP_TO_DATE | Flags.CRASHED_PRIMARY | Flags.BLANK)
    assert not transitions.must_mint(state, ())
    assert not transitions.written(state).has(Flags.BLANK)


def test_an_answer_without_a_copy_that_may_share_the_generation_needs_a_new_one_once() -> None:
    state = transitions.generation_offered(_primary(), PEER)
    assert transitions.must_mint(state, ())
    assert not transitions.must_mint(state, (PEER,))
    minted = transitions.minted(state, G2, ())
    assert (minted.current, minted.history) == (G2, (G1,))
    assert minted.peer(PEER).generation == G1
    assert not transitions.must_mint(minted, ())


def test_peers_in_sync_are_noted_as_holding_the_minted_generation_before_they_are_told() -> None:
    state = transitions.generation_offered(transitions.generation_offered(_primary(), PEER), THIRD)
    minted = transitions.minted(state, G2, (THIRD,))
    assert minted.peer(THIRD).generation == G2
    assert transitions.must_mint(minted, ())
    assert not transitions.must_mint(minted, (THIRD,))


def test_the_history_is_bounded_and_newest_first() -> None:
    state = _primary()
    generations = [Generation(number, UUID(int=1000 + number)) for number in range(2 * HISTORY_MAX)]
    for generation in generations:
        state = transitions.minted(state, generation, ())
    assert state.history == tuple(reversed(generations[-HISTORY_MAX - 1 : -1]))


def test_a_fence_only_rises() -> None:
    state = transitions.fence_raised(_primary(), Fence(2, 1))
    assert transitions.fence_raised(state, Fence(2, 1)) == state
    assert transitions.fence_raised(state, Fence(3, 0)).fence == Fence(3, 0)
    for older in (Fence(1, 9), Fence(2, 0)):
        with pytest.raises(FencedError, match="must stop serving"):
            transitions.fence_raised(state, older)


def test_a_session_number_is_never_used_twice_whatever_the_epoch() -> None:
    state = _standby()
    assert transitions.next_session(state, 0) == 4
    assert transitions.next_session(state, 7) == 8
    assert transitions.next_session(replace(state, fence=Fence(2, 9)), 0) == 10


def test_a_standby_forgets_what_its_maps_for_other_nodes_said_and_a_primary_does_not() -> None:
    adopted = transitions.session_adopted(_standby(), PEER, 4, None)
    assert adopted.peer(PEER) == replace(_standby().peer(PEER), session=4)
    assert (adopted.peer(THIRD).bitmap, adopted.peer(THIRD).generation) == (None, None)
    primary = replace(_standby(), role=Role.PRIMARY)
    assert transitions.session_adopted(primary, PEER, 4, By.BITMAP).peer(THIRD) == primary.peer(THIRD)


@pytest.mark.parametrize("by", [By.CHECKSUM, By.FULL, By.FULL_SKIP_HOLES])
def test_a_new_session_does_not_vouch_for_maps_that_the_handshake_did_not_trust(by: By) -> None:
    for state in (_standby(), replace(_standby(), role=Role.PRIMARY)):
        assert transitions.session_adopted(state, PEER, 4, by).peer(PEER).bitmap is None
        assert transitions.session_adopted(state, PEER, 4, By.BITMAP).peer(PEER).bitmap == BASE


def test_a_resync_makes_the_target_whole_only_at_its_end() -> None:
    before = _standby(Flags.CONSISTENT | Flags.CRASHED_PRIMARY | Flags.DISCARD | Flags.FULL_SYNC_NEEDED)
    begun = transitions.resync_begun(before, PEER, BASE)
    assert begun.flags == Flags(0)
    assert begun.current == G1
    finished = transitions.resync_finished(begun, PEER, G3, (G2, G1))
    assert finished.flags == Flags.CONSISTENT | Flags.UP_TO_DATE
    assert (finished.current, finished.history) == (G3, (G2, G1))
    assert finished.peer(PEER).generation == G3
    with pytest.raises(Refused):
        transitions.resync_finished(finished, PEER, G3, ())
    with pytest.raises(Refused):
        transitions.resync_begun(_primary(), PEER, BASE)


def test_only_a_copy_in_sync_takes_over_a_minted_generation() -> None:
    assert transitions.generation_adopted(_standby(), PEER, G2, (G1,)).current == G2
    for state in (_primary(), _standby(Flags.CONSISTENT), _standby(Flags(0))):
        with pytest.raises(Refused):
            transitions.generation_adopted(state, PEER, G2, (G1,))


def test_promotion_mints_and_fences() -> None:
    fresh = mint(2, fresh_uuid=lambda: UUID(int=99))
    promoted = transitions.promoted(_standby(), fresh)
    assert promoted.role is Role.PRIMARY
    assert promoted.has(Flags.CRASHED_PRIMARY)
    assert (promoted.current, promoted.history, promoted.fence) == (fresh, (G1,), Fence(2, 0))
    with pytest.raises(Refused, match="not newer"):
        transitions.promoted(replace(_standby(), fence=Fence(2, 0)), fresh)


@pytest.mark.parametrize("flag", [Flags.DISCARD, Flags.FULL_SYNC_NEEDED, Flags.BLANK])
def test_a_copy_that_is_behind_is_promoted_by_force_only(flag: Flags) -> None:
    fresh = mint(2)
    state = replace(_standby(), flags=Flags.CONSISTENT | flag)
    with pytest.raises(Refused, match="not up to date"):
        transitions.promoted(state, fresh)
    forced = transitions.promoted(state, fresh, force=True)
    assert forced.has(Flags.UP_TO_DATE)
    assert not forced.flags & (Flags.DISCARD | Flags.FULL_SYNC_NEEDED)


def test_a_copy_that_is_not_whole_is_not_promoted_even_by_force_unless_it_is_rolled_back() -> None:
    begun = transitions.resync_begun(_standby(), PEER, BASE)
    with pytest.raises(Refused, match="not whole"):
        transitions.promoted(begun, mint(2), force=True)
    back = transitions.rolled_back(begun)
    assert back.current == G1
    assert all(peer.bitmap is None for peer in back.peers)
    assert transitions.promoted(back, mint(2), force=True).has(Flags.CONSISTENT)
    with pytest.raises(Refused):
        transitions.rolled_back(back)


def test_only_a_clean_demotion_forgets_that_it_was_primary() -> None:
    assert transitions.demoted(_primary(), clean=False).has(Flags.CRASHED_PRIMARY)
    clean = transitions.demoted(_primary(), clean=True)
    assert clean.role is Role.STANDBY
    assert not clean.has(Flags.CRASHED_PRIMARY)


def test_a_clean_cut_makes_the_members_comparable_and_takes_in_nobody_else() -> None:
    cut = transitions.cut_cleanly(_standby(), (NODE, THIRD), at=G1, cut=G3, session=9)
    assert cut.peer(THIRD) == PeerState(THIRD, "peer 4", G1, G3, 9)
    assert cut.peer(PEER) == _standby().peer(PEER)
    for state in (_primary(), _standby(Flags.CONSISTENT), replace(_standby(), current=G2)):
        with pytest.raises(Refused):
            transitions.cut_cleanly(state, (THIRD,), at=G1, cut=G3, session=9)


def test_the_winner_of_a_split_brain_is_raised_over_the_loser() -> None:
    raised = transitions.epoch_raised(_primary(), Fence(4, 7))
    assert raised.fence == Fence(5, 0)
    assert transitions.epoch_raised(raised, Fence(4, 8)) == raised


def test_marks_that_an_operator_sets_make_a_copy_no_source() -> None:
    for marked in (
        transitions.discarded(_standby()),
        transitions.distrusted(_standby()),
        transitions.outdated(_standby()),
    ):
        assert not marked.side(PEER, dirty_bytes=0).usable
    with pytest.raises(Refused):
        transitions.discarded(_primary())


def test_peers_are_named_bounded_and_kept() -> None:
    state = transitions.peer_added(_standby(), PEER, "renamed")
    assert state.peer(PEER) == replace(_standby().peer(PEER), name="renamed")
    state = transitions.peer_added(state, UUID(int=5), "c")
    with pytest.raises(InvalidRequest, match="at most 3"):
        transitions.peer_added(state, UUID(int=6), "d")
    for bad in ((NODE, "a"), (UUID(int=5), "n" * 65)):
        with pytest.raises(InvalidRequest):
            transitions.peer_added(state, *bad)
    with pytest.raises(NotFound):
        transitions.peer_removed(state, THIRD).peer(THIRD)
    assert transitions.grown(state, 8192).size == 8192


def test_a_node_that_was_replaced_makes_room_for_the_one_that_came() -> None:
    full = transitions.peer_added(_standby(), UUID(int=5), "c")
    met = transitions.peer_met(full, UUID(int=6), "d")
    assert [peer.uuid for peer in met.peers] == [*(peer.uuid for peer in full.peers[1:]), UUID(int=6)]
    assert transitions.peer_met(full, PEER, full.peer(PEER).name) == full
