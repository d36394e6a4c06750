"""The decision table of stillpoint/replica/README.md, made from the function.

`python -m tests.unit.replica.handshake_table` writes it there again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import stillpoint.replica
from stillpoint.replica import Decision, Generation, Outcome, Role, Side, Source, decide

README = Path(stillpoint.replica.__file__ or "").parent / "README.md"
BEGIN, END = "<!-- made from decide(): begin -->\n", "<!-- made from decide(): end -->\n"

_BASE, _ONE, _OTHER, _ANCESTOR = (Generation(1, UUID(int=number)) for number in range(1, 5))
# Two copies in sync and at rest; each row below changes something.
A = Side(
    volume=UUID(int=9),
    role=Role.PRIMARY,
    current=_ONE,
    history=(_ANCESTOR,),
    peer_generation=_ONE,
    bitmap=_BASE,
    dirty_bytes=0,
    consistent=True,
    up_to_date=True,
    crashed_primary=False,
    full_sync_needed=False,
    blank=False,
    discard=False,
    session=5,
)
B = replace(A, role=Role.STANDBY)

_LINEAGES: list[tuple[str, Side, Side]] = [
    ("the same", A, B),
    ("the same, something dirty", replace(A, dirty_bytes=1), B),
    ("B's is in A's past", replace(A, current=_OTHER, history=(_ONE, _ANCESTOR)), B),
    ("A's is in B's past", A, replace(B, current=_OTHER, history=(_ONE, _ANCESTOR))),
    ("neither is in the other's past, a past is shared", A, replace(B, current=_OTHER, peer_generation=_ANCESTOR)),
    ("nothing is shared", A, replace(B, current=_OTHER, history=(), peer_generation=None)),
    ("B has none: it never was whole", A, replace(B, current=None, history=(), peer_generation=None)),
    ("B's was left half-way by a resync", A, replace(B, consistent=False, up_to_date=False)),
]
_ROLES = [
    (Role.PRIMARY, Role.STANDBY),
    (Role.STANDBY, Role.PRIMARY),
    (Role.STANDBY, Role.STANDBY),
    (Role.PRIMARY, Role.PRIMARY),
]

_MARKS: list[tuple[str, Callable[[Side, Side], tuple[Side, Side]]]] = [
    ("A is not up to date", lambda a, b: (replace(a, up_to_date=False), b)),
    ("B is not up to date", lambda a, b: (a, replace(b, up_to_date=False))),
    ("A was primary and crashed", lambda a, b: (replace(a, crashed_primary=True), b)),
    ("B was primary and crashed", lambda a, b: (a, replace(b, crashed_primary=True))),
    ("A is marked to be given up", lambda a, b: (replace(a, discard=True), b)),
    ("B is marked to be given up", lambda a, b: (a, replace(b, discard=True))),
    ("B needs a full sync", lambda a, b: (a, replace(b, full_sync_needed=True))),
    ("the last session is not the same on both", lambda a, b: (a, replace(b, session=4))),
    ("the maps are relative to different things", lambda a, b: (a, replace(b, bitmap=None))),
]

_EXTENTS: list[tuple[str, Side]] = [
    ("maps and sessions agree", B),
    ("they do not, B has a generation", replace(B, bitmap=None)),
    ("they do not, B has none", replace(B, bitmap=None, current=None)),
    ("they do not, B reads as zeroes", replace(B, bitmap=None, current=None, blank=True)),
    ("B needs a full sync", replace(B, full_sync_needed=True)),
    ("B needs a full sync and reads as zeroes", replace(B, full_sync_needed=True, blank=True)),
]


def made() -> str:
    return "\n".join(
        [
            "**Who follows whom**, by the copies' generations (down) and the nodes' roles (across). Both copies are",
            "whole and up to date and their maps agree, unless the row says otherwise.",
            "",
            *_table(
                ["generations", *(f"A {_role(one)}, B {_role(other)}" for one, other in _ROLES)],
                (
                    [name, *(_words(replace(a, role=one), replace(b, role=other)) for one, other in _ROLES)]
                    for name, a, b in _LINEAGES
                ),
            ),
            "",
            "**What marks change**, with A primary and B standby, or both standby.",
            "",
            *_table(
                ["mark", "same generation", "same, both standby", "B's in A's past", "diverged, both standby"],
                ([name, *(_words(*mark(a, b)) for a, b in _marked())] for name, mark in _MARKS),
            ),
            "",
            "**What is sent**, from A to B.",
            "",
            *_table(["state of B", "by"], ([name, _by(side)] for name, side in _EXTENTS)),
            "",
        ]
    )


def _marked() -> list[tuple[Side, Side]]:
    older = _LINEAGES[2]
    diverged = _LINEAGES[4]
    return [
        (A, B),
        (replace(A, role=Role.STANDBY), B),
        (older[1], older[2]),
        (replace(diverged[1], role=Role.STANDBY), diverged[2]),
    ]


def _by(target: Side) -> str:
    by = decide(replace(A, current=_OTHER, history=(_ONE,)), target).by
    assert by is not None
    return f"{by.name}: {by.value}"


def _words(a: Side, b: Side) -> str:
    decision = decide(a, b)
    assert decide(b, a) == decision.swapped
    return _sentence(decision)


def _sentence(decision: Decision) -> str:
    names = {Source.MINE: "A", Source.THEIRS: "B"}
    if decision.source is not None and decision.by is not None:
        return f"{names[decision.source]} → {names[decision.source.other]}, {decision.by.name}"
    if decision.reason is None or decision.outcome is not Outcome.REFUSE:
        return decision.outcome.value if decision.outcome is Outcome.IN_SYNC else f"**{decision.outcome.value}**"
    at = f" ({names[decision.at]})" if decision.at else ""
    return f"refuse: {decision.reason.name}{at}"


def _role(role: Role) -> str:
    return role.name.lower()


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def main() -> None:
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + made() + END + after)


if __name__ == "__main__":
    main()
