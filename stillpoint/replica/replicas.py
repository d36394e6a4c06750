"""The copies of volumes that a node holds: one `replica.meta` each, and the node's own identity.

    STATE/node.json             the node's uuid, made at the first start
    STATE/replicas/NAME.meta    superblock.py

Both roles of a node work on the same `Replica`, so a change of role is one durable write.
"""

from __future__ import annotations

import uuid as uuid_module
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

from ..document import fsync_folder, read_document, write_document
from ..errors import DataCorrupt, DeviceError, NotFound
from .generations import mint
from .handshake import Role
from .state import ReplicaState
from .superblock import ReplicaFile
from .transitions import created_primary, created_standby


class Replica:
    """The copy of one volume here. `state` is what is durable; `become` is the only way to change it."""

    def __init__(self, volume: str, file: ReplicaFile) -> None:
        self.volume = volume
        # What an operator has to know and no state tells, such as a split brain; empty: nothing.
        self.alarm = ""
        self._file = file

    @property
    def state(self) -> ReplicaState:
        return self._file.state

    @property
    def is_primary(self) -> bool:
        return self.state.role is Role.PRIMARY

    def become(self, state: ReplicaState) -> None:
        """Durable on return. Raises DeviceError; the copy is then what it was, and what depends on this must not be."""
        self._file.write(state)

    def close(self) -> None:
        self._file.close()


class Replicas:
    """All of a node's, by the name of the volume."""

    def __init__(self, state_dir: Path, *, name: str) -> None:
        """name: the node's, for people. Opens what is there. Raises DataCorrupt, DeviceError, Refused."""
        self._folder = state_dir / "replicas"
        self._folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.node = _node_uuid(state_dir / "node.json")
        self._open: dict[str, Replica] = {}
        for path in sorted(self._folder.glob("*.meta")):
            self._open[path.stem] = Replica(path.stem, ReplicaFile.open(path))

    def __iter__(self) -> Iterator[Replica]:
        return iter([self._open[name] for name in sorted(self._open)])

    def find(self, volume: str) -> Replica | None:
        return self._open.get(volume)

    def get(self, volume: str) -> Replica:
        """Raises NotFound."""
        found = self._open.get(volume)
        if found is None:
            raise NotFound(f"node {self.name} holds no copy of volume {volume!r}")
        return found

    def create_primary(self, volume: str, volume_uuid: str, *, size: int) -> Replica:
        """A new volume. Durable on return. Raises AlreadyExists, DeviceError."""
        first = mint(epoch=1)
        return self._create(
            volume,
            created_primary(
                volume=UUID(volume_uuid), node=self.node, name=self.name, size=size, first=first, blank=False
            ),
        )

    def create_standby(self, volume: str, volume_uuid: str, *, size: int, blank: bool) -> Replica:
        """A copy that holds nothing yet. Durable on return. Raises AlreadyExists, DeviceError."""
        return self._create(
            volume,
            created_standby(volume=UUID(volume_uuid), node=self.node, name=self.name, size=size, blank=blank),
        )

    def _create(self, volume: str, state: ReplicaState) -> Replica:
        replica = Replica(volume, ReplicaFile.create(self._folder / f"{volume}.meta", state))
        self._open[volume] = replica
        return replica

    def delete(self, volume: str) -> None:
        """Durable on return; a second call does nothing. Raises DeviceError."""
        replica = self._open.pop(volume, None)
        if replica is None:
            return
        replica.close()
        try:
            (self._folder / f"{volume}.meta").unlink(missing_ok=True)
            fsync_folder(self._folder)
        except OSError as error:
            raise DeviceError(f"cannot remove the metadata of volume {volume}: {error.strerror}", 5) from error

    def close(self) -> None:
        for replica in self._open.values():
            replica.close()


def _node_uuid(path: Path) -> UUID:
    try:
        return UUID(read_document(path)["uuid"])
    except NotFound:
        fresh = uuid_module.uuid4()
        write_document(path, {"uuid": str(fresh)})
        return fresh
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataCorrupt(f"{path} does not name a node: {error}") from None
