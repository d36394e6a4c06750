"""The one place where Stillpoint's errors become NBD errors, and NBD errors become ours."""

from __future__ import annotations

import errno as system_errno
import os
from typing import Final

from .. import errors
from .constants import Errno

_BY_CLASS: Final[dict[type[BaseException], Errno]] = {
    errors.PermissionRefused: Errno.EPERM,
    errors.Refused: Errno.EPERM,
    errors.InvalidRequest: Errno.EINVAL,
    errors.NotFound: Errno.EINVAL,
    errors.StoreFull: Errno.ENOSPC,
    errors.FencedError: Errno.ESHUTDOWN,
    errors.SnapshotInvalid: Errno.EIO,
    errors.DataCorrupt: Errno.EIO,
    errors.PeerUnavailable: Errno.EIO,
}

_BY_SYSTEM_ERRNO: Final[dict[int, Errno]] = {
    system_errno.EPERM: Errno.EPERM,
    system_errno.EACCES: Errno.EPERM,
    system_errno.EROFS: Errno.EPERM,
    system_errno.ENOMEM: Errno.ENOMEM,
    system_errno.EINVAL: Errno.EINVAL,
    system_errno.ENOSPC: Errno.ENOSPC,
    system_errno.EDQUOT: Errno.ENOSPC,
    system_errno.EFBIG: Errno.ENOSPC,
    system_errno.EOVERFLOW: Errno.EOVERFLOW,
    system_errno.EOPNOTSUPP: Errno.ENOTSUP,
    system_errno.ESHUTDOWN: Errno.ESHUTDOWN,
}


def nbd_errno(error: BaseException) -> int:
    """The number a client gets for `error`. What the table does not name, broken invariants included, is EIO."""
    if isinstance(error, errors.DeviceError):
        return _BY_SYSTEM_ERRNO.get(error.errno, Errno.EIO)
    for kind in type(error).__mro__:
        if kind in _BY_CLASS:
            return _BY_CLASS[kind]
    return Errno.EIO


def error_from_nbd(what: str, number: int) -> errors.StillpointError:
    """The exception for a server's `number`; `what` says what was asked of whom."""
    if number == Errno.EPERM:
        return errors.PermissionRefused(f"{what}: not permitted")
    return errors.DeviceError(f"{what}: {os.strerror(number)}", number)
