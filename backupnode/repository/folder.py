"""Files that a crash finds either absent or whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from stillpoint.errors import AlreadyExists, DeviceError

# Names that start so are in the making; whoever makes one holds a lock on it.
TEMPORARY_PREFIX = ".tmp-"


@contextlib.contextmanager
def system_errors(what: str, path: Path) -> Iterator[None]:
    """An OSError becomes a DeviceError that says what was done to which file."""
    try:
        yield
    except OSError as error:
        raise DeviceError(f"{path}: {what} failed: {error.strerror or error}", error.errno or errno.EIO) from error


def create_locked(path: Path) -> int:
    """A new file that `remove_if_unheld` leaves alone as long as the descriptor returned is open.

    Raises FileExistsError or another OSError.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Somebody who sweeps may have removed it between the two calls above.
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def remove_if_unheld(path: Path, *, unless: Path | None = None) -> bool:
    """Remove a file that no writer holds. `unless` is looked at while it is held: if that exists, the file stays."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another file may have taken the name since it was opened; only whoever holds a file takes its name away.
        if not os.path.samestat(path.stat(), os.fstat(descriptor)) or (unless is not None and unless.exists()):
            return False
        path.unlink()
        return True
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(descriptor)


def create_whole(path: Path, contents: bytes) -> None:
    """Make a file that did not exist. Durable on return, name included.

    Raises AlreadyExists or DeviceError; the name does not exist then, or not because of this call.
    """
    with system_errors("creating it", path), _temporary(path.parent, contents) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise AlreadyExists(f"{path}: exists already") from None
        try:
            temporary.unlink()
            fsync_folder(path.parent)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def replace_whole(path: Path, contents: bytes) -> None:
    """Make a file, or put it in the place of the one there. Durable on return. Raises DeviceError."""
    with system_errors("writing it", path), _temporary(path.parent, contents) as temporary:
        temporary.replace(path)
        fsync_folder(path.parent)


@contextlib.contextmanager
def _temporary(folder: Path, contents: bytes) -> Iterator[Path]:
    path = folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    descriptor = create_locked(path)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(contents)
        os.fsync(descriptor)
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
