"""Automatic failover, simulated; and with one rule left out, which has to be caught.

`FAILOVER_RUNS=N` runs more of them, `FAILOVER_SEED=S` begins at another seed; a failure names its seed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import stillpoint.failover
from tests.simulation.failover_world import Violation, World
from tests.support.mutants import Mutant, imported

_RUNS = int(os.environ.get("FAILOVER_RUNS", "1000"))
_SEED = int(os.environ.get("FAILOVER_SEED", "0"))
_MUTANT_RUNS_MAX = 1500


def test_no_acknowledged_write_is_lost_and_no_read_is_stale() -> None:
    reads = promotions = writes = 0
    for seed in range(_SEED, _SEED + _RUNS):
        world = World(stillpoint.failover, seed)
        try:
            world.run()
        except Exception as error:
            print(*world.log, sep="\n")
            raise AssertionError(f"FAILOVER_SEED={seed} FAILOVER_RUNS=1: {error}") from error
        reads, promotions, writes = (
            reads + world.reads,
            promotions + world.promotions,
            writes + len(world.acknowledged),
        )
    print(f"{_RUNS} runs from seed {_SEED}: {promotions} promotions, {writes} writes acknowledged, {reads} reads")


MUTANTS = (
    Mutant(
        "the set shrinks here first",
        "member.py",
        "        return (self.observed.members.nodes | self._joining) - {self.node}",
        "        return (self.observed.members.nodes | self._joining) - {self.node} - self._wants_out",
        seed=0,
    ),
    Mutant(
        "any standby is promoted",
        "in_sync_set.py",
        "    return node in observed.members.nodes\n",
        "    return True\n",
        seed=0,
    ),
    Mutant(
        "a promotion does not compare the set",
        "in_sync_set.py",
        "return Transaction(0, observed.members_modified, me, members, unless_paused=True)",
        "return Transaction(0, None, me, members, unless_paused=True)",
        seed=821,
    ),
    Mutant(
        "a standby joins before it is resynced",
        "member.py",
        "readiness.resynced and readiness.live and readiness.caught_up",
        "True",
        seed=7,
    ),
    Mutant("a standby joins before it has caught up", "member.py", " and readiness.caught_up", "", seed=7),
    Mutant(
        "who joins is waited for only when etcd has confirmed it",
        "member.py",
        "self.observed.members.nodes | self._joining) - {self.node}",
        "self.observed.members.nodes) - {self.node}",
        seed=1,
    ),
    Mutant(
        "who is lost while it joins is no longer waited for",
        "member.py",
        "        if self._asked is None and self._in_doubt is None:\n",
        "        if True:\n",
        seed=5,
    ),
    Mutant(
        "a join without an answer is taken for one that was not done",
        "member.py",
        "        if self._in_doubt is None:\n            self._joining",
        "        if True:\n            self._joining",
        seed=72,
    ),
    Mutant(
        "reads are answered without a lease",
        "member.py",
        "return self.part is Part.PRIMARY and now_s < self.serves_until_s",
        "return self.part is Part.PRIMARY",
        seed=1,
    ),
    Mutant(
        "a new lease vouches for a key bound to an old one",
        "member.py",
        "self._lease.serves_until_s if self.observed.leader == self._me() else _NEVER",
        "self._lease.serves_until_s",
        seed=136,
    ),
    Mutant("one pledge is enough", "member.py", "return min((self._pledges", "return max((self._pledges", seed=140),
    Mutant(
        "a pledge is forgotten",
        "member.py",
        "        self._no_promotion_before_s = max(self._no_promotion_before_s, now_s + self._times.ttl_s)\n",
        "",
        seed=5,
    ),
    Mutant(
        "a process may forget what the one before it pledged",
        "member.py",
        "self._no_promotion_before_s = started_s + self._times.ttl_s",
        "self._no_promotion_before_s = started_s",
        seed=430,
    ),
    Mutant(
        "a pledge is given while a promotion is on its way",
        "member.py",
        "if self.part is not Part.STANDBY or promoting or epoch < self.copy.epoch:",
        "if self.part is not Part.STANDBY or epoch < self.copy.epoch:",
        seed=72,
    ),
    Mutant(
        "a pledge is given to a primary of an older epoch", "member.py", " or epoch < self.copy.epoch:", ":", seed=1192
    ),
    Mutant(
        "a primary goes on in the set it had when another epoch has begun",
        "member.py",
        "        if members is None or members.epoch != self.epoch or self.node not in members.nodes:\n"
        "            return True\n",
        "",
        seed=43,
    ),
    Mutant(
        "it is handed over to whom nobody waits for",
        "member.py",
        "        if self.part is not Part.PRIMARY or to not in self._could_follow():\n",
        "        if self.part is not Part.PRIMARY:\n",
        seed=1,
    ),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_rule_left_out_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    with imported(mutant, stillpoint.failover, tmp_path) as failover:
        for seed in (mutant.seed, *range(_MUTANT_RUNS_MAX)):
            try:
                World(failover, seed).run()
            except (Violation, AssertionError) as error:
                print(f"caught by seed {seed}: {error}")
                return
    pytest.fail(f"not caught by {_MUTANT_RUNS_MAX} runs")
