"""A regular file, disk or partition as a device."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

from ..document import fsync_folder
from ..errors import AlreadyExists, DeviceError, InUse, InvalidRequest, NotFound, PermissionRefused, Refused
from . import linux
from .descriptor import DescriptorDevice


class FileDevice(DescriptorDevice):
    """A regular file or a block device, opened by path.

    One opener at a time may write: a file is locked (flock), a block device is opened exclusively, which also refuses
    a mounted one. Whoever opens it read-only or `shared` takes no lock and is not stopped by one.

    Raises NotFound, InUse, PermissionRefused, InvalidRequest (a folder, a pipe) or DeviceError.
    """

    def __init__(self, path: Path | str, *, read_only: bool = False, shared: bool = False) -> None:
        self.path = Path(path)
        exclusive = not read_only and not shared
        descriptor, is_block_device = _open(self.path, read_only=read_only, exclusive=exclusive)
        try:
            size = linux.block_device_size(descriptor) if is_block_device else os.fstat(descriptor).st_size
            alignment = linux.sector_size(descriptor) if is_block_device else 1
        except OSError as error:
            os.close(descriptor)
            raise _open_error(self.path, error) from error
        except BaseException:
            os.close(descriptor)
            raise
        self._is_block_device = is_block_device
        super().__init__(descriptor, size=size, description=str(self.path), read_only=read_only, alignment=alignment)

    @classmethod
    def create(cls, path: Path | str, size: int) -> FileDevice:
        """Make a sparse file of `size` bytes and open it. Its existence and size are durable on return.

        Raises AlreadyExists, NotFound (its folder), InvalidRequest or DeviceError; nothing is left behind then.
        """
        path = Path(path)
        if size <= 0:
            raise InvalidRequest(f"{path}: a device of {size} bytes makes no sense")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _open_error(path, error) from error
        try:
            try:
                os.ftruncate(descriptor, size)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            fsync_folder(path.parent)
            return cls(path)
        except OSError as error:
            _remove(path)
            raise DeviceError(
                f"{path}: cannot make a file of {size} bytes: {error.strerror}", error.errno or errno.EIO
            ) from error
        except BaseException:
            _remove(path)
            raise

    def _grow(self, size: int) -> None:
        if not self._is_block_device:
            os.ftruncate(self._descriptor, size)
            os.fsync(self._descriptor)
            return
        actual = linux.block_device_size(self._descriptor)
        if actual != size:
            raise Refused(f"{self.path}: is a device of {actual} bytes; grow it first to make it {size}")


def _open(path: Path, *, read_only: bool, exclusive: bool) -> tuple[int, bool]:
    """The descriptor, and whether it is a block device."""
    try:
        kind = path.stat().st_mode
        is_block_device = stat.S_ISBLK(kind)
        # Looked at before it is opened: opening a pipe waits, and opening some character devices acts.
        if not stat.S_ISREG(kind) and not is_block_device:
            raise InvalidRequest(f"{path}: is neither a regular file nor a block device")
        flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
        if exclusive and is_block_device:
            flags |= os.O_EXCL
        descriptor = os.open(path, flags)
    except OSError as error:
        raise _open_error(path, error) from error
    if exclusive and not is_block_device:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise _open_error(path, error) from error
    return descriptor, is_block_device


def _open_error(path: Path, error: OSError) -> Exception:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return NotFound(f"{path}: does not exist")
        case errno.EEXIST:
            return AlreadyExists(f"{path}: exists already")
        case errno.EBUSY | errno.EWOULDBLOCK:
            return InUse(f"{path}: is in use by another process")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return PermissionRefused(f"{path}: cannot be opened: {error.strerror}")
        case _:
            return DeviceError(f"{path}: cannot be opened: {error.strerror}", error.errno or errno.EIO)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
