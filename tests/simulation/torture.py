"""The snapshot engine's random lives for as long as there is time: `make torture SECONDS=300 [SEED=N]`.

Histories with power losses and kills at every kind of step, and lives on real files, in turn, each from a new seed.
Says every seed that failed and how to run it again; ends with status 1 then.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback

import standby.cow
from tests.simulation.cow_history import History

_ROUND_S = 20.0
_LIVES = 20


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.torture", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000 * 1000, help="where to begin")
    arguments = parser.parse_args()
    began = time.monotonic()
    seed = arguments.seed
    histories = states = lives = 0
    violations: list[str] = []
    while (left := arguments.seconds - (time.monotonic() - began)) > 0:
        round_ends = time.monotonic() + min(_ROUND_S, left)
        while time.monotonic() < round_ends:
            history = History(standby.cow, seed)
            try:
                history.run()
            except Exception:  # noqa: BLE001 - whatever it is, it is told, and the rest goes on
                traceback.print_exc()
                violations.append(
                    f"SNAPSHOT_SEED={seed} SNAPSHOT_HISTORIES=1 tests/simulation/test_snapshot_histories.py"
                )
            histories += 1
            states += history.states_checked
            seed += 1
        if not _lives(seed):
            violations.append(f"SNAPSHOT_SEED={seed} SNAPSHOT_LIVES={_LIVES} tests/simulation/test_snapshot_lives.py")
        lives += _LIVES
        print(
            f"{time.monotonic() - began:6.0f} s: {histories} histories, {states} crash states, {lives} lives",
            flush=True,
        )
    for violation in violations:
        print(f"violation: {violation}")
    print(
        f"{histories} histories, {states} crash states, {lives} lives from seed {arguments.seed}: "
        f"{len(violations)} violations"
    )
    return 1 if violations else 0


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
