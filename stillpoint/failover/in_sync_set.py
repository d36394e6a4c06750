"""What etcd holds for one volume, and the only transactions that change it. Pure values.

    leader    {node, lease}; bound to the lease of the node, so that it goes when that does
    members   {epoch, nodes}: the in-sync set. Every write ever acknowledged is on every one of them
    paused    exists while an operator wants no automatic promotion

Invariants
- `members` loses a node only in a transaction of the leader, or of the promotion that makes a member leader.
- A write is acknowledged without a node only after the transaction that removed it.
- Only a member becomes leader, and the transaction compares the very set that it was found in.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Key(enum.Enum):
    LEADER = "leader"
    MEMBERS = "members"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class Leader:
    """lease: tells a process from an earlier one of the same node."""

    node: str
    lease: int


@dataclass(frozen=True, slots=True)
class Members:
    epoch: int
    nodes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Observed:
    """One linearizable look. leader_created, members_modified: etcd's revisions; 0: the key does not exist."""

    leader: Leader | None = None
    leader_created: int = 0
    members: Members | None = None
    members_modified: int = 0
    paused: bool = False


@dataclass(frozen=True, slots=True)
class Transaction:
    """Done as a whole if each key still has the revision named, 0 for absent; else not at all.

    leader_created: the revision in which the leader's key was created. unless_paused: also compares that there is no
    pause. leader, members: what is written; None: left as it is. A leader is bound to the lease that it names.
    resigns: the leader's key goes.
    """

    leader_created: int
    members_modified: int
    leader: Leader | None = None
    members: Members | None = None
    unless_paused: bool = False
    resigns: bool = False


def is_vacant_for(observed: Observed, node: str) -> bool:
    """There is no leader, and the node may become it."""
    if observed.leader is not None or observed.paused or observed.members is None:
        return False
    return node in observed.members.nodes


def promotion(observed: Observed, me: Leader, *, epoch_min: int) -> Transaction:
    """Of a member, while the leader's place is vacant for it. epoch_min: one more than any this node has heard of.

    The set becomes this node alone: the others have to be handshaken with first.
    """
    assert observed.members is not None
    members = Members(max(observed.members.epoch + 1, epoch_min), frozenset({me.node}))
    return Transaction(0, observed.members_modified, me, members, unless_paused=True)


def first_leader(me: Leader, *, epoch: int) -> Transaction:
    """Of a volume that etcd does not know yet, by the node that serves it."""
    return Transaction(0, 0, me, Members(epoch, frozenset({me.node})))


def reacquisition(observed: Observed, me: Leader) -> Transaction:
    """Of a primary whose lease ended while every member had pledged not to take over. Nothing but the key changes."""
    return Transaction(0, observed.members_modified, leader=me)


def change(observed: Observed, nodes: frozenset[str]) -> Transaction:
    """By the leader, of the members."""
    assert observed.members is not None
    members = Members(observed.members.epoch, nodes)
    return Transaction(observed.leader_created, observed.members_modified, members=members)


def handing_over(observed: Observed, to: str) -> Transaction:
    """By the leader, which has stopped: one member alone is left, and the place is vacant for it."""
    assert observed.members is not None
    members = Members(observed.members.epoch, frozenset({to}))
    return Transaction(observed.leader_created, observed.members_modified, members=members, resigns=True)
