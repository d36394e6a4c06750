"""The preservation stores of one node: their names, numbers and devices, in one small file that readers open too.

`stores.json` is replaced as a whole (written aside, fsync, rename, fsync of the folder), so a crash leaves the old or
the new list. A store's number is in every address of every map, so a number is never given twice.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol
from uuid import UUID, uuid4

from stillpoint.checksum import crc32
from stillpoint.devices import BlockDevice, FileDevice, MemoryDevice, open_device
from stillpoint.document import fsync_folder
from stillpoint.errors import (
    AlreadyExists,
    DataCorrupt,
    DeviceError,
    InvalidRequest,
    NotFound,
    Refused,
    StillpointError,
)

from .association_forms import FORM_DEFAULT, FORMS
from .logged_store import LoggedStore
from .preservation import MemoryStore, PreservationStore
from .slots import SEGMENT_SIZE
from .values import StoreStatistics, check_name

logger = logging.getLogger(__name__)

MAGIC: Final = "stillpoint preservation stores"
VERSION: Final = 2  # 1: the first, read with defaults; 2: map, size_max
VERSIONS_READ: Final = (1, 2)
FILE_NAME: Final = "stores.json"
DEFAULT_STORE: Final = "default"
DEFAULT_SIZE: Final = 64 << 30  # of the default store: a cap, the file is sparse
MEMORY: Final = "memory"
FILE: Final = "file"
_NUMBER_MAX: Final = (1 << 16) - 1
_EXTEND_SHARE: Final = 4  # a full store grows by this part of its size, or by what is needed


@dataclass(frozen=True, slots=True)
class StoreDefinition:
    """What `stores.json` says of a store. `paths` of a memory store lead to the running engine's memory.

    map: form of the association maps of the snapshots made in this store (association_forms.py).
    size: bytes of the device. size_max: up to which it grows by itself when it is full; 0: never.
    """

    number: int
    name: str
    kind: str
    uuid: str
    size: int
    paths: tuple[str, ...]
    map: str = FORM_DEFAULT
    size_max: int = 0


class StoreUser(Protocol):
    """A volume that may have blocks in a store."""

    @property
    def name(self) -> str: ...

    def uses_store(self, store: UUID) -> bool: ...


class StoreDirectory:
    """All stores of a node, open. For the event loop, but for `resize`; opening and creating waits for disks."""

    def __init__(
        self,
        folder: Path,
        *,
        default_size: int = DEFAULT_SIZE,
        open_file: Callable[[StoreDefinition, bool], BlockDevice] | None = None,
    ) -> None:
        """Open every store listed in `folder`, which is made when missing. Raises DataCorrupt, DeviceError.

        A store whose device cannot be opened is listed as failed; the snapshots in it become invalid.
        open_file: (definition, make it) -> device, instead of opening the paths.
        """
        self.folder = folder
        self.path = folder / FILE_NAME
        self.users: list[StoreUser] = []
        self._default_size = default_size
        self._open_file = open_file or _open_paths
        self._stores: dict[str, PreservationStore] = {}
        self._failed: dict[str, str] = {}
        self._saving = threading.Lock()  # taken after a store's own lock, never before
        folder.mkdir(parents=True, exist_ok=True)
        self._next_number, definitions = read_definitions(self.path) if self.path.exists() else (1, [])
        self._definitions = {definition.name: definition for definition in definitions}
        for definition in definitions:
            self._open(definition)
        if any(definition.kind == MEMORY for definition in definitions):
            self._save()

    def create(
        self,
        name: str,
        *,
        kind: str,
        size: int = 0,
        paths: Sequence[Path] = (),
        map_form: str = FORM_DEFAULT,
        size_max: int = 0,
    ) -> PreservationStore:
        """A new store: of memory, or of files (made when missing), partitions and disks one after the other.

        size: bytes in all; 0 with paths that exist: what they hold. A file without paths lies in the node's folder.
        map_form: one of association_forms.FORMS. size_max: bytes to which the (last) file grows when it is full.
        Durable on return. Raises AlreadyExists, InvalidRequest, or what opening the devices raises.
        """
        check_name(name, what="store")
        if name in self._definitions:
            raise AlreadyExists(f"store {name}: exists already")
        if kind not in (MEMORY, FILE):
            raise InvalidRequest(f"store {name}: {kind!r} is no kind of store; memory and file are")
        if map_form not in FORMS:
            raise InvalidRequest(f"store {name}: {map_form!r} is no form of map; there are {', '.join(FORMS)}")
        if size_max and (kind != FILE or not size <= size_max):
            raise InvalidRequest(f"store {name}: only a store of files grows, to no less than its size")
        if self._next_number > _NUMBER_MAX:
            raise Refused(f"store {name}: this node has made {_NUMBER_MAX} stores, the most there can be")
        if kind == FILE and not paths:
            paths = [self.folder / f"{name}.store"]
        definition = StoreDefinition(
            self._next_number,
            name,
            kind,
            str(uuid4()),
            size,
            tuple(str(path.absolute()) for path in paths),
            map_form,
            size_max,
        )
        store = self._create(definition)
        with self._saving:
            self._add(self._described(definition, store), store)
            self._next_number += 1
            self._save()
        return store

    def resize(self, name: str, size: int) -> None:
        """Grow a store of files, or of a device that has grown, to `size` bytes, while it is used. Waits for the disk.

        Durable on return. May be called from any thread. Raises NotFound, Refused, StoreFull, DeviceError.
        """
        if name not in self._definitions:
            raise NotFound(f"store {name}: does not exist")
        self.get(name).grow(size, lambda: self._set_size(name, size))
        logger.info("preservation store resized", extra={"store": name, "size": size})

    def get(self, name: str | None) -> PreservationStore:
        """The store of that name; None: the default one, made on first use. Raises NotFound, DeviceError (failed)."""
        wanted = DEFAULT_STORE if name is None else name
        if wanted not in self._definitions and wanted == DEFAULT_STORE:
            return self.create(DEFAULT_STORE, kind=FILE, size=self._default_size)
        store = self._stores.get(wanted)
        failed = self._failed.get(wanted, "") if store is None else store.failed
        if failed:
            raise DeviceError(f"store {wanted} is out of service: {failed}", errno.EIO)
        if store is None:
            raise NotFound(f"store {wanted}: does not exist")
        return store

    def get_open(self, name: str) -> PreservationStore | None:
        """The store of that name if it is in service, or was when it was opened."""
        return self._stores.get(name)

    def opened(self) -> tuple[PreservationStore, ...]:
        return tuple(self._stores.values())

    def by_uuid(self, uuid: UUID) -> PreservationStore | None:
        return next((store for store in self._stores.values() if store.uuid == uuid), None)

    def map_form(self, uuid: UUID) -> str:
        """How snapshots made in that store remember their blocks."""
        store = self.by_uuid(uuid)
        return self._definitions[store.name].map if store is not None else FORM_DEFAULT

    def list(self) -> list[StoreStatistics]:
        return [self._statistics(definition) for definition in self._definitions.values()]

    def delete(self, name: str) -> None:
        """Forget the store, and remove its file if it lies in the node's folder. Durable on return.

        Raises NotFound; Refused while snapshots need it.
        """
        if name not in self._definitions:
            raise NotFound(f"store {name}: does not exist")
        store = self._stores.get(name)
        if store is not None:
            users = [user.name for user in self.users if user.uses_store(store.uuid)]
            if users:
                raise Refused(f"store {name}: snapshots of {', '.join(sorted(users))} need it; delete them first")
            if isinstance(store, LoggedStore) and store.volumes_recovered():
                raise Refused(f"store {name}: holds snapshots of a volume that is not open")
            store.close()
        with self._saving:
            definition = self._definitions.pop(name)
            self._stores.pop(name, None)
            self._failed.pop(name, None)
            self._save()
        for path in map(Path, definition.paths):
            if definition.kind == FILE and path.parent == self.folder.absolute():
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()

    def close(self) -> None:
        for store in self._stores.values():
            store.close()

    def _open(self, definition: StoreDefinition) -> None:
        try:
            if definition.kind == MEMORY:
                store: PreservationStore = self._create(definition)
                definition = self._described(definition, store)
            else:
                device = self._open_file(definition, False)
                try:
                    store = LoggedStore.open(device, name=definition.name)
                    if str(store.uuid) != definition.uuid or store.number != definition.number:
                        raise DataCorrupt(f"{device.description}: holds another store than {definition.name}")
                except BaseException:
                    device.close()
                    raise
        except StillpointError as error:
            self._failed[definition.name] = str(error)
        else:
            self._add(definition, store)

    def _add(self, definition: StoreDefinition, store: PreservationStore) -> None:
        name = definition.name
        self._stores[name] = store
        self._definitions[name] = definition
        store.size_max = definition.size_max
        if definition.size_max and isinstance(store, LoggedStore):
            store.extend = lambda needed: self._extend(name, store, needed)

    def _extend(self, name: str, store: LoggedStore, needed: int) -> bool:
        """First step of a full store's ladder: grow it as far as it may. Called with the store's lock held."""
        size = store.device.size
        target = min(store.size_max, max(size + size // _EXTEND_SHARE, size + needed + SEGMENT_SIZE))
        if target <= size:
            return False
        try:
            store.grow_while_locked(target, lambda: self._set_size(name, target))
        except (StillpointError, OSError) as error:
            if store.failed:
                raise
            logger.warning("preservation store cannot grow: %s", error, extra={"store": name, "size": target})
            return False
        logger.info("full preservation store has grown", extra={"store": name, "size": target})
        return True

    def _set_size(self, name: str, size: int) -> None:
        with self._saving:
            self._definitions[name] = replace(self._definitions[name], size=size)
            self._save()

    def _create(self, definition: StoreDefinition) -> PreservationStore:
        if definition.kind == MEMORY:
            memory = MemoryDevice(definition.size, name=f"store {definition.name}")
            uuid = UUID(definition.uuid)
            return MemoryStore(memory, name=definition.name, uuid=uuid, number=definition.number)
        device = self._open_file(definition, True)
        try:
            return LoggedStore.create(
                device, name=definition.name, number=definition.number, size_max=definition.size_max
            )
        except BaseException:
            device.close()
            raise

    @staticmethod
    def _described(definition: StoreDefinition, store: PreservationStore) -> StoreDefinition:
        """The definition with what is known once the store is open: its uuid, its size, the way to its memory."""
        paths = definition.paths
        if isinstance(store.device, MemoryDevice):
            paths = (f"/proc/{os.getpid()}/fd/{store.device.fileno()}",)
        return replace(definition, uuid=str(store.uuid), size=store.device.size, paths=paths)

    def _statistics(self, definition: StoreDefinition) -> StoreStatistics:
        store = self._stores.get(definition.name)
        return StoreStatistics(
            name=definition.name,
            kind=definition.kind,
            uuid=definition.uuid,
            number=definition.number,
            paths=definition.paths if definition.kind == FILE else (),
            map_form=definition.map,
            size=definition.size if store is None else store.size,
            used_size=0 if store is None else store.used_size,
            size_max=definition.size_max,
            used_percent=0 if store is None else store.used_percent,
            warning_percent=0 if store is None else store.warning_percent,
            failed=self._failed[definition.name] if store is None else store.failed,
        )

    def _save(self) -> None:
        data = encode_definitions(self._next_number, self._definitions.values())
        aside = self.path.with_suffix(".tmp")
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(self.path)
        fsync_folder(self.folder)


def read_definitions(path: Path) -> tuple[int, list[StoreDefinition]]:
    """(next free number, the stores), for the engine and its readers. Raises OSError, DataCorrupt."""
    try:
        document = json.loads(path.read_bytes())
        content = document["content"]
        if document["magic"] != MAGIC or document["version"] not in VERSIONS_READ or document["crc"] != _crc(content):
            raise DataCorrupt(f"{path}: is damaged, or not version {VERSION}")
        definitions = [StoreDefinition(**{**store, "paths": tuple(store["paths"])}) for store in content["stores"]]
        return content["next_number"], definitions
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise DataCorrupt(f"{path}: is damaged: {error}") from error


def _open_paths(definition: StoreDefinition, create: bool) -> BlockDevice:
    paths = [Path(path) for path in definition.paths]
    if create:
        held = [path for path in paths if path.exists() and path.stat().st_size]
        for path in held:
            _refuse_store(path)
    return open_device(paths, size=definition.size or None, create=create)


def _refuse_store(path: Path) -> None:
    """An existing file that is a store already may be another node's: making it anew would destroy it."""
    device = FileDevice(path, read_only=True)
    try:
        start = bytearray(min(8, device.size))
        device.read_into(0, memoryview(start))
    finally:
        device.close()
    if start == b"SPSTORE1":
        raise Refused(f"{path}: holds a preservation store already; remove it first if it is not needed")


def encode_definitions(next_number: int, definitions: Iterable[StoreDefinition]) -> bytes:
    """The content of `stores.json`."""
    content = {"next_number": next_number, "stores": [asdict(definition) for definition in definitions]}
    document = {"magic": MAGIC, "version": VERSION, "crc": _crc(content), "content": content}
    return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"


def _crc(content: dict[str, Any]) -> int:
    return crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
