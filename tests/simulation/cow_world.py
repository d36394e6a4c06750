"""The machine that a snapshot engine lives on, in which the power fails at a chosen step.

The real engine runs on a mirror and a store that remember what a crash could lose (`RecordingDevice`); its catalog and
birth map are real files of which the world knows the durable content. Every write, flush and append is a step; at the
chosen one the world draws a state that a crash could leave, and from then on nothing gets through.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stillpoint.devices import MemoryDevice
from tests.simulation.cow_model import Violation
from tests.simulation.stepping_device import PowerLoss, SteppingDevice
from tests.support.devices import SECTOR_SIZE

STORE_SIZE = 2 << 20
STORE_GROWTH = 1 << 20
MAP_FORMS = ("array", "hash", "ordered", "unordered")  # of the durable store, one history each in turn


class InlineExecutor(Executor):
    """Runs everything at once, so that a run depends on its seed alone."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - it goes to whoever waits
            future.set_exception(error)
        return future


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

    @contextlib.contextmanager
    def opened(self, engine: Any, name: str) -> Iterator[Any]:
        """The snapshot's virtual device."""
        memory = self.stores.get("memory").device.fileno()
        device = self.cow.open_virtual_device(
            engine.describe(),
            name,
            fds={"default": self.store_fd, "memory": memory},
            open_mirror=lambda paths, size: MemoryDevice.from_descriptor(os.dup(self.mirror_fd), read_only=True),
        )
        try:
            yield device
        finally:
            device.close()

    def read_snapshot(self, engine: Any, name: str) -> bytes:
        with self.opened(engine, name) as device:
            image = bytearray(device.size)
            device.read_into(0, memoryview(image))
            for extent in device.extents(0, device.size):
                if extent.hole and any(image[extent.offset : extent.end]):
                    raise Violation(f"{name}: {extent} is called a hole and holds data")
            return bytes(image)

    def close(self) -> None:
        self._drop_last_run()
        shutil.rmtree(self.folder, ignore_errors=True)


def _memory_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
