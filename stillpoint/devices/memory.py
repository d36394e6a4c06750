"""Memory as a device, in a descriptor that another process can be given."""

from __future__ import annotations

import errno
import os

from ..errors import DeviceError, InvalidRequest
from .descriptor import DescriptorDevice


class MemoryDevice(DescriptorDevice):
    """Anonymous memory (memfd). Only what was written takes space; trims give it back; it dies with its last holder.

    `fileno()` may be passed to a child process (`pass_fds`) or over a Unix socket; `from_descriptor` opens it there,
    and both see the same bytes.
    """

    def __init__(self, size: int, *, name: str = "memory") -> None:
        if size <= 0:
            raise InvalidRequest(f"{name}: a device of {size} bytes makes no sense")
        descriptor = -1
        try:
            descriptor = os.memfd_create(f"stillpoint:{name}"[:200], os.MFD_CLOEXEC)
            os.ftruncate(descriptor, size)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise DeviceError(
                f"{name}: no memory for {size} bytes: {error.strerror}", error.errno or errno.EIO
            ) from error
        super().__init__(descriptor, size=size, description=name)

    @classmethod
    def from_descriptor(cls, descriptor: int, *, name: str = "memory", read_only: bool = False) -> MemoryDevice:
        """The device behind a descriptor got from another process; it is owned, and closed, by the result."""
        device = cls.__new__(cls)
        size = os.fstat(descriptor).st_size
        DescriptorDevice.__init__(device, descriptor, size=size, description=name, read_only=read_only)
        return device

    def _synchronize(self) -> None:
        """Memory is as durable as it gets."""
