"""What targets share: calls in their thread, and errors of the system with names."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ..errors import DeviceError

T = TypeVar("T")


async def in_thread(thread: ThreadPoolExecutor, call: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(thread, call)


def device_error(what: str, error: OSError) -> DeviceError:
    return DeviceError(f"{what}: {error.strerror or error}", error.errno or errno.EIO)
