"""A local directory as a Storage.

Invariants:
- Bytes are written to a file whose name starts with `.tmp-`, fsynced, linked to their name, and the folder is fsynced.
  A crash before the link leaves a `.tmp-` file; one after it leaves the whole object.
- One process at a time has it open (flock on the file `lock`), so a `.tmp-` file that is there when it is opened is
  left over from a crash, and is removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from stillpoint.document import fsync_folder
from stillpoint.errors import AlreadyExists, DeviceError, InUse, NotFound, Refused

from .chunking import Piece

TEMPORARY_PREFIX: Final = ".tmp-"
FORMAT_FILE: Final = "repository"
# Not `repository` itself, which is replaced when its keys change.
_LOCK_FILE: Final = "lock"
FOLDERS: Final = ("packs", "manifests", "notes")
_IOV_MAX: Final = 1024
# Written back to the disk in the background each time so much was appended.
_WRITE_BACK_BYTES: Final = 8 << 20


@contextlib.contextmanager
def system_errors(what: str, path: Path) -> Iterator[None]:
    """An OSError becomes a DeviceError, or NotFound, that says what was done to which file."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"{path}: does not exist") from error
    except OSError as error:
        raise DeviceError(f"{path}: {what} failed: {error.strerror or error}", error.errno or errno.EIO) from error


class DirectoryStorage:
    """`lock` and `prepare` come before the first write, once the file `repository` has been found right."""

    requests_are_dear = False

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = -1

    def make(self) -> bool:
        """Make the directory when there is none. Whether it is new: without the file `repository`.

        Raises DeviceError, and Refused for a directory that holds something else.
        """
        if (self._root / FORMAT_FILE).exists():
            return False
        with system_errors("making the repository", self._root):
            self._root.mkdir(parents=True, exist_ok=True)
            fsync_folder(self._root.parent)
            if any(not entry.name.startswith(TEMPORARY_PREFIX) for entry in self._root.iterdir()):
                raise Refused(f"{self._root} is not empty and not a repository; name an empty directory")
        return True

    def lock(self, owner: str) -> None:
        """Two nodes on one repository would take each other's files for leftovers. `owner` is not needed here."""
        path = self._root / _LOCK_FILE
        with system_errors("locking it", path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise InUse(f"the repository {self._root} is in use by another process") from None
        self._lock = descriptor

    def prepare(self) -> None:
        """Make the folders, and remove what crashes left."""
        with system_errors("opening the repository", self._root):
            for name in FOLDERS:
                (self._root / name).mkdir(exist_ok=True)
            fsync_folder(self._root)
            for folder in (self._root, *(self._root / name for name in FOLDERS)):
                for path in list(folder.iterdir()):
                    if path.name.startswith(TEMPORARY_PREFIX):
                        path.unlink()

    @property
    def description(self) -> str:
        return str(self._root)

    def names(self, folder: str) -> list[str]:
        path = self._root / folder
        with system_errors("listing it", path):
            return sorted(name for name in os.listdir(path) if not name.startswith(TEMPORARY_PREFIX))

    def sizes(self, folder: str) -> dict[str, int]:
        found = {}
        path = self._root / folder
        with system_errors("listing it", path), os.scandir(path) as entries:
            for entry in entries:
                if not entry.name.startswith(TEMPORARY_PREFIX):
                    with contextlib.suppress(FileNotFoundError):
                        found[entry.name] = entry.stat().st_size
        return found

    def exists(self, name: str) -> bool:
        return (self._root / name).exists()

    def forget_read(self) -> None:
        """Nothing is remembered."""

    def read(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        path = self._root / name
        with system_errors("reading it", path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                wanted = os.fstat(descriptor).st_size - offset if length is None else length
                return os.pread(descriptor, max(0, wanted), offset)
            finally:
                os.close(descriptor)

    def size(self, name: str) -> int:
        path = self._root / name
        with system_errors("measuring it", path):
            return path.stat().st_size

    def create(self, name: str, data: bytes) -> None:
        path = self._root / name
        with system_errors("creating it", path), _temporary(path.parent, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise AlreadyExists(f"{path}: exists already") from None
            try:
                fsync_folder(path.parent)
            except BaseException:
                path.unlink(missing_ok=True)
                raise

    def replace(self, name: str, data: bytes) -> None:
        path = self._root / name
        with system_errors("writing it", path), _temporary(path.parent, data) as temporary:
            os.replace(temporary, path)
            fsync_folder(path.parent)

    def delete(self, name: str) -> None:
        path = self._root / name
        with system_errors("deleting it", path):
            os.unlink(path)
            fsync_folder(path.parent)

    def upload(self, folder: str, *, name: str = "") -> _FileUpload:
        return _FileUpload(self._root / folder)

    def total_bytes(self) -> int:
        total = 0
        with system_errors("measuring it", self._root):
            for folder in (self._root, *(self._root / name for name in FOLDERS)):
                with os.scandir(folder) as entries:
                    for entry in entries:
                        with contextlib.suppress(FileNotFoundError):
                            if not entry.is_dir(follow_symlinks=False):
                                total += entry.stat(follow_symlinks=False).st_size
        return total

    def close(self) -> None:
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


class _FileUpload:
    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
        self._length = self._written_back = 0
        with system_errors("creating it", self._path):
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def append(self, buffers: Sequence[Piece]) -> None:
        rest = [memoryview(buffer) for buffer in buffers if len(buffer)]
        with system_errors("writing to it", self._path):
            while rest:
                count = os.pwritev(self._descriptor, rest[:_IOV_MAX], self._length)
                self._length += count
                while rest and count >= rest[0].nbytes:
                    count -= rest.pop(0).nbytes
                if rest:
                    rest[0] = rest[0][count:]
            if self._length - self._written_back >= _WRITE_BACK_BYTES:
                # Begins the writing without waiting for it, so that the fsync at the end is a short one.
                os.posix_fadvise(self._descriptor, 0, self._written_back, os.POSIX_FADV_DONTNEED)
                self._written_back = self._length

    def finish(self, name: str) -> None:
        path = self._path.parent / name.rpartition("/")[2]
        try:
            with system_errors("making it durable", self._path):
                os.fsync(self._descriptor)
                os.replace(self._path, path)
                fsync_folder(path.parent)
        finally:
            self.abort()

    def abort(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            os.close(descriptor)


@contextlib.contextmanager
def _temporary(folder: Path, contents: bytes) -> Iterator[Path]:
    path = folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(contents)
        os.fsync(descriptor)
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(descriptor)
