"""Every combination of what two copies can know, judged by rules that are written down a second time, as sets."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from uuid import UUID

import pytest

from stillpoint.replica import By, Decision, Generation, Outcome, Reason, Role, Side, Source, decide
from tests.unit.replica.handshake_table import BEGIN, END, README, made

OLD, MINE, THEIRS, BASE, OTHER_BASE = (Generation(1, UUID(int=number)) for number in range(1, 6))
VOLUME = UUID(int=100)


def _lineages() -> Iterator[tuple[Generation | None, tuple[Generation, ...], Generation | None]]:
    """Generation, history and peer's generation of one side. What names the sides' own generations is the same word on
    both, so that each combination of knowing and not knowing the other's appears."""
    for current in (None, OLD, MINE, THEIRS):
        for past in ((), (OLD,), (MINE,), (THEIRS,), (THEIRS, MINE)):
            for peer in (None, OLD, MINE, THEIRS):
                if current not in past and (current is not None or (not past and peer is None)):
                    yield current, past, peer


# full_sync_needed and discard are tried with each of the others, but not with both sides' whole product at once.
MARKS = [
    {"consistent": consistent, "up_to_date": up_to_date, "crashed_primary": crashed, "dirty_bytes": dirty}
    for consistent, up_to_date, crashed, dirty in itertools.product((True, False), (True, False), (True, False), (0, 9))
]
EXTRA: list[dict[str, bool]] = [
    {},
    {"full_sync_needed": True},
    {"discard": True},
    {"blank": True},
    {"blank": True, "full_sync_needed": True},
]
# bitmap and session of the one, and of the other
PROOFS: list[tuple[Generation | None, int, Generation | None, int]] = [
    (BASE, 3, BASE, 3),
    (BASE, 3, BASE, 2),
    (BASE, 0, BASE, 0),
    (BASE, 3, OTHER_BASE, 3),
    (BASE, 3, None, 3),
    (None, 3, None, 3),
]


def _side(
    lineage: tuple[Generation | None, tuple[Generation, ...], Generation | None], role: Role, **marks: bool | int
) -> Side:
    current, history, peer = lineage
    plain: dict[str, bool | int] = {
        "dirty_bytes": 0, "consistent": True, "up_to_date": True, "crashed_primary": False,
        "full_sync_needed": False, "blank": False, "discard": False, "session": 3,
    }  # fmt: skip
    return Side(
        volume=VOLUME, role=role, current=current, history=history, peer_generation=peer, bitmap=BASE,
        **(plain | marks),  # type: ignore[arg-type]
    )  # fmt: skip


def _with_proof(
    mine: Side, theirs: Side, proof: tuple[Generation | None, int, Generation | None, int]
) -> tuple[Side, Side]:
    return replace(mine, bitmap=proof[0], session=proof[1]), replace(theirs, bitmap=proof[2], session=proof[3])


def _all_lineages() -> Iterator[tuple[Side, Side]]:
    """Every pair of lineages, with roles and what tells whole copies apart."""
    marks: list[dict[str, bool | int]] = [
        {},
        {"up_to_date": False},
        {"discard": True},
        {"consistent": False},
        {"dirty_bytes": 9},
    ]
    sides = [_side(one, role, **mark) for one in _lineages() for role in Role for mark in marks]
    yield from itertools.product(sides, repeat=2)


RELATED: list[tuple[tuple[Generation | None, tuple[Generation, ...], Generation | None], ...]] = [
    ((MINE, (), None), (MINE, (), None)),  # the same
    ((MINE, (OLD,), None), (OLD, (), None)),  # they are older
    ((MINE, (), THEIRS), (THEIRS, (), None)),  # they are older; the history was too short
    ((MINE, (OLD,), None), (THEIRS, (OLD,), None)),  # diverged
    ((MINE, (), None), (THEIRS, (), None)),  # nothing shared
    ((MINE, (THEIRS,), None), (THEIRS, (MINE,), None)),  # impossible
    ((MINE, (), None), (None, (), None)),  # they hold nothing
    ((None, (), None), (None, (), None)),
]


def _all_marks() -> Iterator[tuple[Side, Side]]:
    """One pair of lineages of each kind, with every combination of everything else."""
    for one, other in RELATED:
        sides = (
            [_side(lineage, role, **marks, **extra) for role in Role for extra in EXTRA for marks in MARKS]
            for lineage in (one, other)
        )
        yield from itertools.product(*sides)


def _all() -> Iterator[tuple[Side, Side]]:
    yield from _all_lineages()
    for index, (mine, theirs) in enumerate(_all_marks()):
        # Each pair with one proof, in turn; with every proof where the proof alone can make the difference.
        plain = mine.usable and theirs.usable and not mine.crashed_primary and not theirs.crashed_primary
        for proof in PROOFS if plain else (PROOFS[index % len(PROOFS)],):
            yield _with_proof(mine, theirs, proof)


def _check(mine: Side, theirs: Side, decision: Decision) -> None:
    agree = mine.bitmap == theirs.bitmap is not None and mine.session == theirs.session > 0
    shape = (decision.source is not None, decision.by is not None, decision.reason is not None)
    assert shape == {
        Outcome.IN_SYNC: (False, False, False),
        Outcome.RESYNC: (True, True, False),
    }.get(decision.outcome, (False, False, True))

    whole = [side.current is not None and side.consistent for side in (mine, theirs)]
    trusted = [
        good and side.up_to_date and not side.discard and not side.full_sync_needed
        for good, side in zip(whole, (mine, theirs), strict=True)
    ]
    if decision.outcome is Outcome.IN_SYNC:
        assert mine.current == theirs.current
        assert not mine.dirty_bytes and not theirs.dirty_bytes
        assert agree and all(trusted)
        assert {mine.role, theirs.role} != {Role.PRIMARY}
    if decision.outcome is Outcome.RESYNC:
        source, target = (mine, theirs) if decision.source is Source.MINE else (theirs, mine)
        assert trusted[0 if source is mine else 1], "a source is whole and up to date"
        assert target.role is Role.STANDBY, "nobody's disk is overwritten while it serves clients"
        if decision.by is By.BITMAP:
            assert agree and not target.full_sync_needed
        if decision.by is By.FULL_SKIP_HOLES:
            assert target.blank, "holes may be skipped only onto zeroes"
        if decision.by is By.CHECKSUM:
            assert target.current is not None

    known = [
        {side.current, *side.history, side.peer_generation} - {None} if side.current else set()
        for side in (mine, theirs)
    ]
    neither_knows = mine.current not in known[1] and theirs.current not in known[0]
    diverged = all(whole) and neither_knows
    one_is_marked = mine.discard is not theirs.discard
    assert (decision.outcome is Outcome.SPLIT_BRAIN) == (diverged and bool(known[0] & known[1]) and not one_is_marked)
    if diverged and decision.outcome is Outcome.RESYNC:
        loser = theirs if decision.source is Source.MINE else mine
        assert loser.discard, "nothing is picked silently between two that diverged"
    if decision.outcome is Outcome.RESYNC and all(whole) and not diverged and mine.current != theirs.current:
        source_index = 0 if decision.source is Source.MINE else 1
        assert (theirs, mine)[source_index].current in known[source_index], "the newer is the source"


def test_every_combination_has_one_answer_that_both_sides_agree_on_and_that_loses_nothing() -> None:
    seen: Counter[tuple[Outcome, By | None, Reason | None]] = Counter()
    for mine, theirs in _all():
        decision = decide(mine, theirs)
        assert decide(theirs, mine) == decision.swapped, (mine, theirs)
        try:
            _check(mine, theirs, decision)
        except AssertionError:
            print(mine, theirs, decision, sep="\n")
            raise
        seen[decision.outcome, decision.by, decision.reason] += 1
    print(f"{seen.total()} combinations")
    assert {by for _, by, _ in seen} == {None, *By}
    assert {reason for _, _, reason in seen} == {None, *Reason} - {Reason.OTHER_VOLUME}


@pytest.mark.parametrize("outcome_of", [Role.PRIMARY, Role.STANDBY])
def test_copies_of_different_volumes_are_never_compared(outcome_of: Role) -> None:
    mine = _side((MINE, (), None), outcome_of)
    theirs = replace(_side((MINE, (), None), Role.STANDBY), volume=UUID(int=101))
    assert decide(mine, theirs) == Decision(Outcome.UNRELATED, reason=Reason.OTHER_VOLUME)


def test_a_crashed_primary_is_followed_before_a_standby_of_the_same_generation() -> None:
    """It may have acknowledged what the standby never got."""
    crashed = _side((MINE, (), None), Role.STANDBY, crashed_primary=True, dirty_bytes=4)
    standby = _side((MINE, (), None), Role.STANDBY)
    assert decide(crashed, standby) == Decision(Outcome.RESYNC, Source.MINE, By.BITMAP)


def test_a_promoted_standby_is_followed_before_the_crashed_primary() -> None:
    crashed = _side((OLD, (), OLD), Role.STANDBY, crashed_primary=True, dirty_bytes=4)
    promoted = _side((MINE, (OLD,), OLD), Role.PRIMARY, crashed_primary=True)
    assert decide(promoted, crashed) == Decision(Outcome.RESYNC, Source.MINE, By.BITMAP)
    assert decide(promoted, replace(crashed, role=Role.PRIMARY)) == Decision(
        Outcome.REFUSE, reason=Reason.STALE_PRIMARY, at=Source.THEIRS
    )


def test_the_table_in_the_readme_is_what_the_function_says() -> None:
    """Else: python -m tests.unit.replica.handshake_table"""
    assert BEGIN + made() + END in README.read_text()
