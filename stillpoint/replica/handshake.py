"""What two copies of a volume have to do when their nodes meet: a pure function of both nodes' states.

Invariants, each proven over the whole table (tests/unit/replica/test_handshake.py)
- Swapping the sides swaps the answer and changes nothing else, so both nodes come to the same decision on their own.
- IN_SYNC only if both maps are empty, both say what they are relative to, and it is the same.
- A source is whole and up to date, and is not to be discarded. A target is not serving clients.
- By bitmap only if both maps are relative to the same and the last session is the same on both sides: else one of them
  may come from a disk that was put back to an earlier day.
- Two whole copies of which neither knows the other's generation are never resolved here, unless an operator has marked
  exactly one of them.

The rules in order, with the reason of each, are the table in README.md, made from this function.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from uuid import UUID

from .generations import Generation


class Role(enum.Enum):
    PRIMARY = 1
    STANDBY = 2


class Outcome(enum.Enum):
    IN_SYNC = "in sync"
    RESYNC = "resync"
    SPLIT_BRAIN = "split brain"
    UNRELATED = "unrelated"
    REFUSE = "refuse"


class Source(enum.Enum):
    MINE = "mine"
    THEIRS = "theirs"

    @property
    def other(self) -> Source:
        return Source.THEIRS if self is Source.MINE else Source.MINE


class By(enum.Enum):
    """What is sent. After a role change the bitmap is the union of both sides' maps."""

    BITMAP = "what either dirty map holds"
    CHECKSUM = "what differs, found by comparing all"
    FULL = "everything, holes as zeroes"
    FULL_SKIP_HOLES = "all data, onto a copy that reads as zeroes"


class Reason(enum.Enum):
    OTHER_VOLUME = "the copies belong to different volumes"
    NOTHING_SHARED = "the copies have no generation in common"
    DIVERGED = "both copies were written to without the other one"
    BOTH_PRIMARY = "both nodes are primary; one of them must become standby first"
    STALE_PRIMARY = "the node with the older copy is primary; it must become standby first"
    SOURCE_NOT_UP_TO_DATE = "the copy to take the content from is not up to date"
    NO_WHOLE_COPY = "neither copy is whole"
    NO_PRIMARY = "nothing tells which copy to follow; promote one of the two"
    CONTRADICTION = "each copy claims to be newer than the other"


@dataclass(frozen=True, slots=True)
class Side:
    """One node's half: its copy, and what it knows of the other one's. Meanings: `state.py`."""

    volume: UUID
    role: Role
    current: Generation | None
    history: tuple[Generation, ...]
    peer_generation: Generation | None
    bitmap: Generation | None
    dirty_bytes: int
    consistent: bool
    up_to_date: bool
    crashed_primary: bool
    full_sync_needed: bool
    blank: bool
    discard: bool
    session: int

    @property
    def whole(self) -> bool:
        """The content is one that the volume had."""
        return self.current is not None and self.consistent

    @property
    def usable(self) -> bool:
        """May be a source."""
        return self.whole and self.up_to_date and not self.full_sync_needed and not self.discard

    def has_passed(self, generation: Generation | None) -> bool:
        """This copy holds whatever was acknowledged in `generation`, and has left that behind."""
        if generation is None or generation == self.current:
            return False
        return generation in self.history or generation == self.peer_generation


@dataclass(frozen=True, slots=True)
class Decision:
    """source, by: of a RESYNC. reason: of what is no RESYNC and not IN_SYNC. at: the side that a reason is about."""

    outcome: Outcome
    source: Source | None = None
    by: By | None = None
    reason: Reason | None = None
    at: Source | None = None

    @property
    def swapped(self) -> Decision:
        """The same decision as the other node sees it."""
        source = self.source.other if self.source else None
        at = self.at.other if self.at else None
        return Decision(self.outcome, source, self.by, self.reason, at)


def decide(mine: Side, theirs: Side) -> Decision:
    if mine.volume != theirs.volume:
        return Decision(Outcome.UNRELATED, reason=Reason.OTHER_VOLUME)
    if not mine.whole and not theirs.whole:
        return _refuse(Reason.NO_WHOLE_COPY)
    if not mine.whole:
        return _resync(mine, theirs, Source.THEIRS)
    if not theirs.whole:
        return _resync(mine, theirs, Source.MINE)
    if mine.current == theirs.current:
        return _same_generation(mine, theirs)
    they_are_older, i_am_older = mine.has_passed(theirs.current), theirs.has_passed(mine.current)
    if they_are_older and i_am_older:
        return _refuse(Reason.CONTRADICTION)
    if they_are_older:
        return _resync(mine, theirs, Source.MINE)
    if i_am_older:
        return _resync(mine, theirs, Source.THEIRS)
    return _diverged(mine, theirs)


def _same_generation(mine: Side, theirs: Side) -> Decision:
    if mine.role is theirs.role is Role.PRIMARY:
        return _refuse(Reason.BOTH_PRIMARY)
    if mine.usable and theirs.usable and not mine.dirty_bytes and not theirs.dirty_bytes and maps_agree(mine, theirs):
        return Decision(Outcome.IN_SYNC)
    # What makes a copy the one to follow, strongest first. A primary's clients have seen its content; a crashed
    # primary may have acknowledged what the standby has not; and a map with dirt says that the other copy lacks that.
    for mark_of_mine, mark_of_theirs in (
        (mine.role is Role.PRIMARY, theirs.role is Role.PRIMARY),
        (mine.usable, theirs.usable),
        (mine.crashed_primary, theirs.crashed_primary),
        (mine.dirty_bytes > 0, theirs.dirty_bytes > 0),
    ):
        if mark_of_mine is not mark_of_theirs:
            return _resync(mine, theirs, Source.MINE if mark_of_mine else Source.THEIRS)
    return _refuse(Reason.NO_PRIMARY)


def _diverged(mine: Side, theirs: Side) -> Decision:
    if mine.discard is not theirs.discard:
        return _resync(mine, theirs, Source.THEIRS if mine.discard else Source.MINE)
    known_of_mine = {mine.current, *mine.history, mine.peer_generation} - {None}
    known_of_theirs = {theirs.current, *theirs.history, theirs.peer_generation} - {None}
    if known_of_mine & known_of_theirs:
        return Decision(Outcome.SPLIT_BRAIN, reason=Reason.DIVERGED)
    return Decision(Outcome.UNRELATED, reason=Reason.NOTHING_SHARED)


def _resync(mine: Side, theirs: Side, source_side: Source) -> Decision:
    source, target = (mine, theirs) if source_side is Source.MINE else (theirs, mine)
    if not source.usable:
        return _refuse(Reason.SOURCE_NOT_UP_TO_DATE, source_side)
    if target.role is Role.PRIMARY:
        return _refuse(Reason.STALE_PRIMARY, source_side.other)
    return Decision(Outcome.RESYNC, source_side, _extent_of_resync(source, target))


def _extent_of_resync(source: Side, target: Side) -> By:
    if maps_agree(source, target) and not target.full_sync_needed:
        return By.BITMAP
    if target.blank:
        return By.FULL_SKIP_HOLES
    if target.current is None or target.full_sync_needed:
        return By.FULL
    return By.CHECKSUM


def maps_agree(mine: Side, theirs: Side) -> bool:
    """The two copies differ at most where one of the two dirty maps says so."""
    return mine.bitmap is not None and mine.bitmap == theirs.bitmap and mine.session == theirs.session != 0


def _refuse(reason: Reason, at: Source | None = None) -> Decision:
    return Decision(Outcome.REFUSE, reason=reason, at=at)
