"""The few Linux calls on file descriptors that Python's `os` module lacks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
ZERO_RANGE = 0x10

# What a file system or driver answers when it does not know a mode of fallocate; the caller then writes zeroes.
UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL, errno.EPERM})

_TMPFS_MAGIC = 0x01021994
_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268

_libc = ctypes.CDLL(None, use_errno=True)
# glibc's plain `fallocate` takes 32-bit offsets on 32-bit machines; musl has only the 64-bit one.
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_fallocate.restype = ctypes.c_int


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); raises OSError. `length` is more than 0."""
    while _fallocate(descriptor, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def is_tmpfs(descriptor: int) -> bool:
    """Whether the bytes behind the descriptor are memory (tmpfs, memfd)."""
    answer = ctypes.create_string_buffer(256)  # struct statfs is 120 bytes at most; its first word is the type
    if _libc.fstatfs(descriptor, answer) != 0:
        return False
    return ctypes.c_long.from_buffer(answer).value == _TMPFS_MAGIC


def block_device_size(descriptor: int) -> int:
    """Bytes of an open block device."""
    answer = fcntl.ioctl(descriptor, _BLKGETSIZE64, bytes(8))
    size: int = struct.unpack("=Q", answer)[0]
    return size


def sector_size(descriptor: int) -> int:
    """Bytes of the smallest unit an open block device is addressed in."""
    answer = fcntl.ioctl(descriptor, _BLKSSZGET, bytes(4))
    size: int = struct.unpack("=i", answer)[0]
    return size
