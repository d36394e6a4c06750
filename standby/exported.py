"""One snapshot as the export process serves it: its device, what changed in it, and who reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

from stillpoint.devices import FileDevice, OverlayDevice
from stillpoint.errors import NotFound
from stillpoint.nbd.contexts import ChangedFunction
from stillpoint.nbd.export import DeviceExport, Replier, run_in_thread

from .changes import Changes, Instant
from .cow import VirtualDevice, open_virtual_device


class SnapshotExport(DeviceExport):
    """A snapshot over NBD. Implements `stillpoint.nbd.contexts.ChangeSource` too."""

    def __init__(self, name: str, exported: Exported, executor: Executor) -> None:
        super().__init__(name, exported.device, executor, read_only=True)
        self._exported = exported

    def bases(self) -> Sequence[str]:
        return self._exported.bases()

    def changed_since(self, base: str, /) -> ChangedFunction:
        if base not in self._exported.bases():
            raise NotFound(f"{self.name}: {base!r} is no earlier instant of the volume")
        return self._exported.changes(self._exported.instant(base)).parts


class WritableExport(DeviceExport):
    """A writable snapshot over NBD. It has no dirty bitmaps: they would not tell what was written to it."""

    def __init__(self, name: str, device: OverlayDevice, executor: Executor) -> None:
        super().__init__(name, device, executor)
        self._overlay = device

    def write(self, offset: int, payload: memoryview, owned: bool, fua: bool, replier: Replier, cookie: int, /) -> None:
        # The first write of a block may read from a disk, so none is made on the loop.
        kept = payload if owned else bytes(payload)
        self._in_thread(lambda: self._overlay.write(offset, (kept,)), fua, replier, cookie)

    def closed(self) -> None:
        super().closed()
        if not self.connection_count:
            # What a client did not flush is lost if this process dies; nobody flushes it any more.
            run_in_thread(self._executor, self._overlay.flush, _ignore)


class Exported:
    """Opened by the constructor, which raises what opening the device raises; ended by `close`."""

    def __init__(
        self,
        description: Mapping[str, Any],
        snapshot: Mapping[str, Any],
        executor: Executor,
        *,
        instants: Callable[[], Mapping[str, Instant]],
    ) -> None:
        """instants: of the volume, by name, as they are now."""
        self.description = description
        self.snapshot = snapshot
        self.uuid: str = snapshot["uuid"]
        self.device: VirtualDevice = open_virtual_device(description, snapshot["name"])
        self.executor = executor
        self.overlay = self._open_overlay(snapshot["overlay"]) if snapshot.get("overlay") else None
        name = f"{description['volume']}@{snapshot['name']}"
        self.nbd: DeviceExport = (
            SnapshotExport(name, self, executor)
            if self.overlay is None
            else WritableExport(name, self.overlay, executor)
        )
        self._instants = instants
        self._streams: list[str] = []
        self._closing = False

    def _open_overlay(self, path: str) -> OverlayDevice:
        try:
            storage = FileDevice(path)
            try:
                return OverlayDevice(self.device, storage, base_uuid=self.uuid, block_size=self.block_size)
            except BaseException:
                storage.close()
                raise
        except BaseException:
            self.device.close()
            raise

    @property
    def incarnation(self) -> str:
        uuid: str = self.description["uuid"]
        return uuid

    @property
    def block_size(self) -> int:
        block_size: int = self.description["block_size"]
        return block_size

    def bases(self) -> list[str]:
        """The names of the instants that this snapshot can be compared with: those of this life before it."""
        return [
            name
            for name, instant in self._instants().items()
            if instant.incarnation == self.incarnation
            and (
                instant.generation < self.device.generation
                # A bookmark of this very snapshot: nothing has changed since.
                or (instant.generation == self.device.generation and name != self.snapshot["name"])
            )
        ]

    def instant(self, name: str) -> Instant | None:
        return self._instants().get(name)

    def changes(self, base: Instant | None) -> Changes:
        return Changes(self.device, base, incarnation=self.incarnation, block_size=self.block_size)

    @property
    def streams(self) -> Sequence[str]:
        """Who reads it over gRPC, one entry for each stream."""
        return self._streams

    @contextmanager
    def streaming(self, peer: str) -> Iterator[None]:
        """While it lasts, `peer` counts as a reader."""
        self._streams.append(peer)
        try:
            yield
        finally:
            self._streams.remove(peer)
            if self._closing and not self._streams:
                self._close()

    def close(self) -> None:
        """When its NBD clients are gone. Streams that still run fail at their next read, and the last one closes it."""
        self._closing = True
        if not self._streams:
            self._close()

    def _close(self) -> None:
        (self.overlay or self.device).close()


def _ignore(error: Exception | None) -> None:
    """The next flush of a client tells it: a failed one is never forgotten by the device."""
