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
        super().__init__(name, exported.overlay or exported.device, executor)
        self._exported = exported

    def bases(self) -> Sequence[str]:
        return self._exported.bases()

    def changed_since(self, base: str, /) -> ChangedFunction:
        if base not in self._exported.bases():
            raise NotFound(f"{self.name}: {base!r} is no earlier instant of the volume")
        return self._exported.changes(self._exported.instant(base), with_writes=True).parts

    def opened(self) -> None:
        super().opened()
        self._exported.enter()

    def closed(self) -> None:
        super().closed()
        self._exported.leave()


class WritableExport(SnapshotExport):
    """A writable snapshot over NBD. In its dirty bitmaps counts what was written to it, too."""

    def __init__(self, name: str, exported: Exported, overlay: OverlayDevice, executor: Executor) -> None:
        super().__init__(name, exported, executor)
        self._overlay = overlay

    def write(self, offset: int, payload: memoryview, owned: bool, fua: bool, replier: Replier, cookie: int, /) -> None:
        # The first write of a block may read from a disk, so none is made on the loop.
        kept = payload if owned else bytes(payload)
        self._in_thread(lambda: self._overlay.write(offset, (kept,)), fua, replier, cookie)

    def closed(self) -> None:
        if self.connection_count > 1:
            super().closed()
            return
        # What a client did not flush is lost if this process dies, and nobody flushes it any more. An error is not
        # forgotten: the device fails the next flush too.
        run_in_thread(self._executor, self._overlay.flush, lambda _: super(WritableExport, self).closed())


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
            else WritableExport(name, self, self.overlay, executor)
        )
        self._instants = instants
        self._streams: list[str] = []
        self._user_count = 0  # streams and NBD connections
        self._is_closing = False

    def _open_overlay(self, path: str) -> OverlayDevice:
        try:
            storage = FileDevice(path)
            try:
                return OverlayDevice(
                    self.device,
                    storage,
                    base_uuid=self.uuid,
                    block_size=self.block_size,
                    check_base=self.device.check,
                )
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

    def changes(self, base: Instant | None, *, with_writes: bool = False) -> Changes:
        """with_writes: what was written to the virtual device counts, not only what was written to the volume."""
        overlay = self.overlay if with_writes else None
        return Changes(self.device, base, incarnation=self.incarnation, block_size=self.block_size, overlay=overlay)

    @property
    def streams(self) -> Sequence[str]:
        """Who reads or writes it over gRPC, one entry for each stream."""
        return self._streams

    @contextmanager
    def streaming(self, peer: str) -> Iterator[None]:
        """While it lasts, `peer` counts as a reader."""
        self._streams.append(peer)
        self.enter()
        try:
            yield
        finally:
            self._streams.remove(peer)
            self.leave()

    def enter(self) -> None:
        self._user_count += 1

    def leave(self) -> None:
        self._user_count -= 1
        if self._is_closing and not self._user_count:
            self._close()

    def close(self) -> None:
        """Serve nobody new. Whoever still has it open is told of an error at the next read; the last one closes it."""
        self._is_closing = True
        if not self._user_count:
            self._close()

    def _close(self) -> None:
        (self.overlay or self.device).close()
