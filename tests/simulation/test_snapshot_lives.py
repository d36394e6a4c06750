"""Lives of a volume on real files that Hypothesis invents and, when one goes wrong, makes as short as it can.

Unaligned changes from 512 bytes to 2 MiB, snapshots in stores small enough to fill, protected and limited ones, writes
to virtual devices, growth of volume and store, clean restarts and kills, against a byte array. `SNAPSHOT_LIVES=N` runs
more, `SNAPSHOT_SEED=S` others.
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
import pytest
from hypothesis import HealthCheck, strategies
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from standby.cow import SnapshotState, create_snapshots
from standby.cow.association_forms import FORMS
from stillpoint.devices import FileDevice, OverlayDevice
from stillpoint.devices.overlay import storage_size
from stillpoint.errors import Refused, StoreFull
from tests.support.cow import KIB, MIB, Rig, read

_LIVES = int(os.environ.get("SNAPSHOT_LIVES", "25"))
_SEED = int(os.environ.get("SNAPSHOT_SEED", "0"))
_STEPS = 40
_VOLUME_SIZE = 3 * MIB
_VOLUME_SIZE_MAX = 6 * MIB
_FULL = ("no room", "log", "memory store did not survive")
_OVER_LIMIT = "hold more than they may"

offsets = strategies.integers(0, _VOLUME_SIZE_MAX - 1)
counts = strategies.sampled_from((None, 0, 2, 3))
rooms = strategies.sampled_from((None, 0, 2 * MIB, 6 * MIB))
lengths = strategies.sampled_from((512, 513, 4096, 5000, 65536, 100_000, MIB, 2 * MIB))


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp(prefix="cow-life-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self.shots: dict[str, bytes] = {}
        self.marks: list[tuple[int, UUID, bytes]] = []
        self.virtual: dict[str, bytearray] = {}  # what was written to virtual devices, over what they showed
        self.protected: set[str] = set()
        self.limits: dict[str, int] = {}
        self.count = 0

    @initialize(
        block_size=strategies.sampled_from((512, 4 * KIB, 64 * KIB, MIB)),
        form=strategies.sampled_from(FORMS),
        store_size=strategies.sampled_from((4 * MIB, 12 * MIB, 64 * MIB)),
        expires=strategies.booleans(),
        protected=strategies.booleans(),
        count_max=counts,
        room=rooms,
    )
    def begin(
        self,
        block_size: int,
        form: str,
        store_size: int,
        expires: bool,
        protected: bool,
        count_max: int | None,
        room: int | None,
    ) -> None:
        async def main() -> None:
            self.rig = Rig(self.folder, size=_VOLUME_SIZE, block_size=block_size, expires=expires)
            self.rig.stores.create("default", kind="file", size=store_size, map_form=form)
            self.rig.stores.create("memory", kind="memory", size=store_size, map_form=form)

        self.runner.run(main())
        self.expires = expires
        self.truth = np.zeros(_VOLUME_SIZE, dtype=np.uint8)
        self.unsure = np.zeros(_VOLUME_SIZE, dtype=np.bool_)
        # There is something to lose from the first step on.
        self.write(0, _VOLUME_SIZE)
        self.snapshot(None, protected)
        self.limit(count_max, room, None)

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

    @rule(store=strategies.sampled_from((None, None, "memory")), protected=strategies.booleans())
    def snapshot(self, store: str | None, protected: bool) -> None:
        self._drop_displaced()
        name = f"s{self._next()}"
        count = len(self.rig.engine.snapshots())
        try:
            self.runner.run(create_snapshots([self.rig.engine], name, store))
        except Refused:
            assert 0 < self.limits.get("count_max", 0) <= count
            assert not self.rig.engine.limits.expires or len(self.protected) == count
            return
        self.shots[name] = self.truth.tobytes()
        if protected:
            self._protect(name, protected)
        self.unsure[:] = False
        if self.rig.engine.limits.expires:
            assert len(self.rig.engine.snapshots()) <= (self.limits.get("count_max", 0) or count + 1)

    @precondition(lambda self: self.shots)
    @rule(which=strategies.integers(0, 100))
    def delete(self, which: int) -> None:
        self._drop_displaced()
        names = [snapshot.name for snapshot in self.rig.engine.snapshots()]
        if names:
            name = names[which % len(names)]
            if name in self.protected:
                with pytest.raises(Refused, match="protected"):
                    self.runner.run(self.rig.engine.delete(name))
                return
            self.runner.run(self.rig.engine.delete(name))
            self._forget(name)

    def _forget(self, name: str) -> None:
        self.shots.pop(name, None)
        self.virtual.pop(name, None)
        self.protected.discard(name)
        self._overlay_path(name).unlink(missing_ok=True)

    @precondition(lambda self: self.shots)
    @rule(which=strategies.integers(0, 100), protected=strategies.booleans())
    def protect(self, which: int, protected: bool) -> None:
        self._drop_displaced()  # what has ended by now was not protected then
        names = [snapshot.name for snapshot in self.rig.engine.snapshots()]
        if names:
            self._protect(names[which % len(names)], protected)

    def _protect(self, name: str, protected: bool) -> None:
        self.runner.run(self.rig.engine.protect(name, protected))
        (self.protected.add if protected else self.protected.discard)(name)

    @rule(count_max=counts, room=rooms, expires=strategies.sampled_from((None, False, True)))
    def limit(self, count_max: int | None, room: int | None, expires: bool | None) -> None:
        wanted = {"count_max": count_max, "preserved_size_max": room, "expires": expires}
        own = {name: value for name, value in wanted.items() if value is not None}
        try:
            self.runner.run(self.rig.engine.set_limits(own))
        except Refused:
            assert own.get("count_max") or own.get("preserved_size_max")
        else:
            self.limits = own
        self.expires |= self.rig.engine.limits.expires

    @precondition(lambda self: self.shots)
    @rule(
        which=strategies.integers(0, 100),
        changes=strategies.lists(strategies.tuples(offsets, lengths, strategies.booleans()), min_size=1, max_size=6),
    )
    def write_to_virtual_device(self, which: int, changes: list[tuple[int, int, bool]]) -> None:
        self._drop_displaced()
        if not self.shots:
            return
        name = list(self.shots)[which % len(self.shots)]
        truth = self.virtual.setdefault(name, bytearray(self.shots[name]))
        device = self._overlay(name)
        try:
            for offset, length, is_data in changes:
                start = offset % len(truth)
                end = min(start + length, len(truth))
                data = random.Random(self._next()).randbytes(end - start) if is_data else bytes(end - start)
                if is_data:
                    device.write(start, [data])
                else:
                    device.write_zeroes(start, end - start)
                truth[start:end] = data
            device.flush()
            assert read(device, 0, device.size) == truth
        finally:
            device.close()

    def _overlay(self, name: str) -> OverlayDevice:
        path = self._overlay_path(name)
        base = self.rig.device(name)
        if path.exists():
            storage = FileDevice(path)
        else:
            storage = FileDevice.create(path, storage_size(base.size, self.rig.block_size))
        return OverlayDevice(base, storage, base_uuid="0" * 36, block_size=self.rig.block_size, check_base=base.check)

    def _overlay_path(self, name: str) -> Path:
        return self.folder / f"{name}.overlay"

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
        assert self.rig.engine.own_limits == self.limits

    @invariant()
    def nothing_is_lost(self) -> None:
        if self.count:
            assert self.rig.engine.read(0, len(self.truth)) == self.truth.tobytes()

    @rule()
    def every_snapshot_is_what_it_was(self) -> None:
        self._drop_displaced()
        for name, image in self.shots.items():
            assert self.rig.image(name) == image, name
        for name, written in self.virtual.items():
            device = self._overlay(name)
            try:
                assert read(device, 0, device.size) == written, name
            finally:
                device.close()

    def _drop_displaced(self) -> None:
        """Snapshots go when a store is full or a limit is reached, and those in memory with a restart; nothing else.

        Protected ones are never deleted, and never pay for a limit.
        """
        there = {snapshot.name: snapshot for snapshot in self.rig.engine.snapshots()}
        for name in list(self.shots):
            snapshot = there.get(name)
            if snapshot is None:
                assert self.expires and name not in self.protected, name
                self._forget(name)
            elif snapshot.state is SnapshotState.INVALID:
                reasons = _FULL if name in self.protected else (*_FULL, _OVER_LIMIT)
                assert any(reason in snapshot.invalid_reason for reason in reasons), snapshot.invalid_reason
                del self.shots[name]
                self.virtual.pop(name, None)

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
            self.runner.run(self.rig.engine.protect(snapshot.name, False))
            self.runner.run(self.rig.engine.delete(snapshot.name))
        self.runner.run(self.rig.engine.flush())
        assert [store.used_size for store in self.rig.stores.list()] == [0, 0]
        self.runner.run(self.rig.close())


@pytest.mark.timeout(120 + 3 * _LIVES)
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
