"""Random lives for as long as there is time: `make torture SECONDS=300 [SEED=N]`.

In turn, each from a new seed: histories of the snapshot engine with power losses and kills at every kind of step, its
lives on real files, walks of two and three copies of a volume, and runs of the automatic failover. Says every seed that
failed and how to run it again; ends with status 1 then.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable

import standby.cow
import stillpoint.failover
import stillpoint.replica
from tests.simulation import failover_world, replica_world
from tests.simulation.cow_history import History

_ROUND_S = 20.0
_LIVES = 20
_WALKS_PER_FAILOVER = 5


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.torture", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000 * 1000, help="where to begin")
    arguments = parser.parse_args()
    began = time.monotonic()
    seed = arguments.seed
    histories = states = lives = walks = failovers = 0
    violations: list[str] = []
    done = "nothing"
    while (left := arguments.seconds - (time.monotonic() - began)) > 0:
        round_ends = time.monotonic() + min(_ROUND_S, left)
        while time.monotonic() < round_ends:
            history = History(standby.cow, seed)
            if not _holds(history.run):
                violations.append(
                    f"SNAPSHOT_SEED={seed} SNAPSHOT_HISTORIES=1 tests/simulation/test_snapshot_histories.py"
                )
            histories += 1
            states += history.states_checked
            seed += 1
        if not _lives(seed):
            violations.append(f"SNAPSHOT_SEED={seed} SNAPSHOT_LIVES={_LIVES} tests/simulation/test_snapshot_lives.py")
        lives += _LIVES
        round_ends = time.monotonic() + min(_ROUND_S, max(0, arguments.seconds - (time.monotonic() - began)))
        while time.monotonic() < round_ends:
            for _ in range(_WALKS_PER_FAILOVER):
                if not _holds(replica_world.World(stillpoint.replica, seed).run):
                    violations.append(f"REPLICA_SEED={seed} REPLICA_WALKS=1 tests/simulation/test_replica_walks.py")
                walks, seed = walks + 1, seed + 1
            if not _holds(failover_world.World(stillpoint.failover, seed).run):
                violations.append(f"FAILOVER_SEED={seed} FAILOVER_RUNS=1 tests/simulation/test_failover.py")
            failovers += 1
        done = f"{histories} histories, {states} crash states, {lives} lives, {walks} walks, {failovers} failover runs"
        print(f"{time.monotonic() - began:6.0f} s: {done}", flush=True)
    for violation in violations:
        print(f"violation: {violation}")
    print(f"{done} from seed {arguments.seed}: {len(violations)} violations")
    return 1 if violations else 0


def _holds(run: Callable[[], object]) -> bool:
    try:
        run()
    except Exception:  # noqa: BLE001 - whatever it is, it is told, and the rest goes on
        traceback.print_exc()
        return False
    return True


def _lives(seed: int) -> bool:
    """In a process of its own, as a test, so that what Hypothesis found is said the way it says it."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/simulation/test_snapshot_lives.py"],
        env={**os.environ, "SNAPSHOT_LIVES": str(_LIVES), "SNAPSHOT_SEED": str(seed)},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        print(run.stdout, run.stderr)
    return run.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
