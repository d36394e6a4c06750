"""How long this node may believe that it is still the primary: pure arithmetic on its own monotonic clock.

etcd counts a lease's time from when it handles a keep-alive, which is after the keep-alive was sent. So a deadline
counted from the *sending* ends before etcd's does, whatever the network does to the answer; the margin pays for clocks
that run at different speeds and for the way of a reply that was checked just before the deadline.

Invariants
- `serves_until` never lies after the instant at which etcd may let the lease end, less the margin.
- A node serves only before it. Whoever watches kills the node when it has not stopped `kill_after_s` later.
"""

from __future__ import annotations

from dataclasses import dataclass

from stillpoint.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """All in seconds. Expected failover: `ttl_s` to `ttl_s + 3`. Raises ConfigError."""

    ttl_s: float = 10.0
    keepalive_s: float = 2.0
    # Of one request to etcd; after it the outcome is unknown.
    timeout_s: float = 2.0
    margin_s: float = 2.0
    kill_after_s: float = 1.0

    def __post_init__(self) -> None:
        if min(self.ttl_s, self.keepalive_s, self.timeout_s, self.margin_s, self.kill_after_s) <= 0:
            raise ConfigError("the times of a lease have to be more than zero")
        # One keep-alive may fail, and the next one still comes in time.
        if self.keepalive_s + 2 * self.timeout_s > self.ttl_s - self.margin_s:
            raise ConfigError(
                f"ttl {self.ttl_s:g} s is too short: keepalive {self.keepalive_s:g} s and twice the timeout "
                f"{self.timeout_s:g} s have to fit into it beside the margin {self.margin_s:g} s"
            )
        if self.kill_after_s >= self.margin_s:
            raise ConfigError("a node that does not stop has to be killed before the margin is used up")


class Lease:
    """One lease at etcd, as its holder sees it. `now_s`, `sent_s`: of this machine's monotonic clock."""

    def __init__(self, times: LeaseTimes) -> None:
        self.times = times
        self.id = 0  # 0: none
        self.serves_until_s = float("-inf")
        self._sent_s = float("-inf")

    def due(self, now_s: float) -> bool:
        """A keep-alive (or, without an id, the grant of a lease) has to be sent."""
        return now_s - self._sent_s >= self.times.keepalive_s

    def sent(self, now_s: float) -> None:
        self._sent_s = now_s

    def granted(self, lease_id: int, *, sent_s: float, ttl_s: float) -> None:
        """ttl_s: what etcd granted; it may be more than was asked."""
        if lease_id != self.id:
            self.id, self.serves_until_s = lease_id, float("-inf")
        deadline_s = sent_s + min(ttl_s, self.times.ttl_s) - self.times.margin_s
        self.serves_until_s = max(self.serves_until_s, deadline_s)

    def lost(self) -> None:
        """etcd does not know the lease any more: somebody else may be primary by now."""
        self.id, self.serves_until_s = 0, float("-inf")
        self._sent_s = float("-inf")

    def holds(self, now_s: float) -> bool:
        return now_s < self.serves_until_s
