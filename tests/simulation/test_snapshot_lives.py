"""Lives of a volume on real files that Hypothesis invents and, when one goes wrong, makes as short as it can.

Unaligned changes from 512 bytes to 2 MiB, snapshots in stores small enough to fill, growth of volume and store, clean
restarts and kills, against a byte array. `SNAPSHOT_LIVES=N` runs more, `SNAPSHOT_SEED=S` others.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
from pathlib import Path
from uuid import UUID

import hypothesis
import numpy as np
from hypothesis import HealthCheck, strategies
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from standby.cow import SnapshotState
from standby.cow.association_forms import FORMS
from stillpoint.errors import StoreFull
from tests.support.cow import KIB, MIB, Rig

_LIVES = int(os.environ.get("SNAPSHOT_LIVES", "25"))
_SEED = int(os.environ.get("SNAPSHOT_SEED", "0"))
_STEPS = 40
_VOLUME_SIZE = 3 * MIB
_VOLUME_SIZE_MAX = 6 * MIB
_FULL = ("no room", "log", "memory store did not survive")

offsets = strategies.integers(0, _VOLUME_SIZE_MAX - 1)
lengths = strategies.sampled_from((512, 513, 4096, 5000, 65536, 100_000, MIB, 2 * MIB))


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp(prefix="cow-life-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self.shots: dict[str, bytes] = {}
        self.marks: list[tuple[int, UUID, bytes]] = []
        self.count = 0

    @initialize(
        block_size=strategies.sampled_from((512, 4 * KIB, 64 * KIB, MIB)),
        form=strategies.sampled_from(FORMS),
        store_size=strategies.sampled_from((4 * MIB, 12 * MIB, 64 * MIB)),
        expires=strategies.booleans(),
    )
    def begin(self, block_size: int, form: str, store_size: int, expires: bool) -> None:
        async def main() -> None:
            self.rig = Rig(self.folder, size=_VOLUME_SIZE, block_size=block_size, expires=expires)
            self.rig.stores.create("default", kind="file", size=store_size, map_form=form)
            self.rig.stores.create("memory", kind="memory", size=store_size, map_form=form)

        self.runner.run(main())
        self.expires = expires
        self.truth = np.zeros(_VOLUME_SIZE, dtype=np.uint8)
        self.unsure = np.zeros(_VOLUME_SIZE, dtype=np.bool_)

    def _next(self) -> int:
        self.count += 1
        return self.count

    def _range(self, offset: int, length: int) -> slice:
        start = offset % len(self.truth)
        return slice(start, min(start + length, len(self.truth)))

    @rule(offset=offsets, length=lengths)
    def write(self, offset: int, length: int) -> None:
        where = self._range(offset, length)
        data = random.Random(self._next()).randbytes(where.stop - where.start)
        self._change(where, data, lambda: self.rig.engine.write(where.start, memoryview(data)))

    @rule(offset=offsets, length=lengths, trim=strategies.booleans())
    def zero(self, offset: int, length: int, trim: bool) -> None:
        where = self._range(offset, length)
        count = where.stop - where.start
        engine = self.rig.engine
        method = engine.trim if trim else engine.write_zeroes
        self._change(where, bytes(count), lambda: method(where.start, count))

    def _change(self, where: slice, data: bytes, change: object) -> None:
        async def main() -> None:
            change()  # type: ignore[operator]

        self.runner.run(main())
        self.truth[where] = np.frombuffer(data, dtype=np.uint8)
        self.unsure[where] = True

    @rule(flush=strategies.booleans())
    def commit(self, flush: bool) -> None:
        self.runner.run(self.rig.engine.flush() if flush else self.rig.engine.commit())
        self.unsure[:] = False

    @rule(store=strategies.sampled_from((None, None, "memory")))
    def snapshot(self, store: str | None) -> None:
        name = f"s{self._next()}"
        self.shots[name] = self.truth.tobytes()
        self.runner.run(self.rig.snapshot(name, store))
        self.unsure[:] = False

    @precondition(lambda self: self.shots)
    @rule(which=strategies.integers(0, 100))
    def delete(self, which: int) -> None:
        self._drop_displaced()
        names = [snapshot.name for snapshot in self.rig.engine.snapshots()]
        if names:
            name = names[which % len(names)]
            self.shots.pop(name, None)
            self.runner.run(self.rig.engine.delete(name))

    @precondition(lambda self: self.shots)
    @rule(which=strategies.integers(0, 100))
    def bookmark(self, which: int) -> None:
        self._drop_displaced()
        if self.shots:
            name = list(self.shots)[which % len(self.shots)]
            mark = self.runner.run(self.rig.engine.bookmark(f"b{self._next()}", name))
            self.marks.append((mark.generation, mark.incarnation, self.shots[name]))

    @precondition(lambda self: self.shots and self.marks)
    @rule(which=strategies.integers(0, 100), base=strategies.integers(0, 100))
    def changed(self, which: int, base: int) -> None:
        self._drop_displaced()
        if not self.shots:
            return
        name = list(self.shots)[which % len(self.shots)]
        generation, incarnation, image = self.marks[base % len(self.marks)]
        if generation > self.rig.engine.get(name).generation:
            return
        answer = self.runner.run(self.rig.engine.changed(name, base=generation, incarnation=incarnation))
        assert answer.known
        patched = bytearray(image.ljust(len(self.shots[name]), b"\0"))
        for extent in answer.extents:
            patched[extent.offset : extent.end] = self.shots[name][extent.offset : extent.end]
        assert patched == self.shots[name]

    @precondition(lambda self: len(self.truth) < _VOLUME_SIZE_MAX)
    @rule()
    def grow_volume(self) -> None:
        self.runner.run(self.rig.engine.resize(len(self.truth) + MIB))
        self.truth = np.concatenate((self.truth, np.zeros(MIB, dtype=np.uint8)))
        self.unsure = np.zeros(len(self.truth), dtype=np.bool_)

    @rule()
    def grow_store(self) -> None:
        try:
            self.rig.stores.resize("default", self.rig.stores.get("default").device.size + 2 * MIB)
        except StoreFull:
            return  # its log is

    @rule(clean=strategies.booleans())
    def restart(self, clean: bool) -> None:
        """Not clean: the process is killed. What it had staged may be there or not."""
        self.runner.run(self.rig.engine.close(clean=clean))

        async def main() -> None:
            self.rig.reopen()

        self.runner.run(main())
        if not clean:
            now = np.frombuffer(self.rig.engine.read(0, len(self.truth)), dtype=np.uint8)
            self.truth = np.where(self.unsure, now, self.truth)
        self.unsure[:] = False

    @invariant()
    def nothing_is_lost(self) -> None:
        if self.count:
            assert self.rig.engine.read(0, len(self.truth)) == self.truth.tobytes()

    @rule()
    def every_snapshot_is_what_it_was(self) -> None:
        self._drop_displaced()
        for name, image in self.shots.items():
            assert self.rig.image(name) == image, name

    def _drop_displaced(self) -> None:
        """Snapshots go when a store is full, and those in memory with a restart; for no other reason."""
        there = {snapshot.name: snapshot for snapshot in self.rig.engine.snapshots()}
        for name in list(self.shots):
            snapshot = there.get(name)
            if snapshot is None:
                assert self.expires, name
                del self.shots[name]
            elif snapshot.state is SnapshotState.INVALID:
                assert any(reason in snapshot.invalid_reason for reason in _FULL), snapshot.invalid_reason
                del self.shots[name]

    def teardown(self) -> None:
        try:
            if hasattr(self, "rig"):
                self._end()
        finally:
            self.runner.close()
            shutil.rmtree(self.folder)

    def _end(self) -> None:
        self.every_snapshot_is_what_it_was()
        for snapshot in self.rig.engine.snapshots():
            self.runner.run(self.rig.engine.delete(snapshot.name))
        self.runner.run(self.rig.engine.flush())
        assert [store.used_size for store in self.rig.stores.list()] == [0, 0]
        self.runner.run(self.rig.close())


def test_no_life_that_can_be_invented_loses_a_write_or_changes_a_snapshot() -> None:
    run_state_machine_as_test(
        hypothesis.seed(_SEED)(Life),
        settings=hypothesis.settings(
            max_examples=_LIVES,
            stateful_step_count=_STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{_LIVES} lives of up to {_STEPS} steps, seed {_SEED}")
