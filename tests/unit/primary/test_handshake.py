"""Every combination of both sides' state, and the one rule that must hold for all of them."""

from __future__ import annotations

import itertools

import pytest

from primary.handshake import Answer, Known, Plan, decide

MIRRORS = ("", "a", "b")
SESSIONS = (0, 1, 2)


@pytest.mark.parametrize(
    ("known_mirror", "known_session", "dirty", "mirror", "adopted", "blank", "consistent"),
    list(itertools.product(MIRRORS, SESSIONS, (False, True), ("a", "b"), SESSIONS, (False, True), (False, True))),
)
def test_nothing_is_skipped_unless_both_sides_tell_the_same_history(
    known_mirror: str, known_session: int, dirty: bool, mirror: str, adopted: int, blank: bool, consistent: bool
) -> None:
    plan = decide(Known(known_mirror, known_session, dirty), Answer(mirror, adopted, blank, consistent))
    same_history = known_mirror == mirror and known_session == adopted and adopted > 0
    if not same_history:
        assert plan is (Plan.FULL_SKIP_HOLES if blank else Plan.FULL)
    elif dirty or not consistent:
        assert plan is Plan.BITMAP  # never "in sync" with a dirty chunk, or into a half-done resync
    else:
        assert plan is Plan.NOTHING
