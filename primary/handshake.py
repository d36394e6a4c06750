"""What a returning standby has to be sent: a pure decision over both sides' state.

The two sides know of each other by one number: the session. The standby makes it durable that it adopted session N
before it says so, and the primary makes it durable that it uses session N before it sends a frame in it. So, if both
name the same mirror and the same session, every frame that the mirror took is one that this primary sent, and what the
primary holds as dirty covers everything that the mirror may lack. In every other case nothing is known about the
difference between the two, and everything is sent.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Plan(enum.Enum):
    NOTHING = "in sync already"
    BITMAP = "copy what changed meanwhile"
    FULL = "copy everything, holes as zeroes"
    FULL_SKIP_HOLES = "copy all data onto a mirror that reads as zeroes"


@dataclass(frozen=True, slots=True)
class Known:
    """The primary's side."""

    mirror_uuid: str  # empty: no mirror was ever attached
    session: int  # the last one used; 0: none
    dirty: bool  # the dirty map has dirty chunks


@dataclass(frozen=True, slots=True)
class Answer:
    """The standby's side."""

    mirror_uuid: str
    adopted_session: int  # the last one adopted; 0: none
    blank: bool  # never written
    consistent: bool


def decide(known: Known, answer: Answer) -> Plan:
    same_history = known.mirror_uuid == answer.mirror_uuid and known.session == answer.adopted_session != 0
    if same_history:
        # A mirror left inside a resync holds what it was sent; the rest is still marked dirty here.
        return Plan.BITMAP if known.dirty or not answer.consistent else Plan.NOTHING
    return Plan.FULL_SKIP_HOLES if answer.blank else Plan.FULL
