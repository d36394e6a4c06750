"""One random life of a volume under the real snapshot engine, crashes included, beside the plain model.

The engine's package is a parameter, so that copies with deliberate faults live in the same world. Everything follows
from the seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import numpy as np

from stillpoint.errors import StoreFull
from tests.simulation.cow_model import Model, Violation, to_bytes
from tests.simulation.cow_world import MAP_FORMS, STORE_GROWTH, World
from tests.simulation.stepping_device import PowerLoss
from tests.support.devices import SECTOR_SIZE


class History:
    """One random life of a volume: changes, snapshots, deletions, restarts, crashes; checked against the model."""

    def __init__(self, cow: Any, seed: int, *, steps: int = 40, crashes: int = 5) -> None:
        self.cow = cow
        self.choose = random.Random(seed)
        self.map_form = MAP_FORMS[seed % len(MAP_FORMS)]
        self.steps = steps
        self.crashes = crashes
        self.block_size = self.choose.choice((512, 2048, 4096))
        self.sector_count = self.choose.choice((4, 16, 64)) * self.block_size // SECTOR_SIZE
        self.model = Model(self.sector_count)
        self.shots: dict[str, bytes] = {}
        self.in_memory: set[str] = set()
        self.doubtful: dict[str, bytes] = {}  # being made or deleted when the power failed: there or not, never wrong
        self.marks: list[tuple[int, Any, bytes]] = []
        self.stamp = 0
        self.states_checked = 0
        self.displaced = 0
        self.grows = seed // len(MAP_FORMS) % 5 == 1  # its durable store, a few times

    def run(self) -> None:
        size = self.sector_count * SECTOR_SIZE
        world = World(self.cow, self.choose, size=size, block_size=self.block_size, map_form=self.map_form)
        try:
            with world.files_are_steps():
                asyncio.run(self._run(world))
        finally:
            world.close()

    async def _run(self, world: World) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        engine = world.start()
        for _ in range(self.crashes + 1):
            world.arm(self.choose.choice((20, 60, 150, 10_000)), keeps_page_cache=self.choose.random() < 0.3)
            try:
                for _ in range(self.steps):
                    await self._step(world, engine)
                if self.choose.random() < 0.5:
                    await self._close(engine)
                world.kill_now(keeps_page_cache=self.choose.random() < 0.3)
            except PowerLoss:
                pass
            engine = await self._recover(world)
        await self._end(world, engine)

    async def _recover(self, world: World) -> Any:
        while True:
            if self.choose.random() < 0.3:
                world.arm(self.choose.randrange(1, 30), keeps_page_cache=self.choose.random() < 0.3)
            try:
                engine = world.start()
                break
            except PowerLoss:
                continue
        world.steps_left = -1
        self.states_checked += 1
        self.model.adopt(world.mirror.everything(), allowed=True)
        self._drop_displaced(engine)
        for name in list(self.in_memory):
            self._lost(engine, name)
        states = {snapshot.name: snapshot for snapshot in engine.snapshots()}
        for name, image in self.doubtful.items():
            if name in states and states[name].state == self.cow.SnapshotState.ACTIVE:
                self.shots[name] = image
        self.doubtful.clear()
        self._check(world, engine)
        for name, snapshot in states.items():
            if name not in self.shots and snapshot.state == self.cow.SnapshotState.ACTIVE:
                raise Violation(f"{name} came from nowhere")
        return engine

    def _lost(self, engine: Any, name: str) -> None:
        self.in_memory.discard(name)
        self.shots.pop(name, None)
        for snapshot in engine.snapshots():
            if snapshot.name == name and snapshot.state != self.cow.SnapshotState.INVALID:
                raise Violation(f"{name} was in memory and is {snapshot.state} after a restart")

    def _drop_displaced(self, engine: Any) -> None:
        """The log is so small that it may be full; then the oldest snapshots go, for that reason and no other."""
        for snapshot in engine.snapshots():
            if snapshot.state == self.cow.SnapshotState.INVALID and "log" in snapshot.invalid_reason:
                self.displaced += snapshot.name in self.shots
                self.shots.pop(snapshot.name, None)
                self.in_memory.discard(snapshot.name)

    def _check(self, world: World, engine: Any) -> None:
        self._drop_displaced(engine)
        if engine.read(0, engine.size) != self.model.image():
            raise Violation("the volume does not hold what was written")
        for name, image in self.shots.items():
            if world.read_snapshot(engine, name) != image:
                raise Violation(f"{name} has changed")

    async def _step(self, world: World, engine: Any) -> None:
        if self.grows and self.choose.random() < 0.04:
            with contextlib.suppress(StoreFull):  # its log is full
                world.stores.resize("default", world.store.size + STORE_GROWTH)
        draw = self.choose.random()
        if draw < 0.60:
            self._change(engine)
        elif draw < 0.66:
            await engine.commit()
        elif draw < 0.72:
            await engine.flush()
            self.model.flushed()
        elif draw < 0.82:
            await self._snapshot(engine)
        elif draw < 0.92:
            await self._delete(engine)
        else:
            self._check(world, engine)
            await self._check_changed(world, engine)

    def _change(self, engine: Any) -> None:
        first = self.choose.randrange(self.sector_count)
        count = min(self.sector_count - first, self.choose.choice((1, 1, 2, 8, 20)))
        offset, length = first * SECTOR_SIZE, count * SECTOR_SIZE
        kind = self.choose.random()
        self.stamp += 1
        stamp = self.stamp if kind < 0.8 else 0
        # Before the call: a write the power cut short may be on the disk or not.
        for sector in range(first, first + count):
            self.model.possible[sector].add(stamp)
        if kind < 0.8:
            engine.write(offset, memoryview(to_bytes(np.full(count, stamp, dtype=np.uint64))))
        elif kind < 0.9:
            engine.trim(offset, length)
        else:
            engine.write_zeroes(offset, length, may_trim=self.choose.random() < 0.5)
        self.model.change(first, count, stamp)

    async def _snapshot(self, engine: Any) -> None:
        name = f"s{self.stamp}.{len(self.shots)}"
        if name in self.shots or name in {snapshot.name for snapshot in engine.snapshots()}:
            return
        store = "memory" if self.choose.random() < 0.2 else None
        image = self.model.image()
        if store is not None:
            self.in_memory.add(name)
        else:
            self.doubtful[name] = image
        pending = engine.cut(name, store)
        for _ in range(self.choose.randrange(3)):
            self._change(engine)
        snapshot = await engine.finish(pending)
        self.doubtful.pop(name, None)
        self.shots[name] = image
        self.marks.append((snapshot.generation, engine.incarnation, image))

    async def _delete(self, engine: Any) -> None:
        self._drop_displaced(engine)
        if not self.shots:
            return
        name = self.choose.choice(list(self.shots))
        image = self.shots.pop(name)
        if name not in self.in_memory:
            self.doubtful[name] = image
        await engine.delete(name)
        self.in_memory.discard(name)
        self.doubtful.pop(name, None)

    async def _close(self, engine: Any) -> None:
        """A clean end; the power may fail in the middle of it, or right after."""
        await engine.close()
        self.model.flushed()

    async def _check_changed(self, world: World, engine: Any) -> None:
        if not self.shots or not self.marks:
            return
        name = self.choose.choice(list(self.shots))
        snapshot = engine.get(name)
        own = await engine.changed(name, base=snapshot.generation, incarnation=engine.incarnation)
        if not own.known or own.extents:
            raise Violation(f"{name} differs from itself: {own}")
        generation, incarnation, image = self.choose.choice(self.marks)
        if generation > snapshot.generation:
            return
        answer = await engine.changed(name, base=generation, incarnation=incarnation)
        if not answer.known:
            raise Violation("a base of this volume is not known")
        with world.opened(engine, name) as device:
            born = device.births_as_of(0, device.size // self.block_size)
        theirs = {block for block, birth in enumerate(born.tolist()) if birth > generation}
        ours = {
            block
            for extent in answer.extents
            for block in range(extent.offset // self.block_size, extent.end // self.block_size)
        }
        if theirs != ours:
            raise Violation(f"of {name} a reader says that {theirs} changed since {generation}, the engine {ours}")
        same = bytearray(self.shots[name])
        for extent in answer.extents:
            same[extent.offset : extent.end] = image[extent.offset : extent.end]
        if bytes(same) != image:
            raise Violation(f"changes between generation {generation} and {name} were missed")

    async def _end(self, world: World, engine: Any) -> None:
        """Everything deleted leaves nothing behind."""
        for snapshot in engine.snapshots():
            await engine.delete(snapshot.name)
        await engine.flush()
        if any(store.used_size for store in world.stores.list()):
            raise Violation(f"slots leaked: {world.stores.list()}")
        await engine.close()
