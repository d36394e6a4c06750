"""The arithmetic of a lease."""

from __future__ import annotations

import pytest

from stillpoint.errors import ConfigError
from stillpoint.failover.lease import Lease, LeaseTimes

TIMES = LeaseTimes()


def test_a_deadline_counts_from_sending_less_the_margin_and_never_goes_back() -> None:
    lease = Lease(TIMES)
    assert not lease.holds(0)
    lease.granted(7, sent_s=100, ttl_s=10)
    assert lease.serves_until_s == 108
    lease.granted(7, sent_s=99, ttl_s=10)  # an answer that was overtaken
    assert lease.serves_until_s == 108
    assert lease.holds(107.9) and not lease.holds(108)


def test_a_longer_lease_than_asked_for_is_not_relied_on() -> None:
    lease = Lease(TIMES)
    lease.granted(7, sent_s=0, ttl_s=60)
    assert lease.serves_until_s == 8
    lease.granted(7, sent_s=1, ttl_s=3)
    assert lease.serves_until_s == 8


def test_another_lease_and_a_lost_one_begin_from_nothing() -> None:
    lease = Lease(TIMES)
    lease.granted(7, sent_s=100, ttl_s=10)
    lease.granted(8, sent_s=50, ttl_s=10)
    assert lease.serves_until_s == 58
    lease.lost()
    assert lease.id == 0 and not lease.holds(0) and lease.due(0)


def test_a_keep_alive_is_due_at_once_and_then_each_interval() -> None:
    lease = Lease(TIMES)
    assert lease.due(0)
    lease.sent(0)
    assert not lease.due(1.9) and lease.due(2)


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ({"ttl_s": 0}, "more than zero"),
        ({"ttl_s": 7}, "too short"),
        ({"timeout_s": 4}, "too short"),
        ({"kill_after_s": 2}, "before the margin is used up"),
    ],
)
def test_times_that_do_not_fit_together_are_refused(times: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LeaseTimes(**times)
