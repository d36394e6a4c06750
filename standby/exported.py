"""One snapshot as the export process serves it: its device, what changed in it, and who reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stillpoint.devices import BlockDevice, open_device
from stillpoint.errors import NotFound
from stillpoint.nbd.contexts import ChangedFunction
from stillpoint.nbd.export import DeviceExport

from .changes import Changes, HistoryDevice, Instant


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
        self.device = HistoryDevice(description, snapshot, fds={}, open_mirror=_open_mirror)
        self.executor = executor
        self.nbd = SnapshotExport(f"{description['volume']}@{snapshot['name']}", self, executor)
        self._instants = instants
        self._streams: list[str] = []
        self._closing = False

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
                self.device.close()

    def close(self) -> None:
        """When its NBD clients are gone. Streams that still run fail at their next read, and the last one closes it."""
        self._closing = True
        if not self._streams:
            self.device.close()


def _open_mirror(paths: Sequence[str], size: int) -> BlockDevice:
    return open_device([Path(path) for path in paths], size=size, read_only=True)
