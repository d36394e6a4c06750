"""What we tell the service manager that started us, over its notification socket (sd_notify(3)).

READY=1 when the node serves, STATUS= for `systemctl status`, WATCHDOG=1 for as long as the event loop turns, STOPPING=1
when it was told to stop. Started by hand there is no socket, and all of this does nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket

logger = logging.getLogger(__name__)


class ServiceManager:
    """watchdog_s: it has us killed after this long without WATCHDOG=1; None: it does not watch."""

    def __init__(self, address: str, watchdog_s: float | None) -> None:
        self.watchdog_s = watchdog_s
        # A leading @ names a socket without a file.
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)

    @classmethod
    def from_environment(cls) -> ServiceManager | None:
        """The one that started us. Its variables are removed, so that a child of ours does not speak for us."""
        address = os.environ.pop("NOTIFY_SOCKET", "")
        timeout_us = os.environ.pop("WATCHDOG_USEC", "")
        watched_pid = os.environ.pop("WATCHDOG_PID", str(os.getpid()))
        if not address.startswith(("/", "@")):
            return None
        is_watched = timeout_us.isdecimal() and int(timeout_us) > 0 and watched_pid == str(os.getpid())
        return cls(address, int(timeout_us) / 1e6 if is_watched else None)

    def tell(self, *assignments: str) -> None:
        """Like "READY=1". One that cannot be told is no reason to stop; the watchdog decides about us then."""
        try:
            self._socket.sendto("\n".join(assignments).encode(), self._address)
        except OSError as error:
            logger.warning("the service manager cannot be told %s: %s", assignments, error.strerror)

    def close(self) -> None:
        self._socket.close()


async def serve_until(stop: asyncio.Event, *, status: str = "serving") -> None:
    """The node serves: tell the service manager, and wait until `stop` is set. It is told of that too."""
    manager = ServiceManager.from_environment()
    if manager is None:
        await stop.wait()
        return
    try:
        manager.tell("READY=1", f"STATUS={status}")
        # Twice in each period, as sd_watchdog_enabled(3) asks for.
        interval_s = manager.watchdog_s / 2 if manager.watchdog_s is not None else None
        while not stop.is_set():
            if interval_s is not None:
                manager.tell("WATCHDOG=1")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await stop.wait()
        manager.tell("STOPPING=1", "STATUS=stopping")
    finally:
        manager.close()
