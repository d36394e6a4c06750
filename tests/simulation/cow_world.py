"""A small world for the snapshot engine in which the power fails at a chosen step, and a plain model beside it.

The real engine runs on a mirror and a store that remember what a crash could lose (`RecordingDevice`); its catalog and
birth map are real files of which the world knows the durable content. Every write, flush and append is a step; at the
chosen one the world draws a state that a crash could leave, and from then on nothing gets through. Everything follows
from the seed.

The engine's package is a parameter, so that copies with deliberate faults run in the same world.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from stillpoint.devices import BlockDevice, Buffer, MemoryDevice
from stillpoint.errors import StoreFull
from tests.support.devices import SECTOR_SIZE, RecordingDevice

STORE_SIZE = 2 << 20
STORE_GROWTH = 1 << 20
MAP_FORMS = ("array", "hash", "ordered", "unordered")  # of the durable store, one history each in turn


class PowerLoss(BaseException):
    """The machine is gone. Not an Exception: nobody handles it."""


class Violation(AssertionError):
    """What the engine promised does not hold."""


class InlineExecutor(Executor):
    """Runs everything at once, so that a run depends on its seed alone."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - it goes to whoever waits
            future.set_exception(error)
        return future


class SteppingDevice(RecordingDevice):
    """A recording device each of whose writes and flushes is a step of the world."""

    def __init__(self, beneath: BlockDevice, step: Callable[[], None]) -> None:
        super().__init__(beneath)
        self._step = step

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._step()
        super().write(offset, buffers)

    def trim(self, offset: int, length: int) -> None:
        self._step()
        super().trim(offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        self._step()
        super().write_zeroes(offset, length, may_trim=may_trim)

    def flush(self) -> None:
        self._step()
        super().flush()
        self._step()

    def everything(self) -> bytes:
        image = bytearray(self.size)
        self.beneath.read_into(0, memoryview(image))
        return bytes(image)


class World:
    """The machine: its devices, its files, and the moment it dies."""

    def __init__(self, cow: Any, choose: random.Random, *, size: int, block_size: int, map_form: str) -> None:
        self.cow = cow
        self.map_form = map_form
        self.choose = choose
        self.folder = Path(tempfile.mkdtemp(prefix="cow-world-", dir=_memory_folder()))
        self.size = size
        self.block_size = block_size
        self.boot = 1
        self.steps_left = -1
        self.dead = False
        self.keeps_page_cache = False
        self.crashes = 0
        self._images = (bytes(size), bytes(STORE_SIZE))
        self._births = b""
        self._catalog = b""
        self._torn_append = b""
        self._durable_births = b""
        self._held: list[Any] = []

    # -- running -----------------------------------------------------------------------------------------------------

    def start(self) -> Any:
        """Put the disks back as the last crash left them, and open the volume. The first start makes it."""
        self.dead = False
        first = not self._catalog
        state, stores = self.folder / "state", self.folder / "stores"
        self._drop_last_run()
        shutil.rmtree(state, ignore_errors=True)
        memories = [MemoryDevice(len(image)) for image in self._images]
        self._held += memories
        for memory, image in zip(memories, self._images, strict=True):
            memory.write(0, (image,))
        self.mirror_fd, self.store_fd = (memory.fileno() for memory in memories)
        self.mirror, self.store = (SteppingDevice(memory, self.step) for memory in memories)
        (state / "maps").mkdir(parents=True)
        steps_left, self.steps_left = self.steps_left, -1 if first else self.steps_left
        if not first:
            (state / "catalog.log").write_bytes(self._catalog)
            (state / "birth.map").write_bytes(self._births)
            self._durable_births = self._births
        try:
            self.stores = self.cow.StoreDirectory(stores, open_file=lambda definition, create: self.store)
            self._held.append(self.stores)
            if first:
                self.stores.create("default", kind="file", size=STORE_SIZE, map_form=self.map_form)
                self.stores.create("memory", kind="memory", size=STORE_SIZE)
            options = {"boot": lambda: str(self.boot), "executor": InlineExecutor(), "stage_size_max": 1 << 20}
            if first:
                engine = self.cow.SnapshotEngine.create(
                    state, "volume", self.mirror, self.stores, block_size=self.block_size, **options
                )
            else:
                engine = self.cow.SnapshotEngine.open(state, self.mirror, self.stores, **options)
        finally:
            self.steps_left = steps_left
        if first:
            self._catalog = (state / "catalog.log").read_bytes()
            self._durable_births = (state / "birth.map").read_bytes()
        self._held.append(engine._volume)
        return engine

    def _drop_last_run(self) -> None:
        """What the kernel does with the descriptors of a process that died."""
        for thing in self._held:
            thing.close()
        self._held.clear()

    def arm(self, steps: int, *, keeps_page_cache: bool) -> None:
        """Die at the `steps`-th step from now. keeps_page_cache: the process is killed, the machine goes on."""
        self.steps_left = steps
        self.keeps_page_cache = keeps_page_cache

    def kill_now(self, *, keeps_page_cache: bool) -> None:
        self.keeps_page_cache = keeps_page_cache
        self._die()

    def step(self) -> None:
        if self.dead:
            raise PowerLoss
        if self.steps_left > 0:
            self.steps_left -= 1
            if not self.steps_left:
                self._die()
                raise PowerLoss

    def _die(self) -> None:
        state = self.folder / "state"
        self.dead = True
        self.crashes += 1
        self.steps_left = -1
        births = (state / "birth.map").read_bytes()
        catalog = (state / "catalog.log").read_bytes() if (state / "catalog.log").exists() else self._catalog
        if self.keeps_page_cache:
            self._images = (self.mirror.everything(), self.store.everything())
            self._births = births
        else:
            self.boot += 1
            self._images = (self.mirror.crash_image(self.choose), self.store.crash_image(self.choose))
            self._births = self._mixed(births)
        torn = self._torn_append[: self.choose.randrange(len(self._torn_append) + 1)] if self._torn_append else b""
        self._catalog = catalog + torn

    def _mixed(self, births: bytes) -> bytes:
        """Each sector of the birth map as it was flushed, or as it is."""
        mixed = bytearray(self._durable_births)
        for start in range(0, len(births), SECTOR_SIZE):
            if self.choose.random() < 0.5:
                mixed[start : start + SECTOR_SIZE] = births[start : start + SECTOR_SIZE]
        return bytes(mixed)

    @contextlib.contextmanager
    def files_are_steps(self) -> Iterator[None]:
        """Make the appends to catalogs and the flushes of birth maps steps, and small logs, while this lasts."""
        catalog, birth, logged_store = (self._module(name) for name in ("catalog", "birth", "logged_store"))
        append, synchronize = catalog.Catalog.append, birth.BirthMap.synchronize
        share, least = logged_store._LOG_SHARE, logged_store._LOG_SIZE_MIN

        def stepping_append(self_: Any, event: Any, **fields: Any) -> None:
            self.step()
            self._torn_append = catalog.encode_record(event, fields, sequence=self_._sequence)
            try:
                self.step()
            finally:
                self._torn_append = b""
            append(self_, event, **fields)
            self.step()

        def stepping_synchronize(self_: Any) -> None:
            self.step()
            synchronize(self_)
            self._durable_births = (self.folder / "state" / "birth.map").read_bytes()
            self.step()

        catalog.Catalog.append, birth.BirthMap.synchronize = stepping_append, stepping_synchronize
        # A log this small fills every few batches, so that switching halves is part of every history.
        logged_store._LOG_SHARE, logged_store._LOG_SIZE_MIN = 1 << 20, 4096
        # The first sequence of a store is drawn by the machine: it would be the one thing not to follow from the seed.
        secrets, logged_store.secrets = logged_store.secrets, SimpleNamespace(randbits=self.choose_sequence)
        try:
            yield
        finally:
            catalog.Catalog.append, birth.BirthMap.synchronize = append, synchronize
            logged_store._LOG_SHARE, logged_store._LOG_SIZE_MIN = share, least
            logged_store.secrets = secrets

    def choose_sequence(self, bits: int) -> int:
        return self.choose.getrandbits(bits)

    def _module(self, name: str) -> Any:
        return importlib.import_module(f"{self.cow.__name__}.{name}")

    # -- looking -----------------------------------------------------------------------------------------------------

    def read_snapshot(self, engine: Any, name: str) -> bytes:
        memory = self.stores.get("memory").device.fileno()
        device = self.cow.open_virtual_device(
            engine.describe(),
            name,
            fds={"default": self.store_fd, "memory": memory},
            open_mirror=lambda paths, size: MemoryDevice.from_descriptor(os.dup(self.mirror_fd), read_only=True),
        )
        try:
            image = bytearray(device.size)
            device.read_into(0, memoryview(image))
            for extent in device.extents(0, device.size):
                if extent.hole and any(image[extent.offset : extent.end]):
                    raise Violation(f"{name}: {extent} is called a hole and holds data")
            return bytes(image)
        finally:
            device.close()

    def close(self) -> None:
        self._drop_last_run()
        shutil.rmtree(self.folder, ignore_errors=True)


class Model:
    """What the volume may hold: one stamp a sector, written 64 times into it; 0 is zeroes."""

    def __init__(self, sector_count: int) -> None:
        self.now: npt.NDArray[np.uint64] = np.zeros(sector_count, dtype=np.uint64)
        self.possible: list[set[int]] = [{0} for _ in range(sector_count)]

    def change(self, first: int, count: int, stamp: int) -> None:
        self.now[first : first + count] = stamp
        for sector in range(first, first + count):
            self.possible[sector].add(stamp)

    def flushed(self) -> None:
        self.possible = [{int(stamp)} for stamp in self.now]

    def image(self) -> bytes:
        return to_bytes(self.now)

    def adopt(self, image: bytes, *, allowed: bool) -> None:
        """A crash has left this; it must be something that was written and not flushed over."""
        stamps = to_stamps(image)
        for sector, stamp in enumerate(stamps.tolist()):
            if allowed and stamp not in self.possible[sector]:
                raise Violation(f"sector {sector} holds {stamp:#x} after a crash; it may hold {self.possible[sector]}")
        self.now = stamps
        self.flushed()


def to_bytes(stamps: npt.NDArray[np.uint64]) -> bytes:
    return np.repeat(stamps, SECTOR_SIZE // 8).tobytes()


def to_stamps(image: bytes) -> npt.NDArray[np.uint64]:
    words = np.frombuffer(image, dtype=np.uint64).reshape(-1, SECTOR_SIZE // 8)
    if not bool((words == words[:, :1]).all()):
        raise Violation("a sector holds a mixture")
    return words[:, 0].copy()


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
            await self._check_changed(engine)

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

    async def _check_changed(self, engine: Any) -> None:
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


def _memory_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
