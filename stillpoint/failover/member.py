"""One node's part in the automatic failover of one volume: what to ask of etcd and of the other nodes, and what the
node may do meanwhile. Pure: time, answers and news are passed in; requests are handed out; nothing waits.

Invariants, each with a fault in tests/simulation/test_failover.py that shows what happens without it
- A primary waits for every node of `awaited`: the set that etcd confirmed last, and whoever may have joined since.
- It serves only while its lease lasts, counted from sending; or while every member has pledged not to take over.
- A member asks for promotion only if its copy is whole, its pledges are over, and it has run for longer than any
  pledge a process before it can have given.
- A pledge is given to the primary that this node is fenced to, and never while a promotion is on its way.
- A transaction without an answer may have been done, or may still be, until the set it compared has changed.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from stillpoint.errors import Refused

from .in_sync_set import (
    Leader,
    Observed,
    Transaction,
    change,
    first_leader,
    handing_over,
    is_vacant_for,
    promotion,
    reacquisition,
)
from .lease import Lease

_NEVER = float("-inf")
_ALWAYS = float("inf")


class Part(enum.Enum):
    STANDBY = "standby"
    PRIMARY = "primary"
    STOPPED = "stopped"  # was primary; has to start again as a standby


class Read:
    """Look at the volume's keys, linearizably."""


Request = Read | Transaction


@dataclass(slots=True)
class CopyState:
    """What the data node says of its copy.

    promotable: whole, up to date and not being resynced. epoch: the highest it has heard of.
    first: it serves a volume that etcd does not know yet.
    """

    promotable: bool
    epoch: int
    first: bool


@dataclass(frozen=True, slots=True)
class Readiness:
    """Of a standby that is to join: each has to be true, in this order of happening."""

    fenced: bool  # it took the session of this primary, durably
    resynced: bool  # it has finished, and flushed
    live: bool  # every write since is sent to it
    caught_up: bool  # it has acknowledged every write that was answered so far, also those that did not wait for it


class Member:
    def __init__(self, node: str, lease: Lease, copy: CopyState, *, started_s: float) -> None:
        """copy: as the data node says it is now; without it not even a pledge could be judged."""
        self.node = node
        self.part = Part.STANDBY
        self.copy = copy
        self.epoch = 0  # of the primary that this node is
        self.observed = Observed()
        self._lease = lease
        self._times = lease.times
        self._wants_out: set[str] = set()
        self._joining: set[str] = set()
        self._wants_in: set[str] = set()
        self._hands_to = ""
        self._asked: Request | None = None
        self._uncertain = False
        # The revision of the members that a transaction without an answer had compared. Until they change it may land.
        self._in_doubt: int | None = None
        self._read_s = _NEVER
        self._pledges: dict[str, float] = {}
        # A process before this one may have pledged just before it ended.
        self._no_promotion_before_s = started_s + self._times.ttl_s

    # --- what the node may do

    def may_serve(self, now_s: float) -> bool:
        """Whether a read may be answered, a write admitted. Asked just before each."""
        return self.part is Part.PRIMARY and now_s < self.serves_until_s

    @property
    def serves_until_s(self) -> float:
        # A key bound to an earlier lease of ours may be gone by now, whatever the present lease is good for.
        by_lease_s = self._lease.serves_until_s if self.observed.leader == self._me() else _NEVER
        return max(by_lease_s, self._pledged_until_s()) if not self._hands_to else _NEVER

    @property
    def awaited(self) -> frozenset[str]:
        """The other nodes whose acknowledgement each write needs. Raises nothing; empty on a standby."""
        if self.part is not Part.PRIMARY or self.observed.members is None:
            return frozenset()
        return (self.observed.members.nodes | self._joining) - {self.node}

    # --- news from the data path of a primary

    def lost(self, node: str) -> None:
        """The standby does not answer. It stays awaited until etcd knows it as removed, or as never taken in."""
        self._wants_in.discard(node)
        if self._asked is None and self._in_doubt is None:
            self._joining.discard(node)
        if node in self.awaited:
            self._wants_out.add(node)

    def ready(self, node: str, readiness: Readiness) -> None:
        """From now on its acknowledgement is waited for; then etcd is asked to take it in."""
        if not (readiness.fenced and readiness.resynced and readiness.live and readiness.caught_up):
            return
        if self.part is Part.PRIMARY and node not in self.awaited and node not in self._wants_out:
            self._wants_in.add(node)
            self._joining.add(node)

    def hand_over(self, to: str) -> None:
        """The node has stopped serving and flushed everything; that member is to be primary, at once. This one does not
        serve again, unless the set changes first so that it cannot hand over. Raises Refused."""
        if self.part is not Part.PRIMARY or to not in self._could_follow():
            raise Refused(f"node {to} cannot take over from node {self.node}: it is not in the in-sync set")
        self._hands_to = to

    def _could_follow(self) -> frozenset[str]:
        members = self.observed.members
        return members.nodes - self._wants_out - {self.node} if members is not None else frozenset()

    # --- etcd

    def next_request(self, now_s: float) -> Request | None:
        """One at a time; to be answered by `answered` or `unanswered`."""
        if self._asked is not None or self.part is Part.STOPPED:
            return None
        request = self._primary_request(now_s) if self.part is Part.PRIMARY else self._standby_request(now_s)
        if request is not None:
            self._read_s = now_s
            self._asked = request
        return request

    def _primary_request(self, now_s: float) -> Request | None:
        if self._uncertain:
            return Read()
        members = self.observed.members
        assert members is not None
        if self._hands_to and self._hands_to not in self._wants_out:
            return handing_over(self.observed, self._hands_to)
        if self.observed.leader is None:
            if self._lease.id and self._lease.holds(now_s):
                return reacquisition(self.observed, self._me())
        elif self._wants_out & self.awaited:
            # Also when it is not among them: the write makes a join without an answer impossible.
            return change(self.observed, members.nodes - self._wants_out)
        elif self._wants_in:
            return change(self.observed, members.nodes | self._wants_in)
        return self._look_again(now_s)

    def _standby_request(self, now_s: float) -> Request | None:
        if self._uncertain or not self._may_be_promoted(now_s):
            return self._look_again(now_s)
        seen = self.observed
        if seen.members is None and self.copy.first:
            return first_leader(self._me(), epoch=self.copy.epoch)
        if is_vacant_for(seen, self.node):
            return promotion(seen, self._me(), epoch_min=self.copy.epoch + 1)
        return self._look_again(now_s)

    def _look_again(self, now_s: float) -> Request | None:
        return Read() if now_s - self._read_s >= self._times.keepalive_s / 2 else None

    def _may_be_promoted(self, now_s: float) -> bool:
        return self.copy.promotable and self._lease.holds(now_s) and now_s >= self._no_promotion_before_s

    def answered(self, observed: Observed) -> None:
        """The request was handled, and this is what the keys were right after it, in the same transaction."""
        self._asked = None
        self._uncertain = False
        if observed.members_modified != self._in_doubt:
            self._in_doubt = None
        self.observed = observed
        mine = observed.leader == self._me()
        if self.part is Part.STANDBY:
            if mine:
                assert observed.members is not None
                self.part, self.epoch = Part.PRIMARY, observed.members.epoch
        elif self._deposed(observed, mine):
            self.stop()
        else:
            self._settle_changes(observed)

    def _settle_changes(self, observed: Observed) -> None:
        assert observed.members is not None
        if self._in_doubt is None:
            self._joining = self._wants_in - observed.members.nodes
        self._wants_in -= observed.members.nodes
        self._wants_out &= observed.members.nodes | self._joining
        if self._in_doubt is None and (self._hands_to not in self._could_follow() or observed.leader is None):
            self._hands_to = ""

    def _deposed(self, observed: Observed, mine: bool) -> bool:
        members = observed.members
        if members is None or members.epoch != self.epoch or self.node not in members.nodes:
            return True
        # An absent leader was this node, whose lease ended; nobody took over, or the epoch would be another.
        return not mine and observed.leader is not None and observed.leader.node != self.node

    def unanswered(self) -> None:
        """No answer in time: etcd may have done it, or may still do it."""
        if isinstance(self._asked, Transaction) and self._in_doubt is None:
            self._in_doubt = self._asked.members_modified
        self._asked = None
        self._uncertain = True

    def stop(self) -> None:
        """This node must not serve any more: etcd, a standby that knows a newer fence, or the operator said so."""
        if self.part is Part.PRIMARY:
            self.part = Part.STOPPED
        self._pledges.clear()

    # --- pledges: going on while etcd is away

    def pledges_wanted(self, now_s: float) -> frozenset[str]:
        """Whom to ask for a pledge of `ttl_s`, now: nobody while the lease is being renewed."""
        if (
            self.part is not Part.PRIMARY
            or self._hands_to
            or self._lease.serves_until_s - now_s > self._times.ttl_s / 2
        ):
            return frozenset()
        return self.awaited

    def pledge(self, now_s: float, *, epoch: int) -> bool:
        """Asked by the primary of `epoch`: not to ask for promotion for `ttl_s` from now."""
        promoting = isinstance(self._asked, Transaction) or self._in_doubt is not None
        if self.part is not Part.STANDBY or promoting or epoch < self.copy.epoch:
            return False
        self._no_promotion_before_s = max(self._no_promotion_before_s, now_s + self._times.ttl_s)
        return True

    def pledged(self, node: str, *, sent_s: float) -> None:
        """The node answered yes to what was asked at `sent_s`."""
        until_s = sent_s + self._times.ttl_s - self._times.margin_s
        self._pledges[node] = max(self._pledges.get(node, _NEVER), until_s)

    def _pledged_until_s(self) -> float:
        if self.part is not Part.PRIMARY:
            return _NEVER
        return min((self._pledges.get(node, _NEVER) for node in self.awaited), default=_ALWAYS)

    def _me(self) -> Leader:
        return Leader(self.node, self._lease.id)
