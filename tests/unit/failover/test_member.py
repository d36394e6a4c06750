"""One member at a time; how they work together is simulated in tests/simulation/test_failover.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stillpoint.errors import Refused
from stillpoint.failover.in_sync_set import Leader, Members, Observed, Transaction
from stillpoint.failover.lease import Lease, LeaseTimes
from stillpoint.failover.member import CopyState, Member, Part, Read, Readiness

TIMES = LeaseTimes()
READY = Readiness(fenced=True, resynced=True, live=True, caught_up=True)
IN_SET = Observed(members=Members(4, frozenset("ab")), members_modified=9)
LATE_S = 100.0


def _member(name: str = "b", *, first: bool = False) -> Member:
    lease = Lease(TIMES)
    lease.granted(7, sent_s=LATE_S, ttl_s=10)
    return Member(name, lease, CopyState(promotable=True, epoch=4, first=first), started_s=0)


def _primary() -> Member:
    """Of a set of a and b."""
    member = _member("a")
    member.answered(Observed(Leader("a", 7), 5, Members(4, frozenset("ab")), 9))
    assert member.part is Part.PRIMARY
    return member


def _asks(member: Member, now_s: float = LATE_S) -> Transaction:
    request = member.next_request(now_s)
    assert isinstance(request, Transaction)
    return request


def test_a_member_that_finds_no_leader_asks_to_be_promoted_in_a_higher_epoch() -> None:
    member = _member()
    member.answered(IN_SET)
    asked = _asks(member)
    assert (asked.leader, asked.members) == (Leader("b", 7), Members(5, frozenset("b")))
    assert (asked.leader_created, asked.members_modified, asked.unless_paused) == (0, 9, True)
    assert member.next_request(LATE_S) is None, "one at a time"


def test_who_is_not_whole_or_not_a_member_or_paused_or_too_young_asks_for_nothing() -> None:
    for seen, promotable, now_s in (
        (IN_SET, False, LATE_S),
        (replace(IN_SET, members=Members(4, frozenset("a"))), True, LATE_S),
        (replace(IN_SET, paused=True), True, LATE_S),
        (replace(IN_SET, leader=Leader("a", 3)), True, LATE_S),
        (Observed(), True, LATE_S),
        (IN_SET, True, TIMES.ttl_s - 0.1),
    ):
        member = _member()
        member.copy.promotable = promotable
        member.answered(seen)
        assert not isinstance(member.next_request(now_s), Transaction)


def test_a_volume_that_etcd_does_not_know_is_taken_up_by_the_node_that_serves_it() -> None:
    member = _member(first=True)
    member.answered(Observed())
    assert _asks(member).members == Members(4, frozenset("b"))


def test_a_lost_standby_is_waited_for_until_etcd_has_removed_it() -> None:
    member = _primary()
    member.lost("b")
    assert member.awaited == {"b"}
    assert _asks(member).members == Members(4, frozenset("a"))
    assert member.awaited == {"b"}
    member.answered(Observed(Leader("a", 7), 5, Members(4, frozenset("a")), 10))
    assert member.awaited == frozenset()


def test_who_joins_is_waited_for_before_etcd_is_asked() -> None:
    member = _primary()
    member.ready("c", replace(READY, caught_up=False))
    assert member.awaited == {"b"}
    member.ready("c", READY)
    assert member.awaited == {"b", "c"}
    assert _asks(member).members == Members(4, frozenset("abc"))


def test_a_join_without_an_answer_is_waited_for_until_it_can_no_longer_happen() -> None:
    member = _primary()
    member.ready("c", READY)
    _asks(member)
    member.unanswered()
    member.lost("c")
    assert isinstance(member.next_request(LATE_S), Read)
    member.answered(Observed(Leader("a", 7), 5, Members(4, frozenset("ab")), 9))
    assert member.awaited == {"b", "c"}, "it may still arrive"
    assert _asks(member).members == Members(4, frozenset("ab")), "this makes it impossible"
    member.answered(Observed(Leader("a", 7), 5, Members(4, frozenset("ab")), 10))
    assert member.awaited == {"b"}


def test_a_primary_stops_for_another_epoch_and_for_another_leader() -> None:
    for seen in (
        Observed(Leader("b", 8), 11, Members(5, frozenset("b")), 11),
        Observed(None, 0, Members(5, frozenset("b")), 11),
        Observed(Leader("b", 8), 11, Members(4, frozenset("ab")), 9),
    ):
        member = _primary()
        member.answered(seen)
        assert member.part is Part.STOPPED
        assert not member.may_serve(LATE_S)
        assert member.next_request(LATE_S + 50) is None


def test_a_pledge_keeps_a_primary_serving_only_if_all_gave_it() -> None:
    member = _primary()
    member.ready("c", READY)
    late_s = LATE_S + 7.9
    assert member.pledges_wanted(LATE_S) == frozenset()
    assert member.pledges_wanted(late_s) == {"b", "c"}
    member.pledged("b", sent_s=late_s)
    assert not member.may_serve(LATE_S + 8)
    member.pledged("c", sent_s=late_s)
    assert member.may_serve(late_s + 7.9) and not member.may_serve(late_s + 8)


def test_a_primary_alone_in_its_set_needs_nobody() -> None:
    member = _member("a")
    member.answered(Observed(Leader("a", 7), 5, Members(4, frozenset("a")), 9))
    assert member.may_serve(LATE_S + 1e6)


def test_who_pledged_asks_for_no_promotion_and_who_asks_for_one_pledges_nothing() -> None:
    member = _member()
    member.answered(IN_SET)
    assert member.pledge(LATE_S, epoch=4)
    assert not member.pledge(LATE_S, epoch=3)
    assert not isinstance(member.next_request(LATE_S + 7), Transaction)
    member = _member()
    member.answered(IN_SET)
    _asks(member)
    assert not member.pledge(LATE_S, epoch=4)
    member.unanswered()
    member.next_request(LATE_S)
    member.answered(IN_SET)
    assert not member.pledge(LATE_S, epoch=4), "the promotion may still arrive"


def test_a_primary_whose_key_went_takes_it_again_in_the_same_epoch() -> None:
    member = _primary()
    member.answered(Observed(None, 0, Members(4, frozenset("ab")), 9))
    assert not member.may_serve(LATE_S), "its lease is bound to no key"
    asked = _asks(member)
    assert (asked.leader, asked.members, asked.members_modified) == (Leader("a", 7), None, 9)


def test_who_hands_over_does_not_serve_and_stops_when_the_set_is_the_other_node() -> None:
    member = _primary()
    with pytest.raises(Refused, match="not in the in-sync set"):
        member.hand_over("c")
    assert member.may_serve(LATE_S)
    member.hand_over("b")
    assert not member.may_serve(LATE_S)
    asked = _asks(member)
    assert (asked.members, asked.resigns, asked.members_modified) == (Members(4, frozenset("b")), True, 9)
    member.answered(Observed(None, 0, Members(4, frozenset("b")), 10))
    assert member.part is Part.STOPPED


def test_a_hand_over_without_an_answer_keeps_the_node_from_serving_until_it_is_known() -> None:
    member = _primary()
    member.hand_over("b")
    _asks(member)
    member.unanswered()
    member.lost("b")
    assert isinstance(member.next_request(LATE_S), Read)
    member.answered(Observed(Leader("a", 7), 5, Members(4, frozenset("ab")), 9))
    assert not member.may_serve(LATE_S), "it may still be handed over"
    assert _asks(member).members == Members(4, frozenset("a"))
    member.answered(Observed(Leader("a", 7), 5, Members(4, frozenset("a")), 10))
    assert member.may_serve(LATE_S)
