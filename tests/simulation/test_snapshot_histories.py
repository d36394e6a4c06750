"""Random lives of a volume with power losses and kills at every kind of step, checked against a plain model.

`SNAPSHOT_HISTORIES=N` runs more of them, `SNAPSHOT_SEED=S` begins at another seed; a failure names its seed.
"""

from __future__ import annotations

import os
import time

import pytest

import standby.cow
from tests.simulation.cow_history import History

_HISTORIES = int(os.environ.get("SNAPSHOT_HISTORIES", "200"))
_FIRST_SEED = int(os.environ.get("SNAPSHOT_SEED", "0"))


def test_a_history_follows_from_its_seed_alone() -> None:
    for seed in range(4):
        first, second = History(standby.cow, seed), History(standby.cow, seed)
        first.run()
        second.run()
        assert first.choose.getstate() == second.choose.getstate()


@pytest.mark.timeout(60 + _HISTORIES)
def test_no_crash_loses_or_changes_a_snapshot() -> None:
    states = 0
    started = time.monotonic()
    for seed in range(_FIRST_SEED, _FIRST_SEED + _HISTORIES):
        history = History(standby.cow, seed)
        try:
            history.run()
        except BaseException:
            print(f"history {seed} failed: SNAPSHOT_SEED={seed} SNAPSHOT_HISTORIES=1 runs it again")
            raise
        states += history.states_checked
    print(f"{_HISTORIES} histories from seed {_FIRST_SEED}, {states} crash states, {time.monotonic() - started:.0f} s")
