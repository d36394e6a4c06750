"""Random lives of two or three copies of a volume, and the same with one rule left out: each has to be caught.

Rules whose lack takes two rare accidents at once to show are left to the exhaustive table of the handshake and to the
tests of the transitions (tests/unit/replica).

`REPLICA_WALKS=N` runs more of them, `REPLICA_SEED=S` begins at another seed; a failure names its seed.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

import stillpoint.replica
from tests.simulation.replica_world import Violation, World
from tests.support.mutants import Mutant, imported

_WALKS = int(os.environ.get("REPLICA_WALKS", "1500"))
_SEED = int(os.environ.get("REPLICA_SEED", "0"))
_MUTANT_WALKS_MAX = 6000


def test_no_acknowledged_write_is_lost_silently_and_what_is_called_in_sync_is_equal() -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(_SEED, _SEED + _WALKS):
        world = World(stillpoint.replica, seed)
        try:
            world.run()
        except Exception as error:
            print(*world.log, sep="\n")
            raise AssertionError(f"REPLICA_SEED={seed} REPLICA_WALKS=1: {error}") from error
        outcomes.update(world.outcomes)
    print(f"{_WALKS} walks from seed {_SEED}; in how many each decision was met: {dict(outcomes)}")
    if _WALKS >= 1000:
        assert {"IN_SYNC", "BITMAP", "CHECKSUM", "FULL", "FULL_SKIP_HOLES", "SPLIT_BRAIN", "STALE_PRIMARY"} <= set(
            outcomes
        )


MUTANTS = (
    Mutant(
        "in sync with a dirty map",
        "handshake.py",
        " and not mine.dirty_bytes and not theirs.dirty_bytes",
        "",
        seed=1998,
    ),
    Mutant(
        "the session is no part of the proof",
        "handshake.py",
        " and mine.session == theirs.session != 0",
        "",
        seed=16496,
    ),
    Mutant(
        "by bitmap whatever the maps are relative to",
        "handshake.py",
        "return mine.bitmap is not None and mine.bitmap == theirs.bitmap and",
        "return",
        seed=573,
    ),
    Mutant(
        "the primary wins a split brain",
        "handshake.py",
        "    if mine.discard is not theirs.discard:\n",
        "    if mine.role is not theirs.role:\n"
        "        return _resync(mine, theirs, Source.MINE if mine.role is Role.PRIMARY else Source.THEIRS)\n"
        "    if mine.discard is not theirs.discard:\n",
        seed=0,
    ),
    Mutant(
        "a resync onto a copy that is to give up all takes only what the maps hold",
        "handshake.py",
        "if maps_agree(source, target) and not target.full_sync_needed:",
        "if maps_agree(source, target) or target.full_sync_needed:",
        seed=220,
    ),
    Mutant("holes are skipped onto any copy", "handshake.py", "    if target.blank:\n", "    if True:\n", seed=69),
    Mutant(
        "nothing is minted for an answer without a peer",
        "transitions.py",
        "peer.generation is not None and peer.generation == state.current and peer.uuid not in held",
        "False",
        seed=5,
    ),
    Mutant(
        "nothing is minted at promotion",
        "transitions.py",
        "        current=fresh,\n        history=remember(state.current, state.history),\n    )",
        "    )",
        seed=409,
    ),
    Mutant(
        "a peer's generation is noted when it finished, not before it is offered",
        "transitions.py",
        "return state.with_peer(replace(state.peer(target), generation=state.current))",
        "return state",
        seed=5,
    ),
    Mutant(
        "peers in sync are not noted as holding the new generation",
        "transitions.py",
        "replace(peer, generation=fresh) if peer.uuid in held else peer",
        "peer",
        seed=120,
    ),
    Mutant(
        "a session leaves the maps for other nodes standing",
        "transitions.py",
        "    return _forget_others(adopted, peer)\n",
        "    return adopted\n",
        seed=2999,
    ),
    Mutant(
        "the target stays whole while a resync writes to it",
        "transitions.py",
        "given_up = Flags.CONSISTENT | ",
        "given_up = ",
        seed=0,
    ),
    Mutant(
        "a rolled back copy keeps what its maps are relative to",
        "transitions.py",
        "peers = tuple(replace(peer, bitmap=None) for peer in state.peers)",
        "peers = state.peers",
        seed=834,
    ),
    Mutant(
        "a copy that is not whole may be promoted",
        "transitions.py",
        "if state.current is None or not state.has(Flags.CONSISTENT):",
        "if state.current is None:",
        seed=15800,
    ),
    Mutant(
        "a node that is primary takes part in a clean cut",
        "transitions.py",
        "if state.role is Role.PRIMARY or not state.has(_WHOLE) or state.current != at:",
        "if False:",
        seed=2657,
    ),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_rule_left_out_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    with imported(mutant, stillpoint.replica, tmp_path) as replica:
        for seed in (mutant.seed, *range(_MUTANT_WALKS_MAX)):
            try:
                World(replica, seed).run()
            except (Violation, AssertionError) as error:
                print(f"caught by seed {seed}: {error}")
                return
    pytest.fail(f"not caught by {_MUTANT_WALKS_MAX} walks")
